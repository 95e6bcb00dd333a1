"""The runbook of the README is run as it stands; the files of deploy/ say what the server knows."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving import PLAIN, ROOT, SAMPLE, ServerProcess, running_app, wait_until

from jobs.settings import PREFIX, Settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEPLOY = ROOT / "deploy"


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A checkout, as far as the runbook looks."""
    (tmp_path / "app.py").symlink_to(ROOT / "app.py")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    yield tmp_path
    if (pid := tmp_path / "moonreel.pid").exists():
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], check=False, capture_output=True)


def test_the_runbook_is_run_as_it_stands(folder: Path, free_port: int) -> None:
    """But for the port; a job is described before the backup and is there after the restore."""
    (script,) = re.findall(r"<!-- runbook -->\n```bash\n(.*?)```", README, re.DOTALL)
    start, rest = script.replace("7860", str(free_port)).split("# Back up", 1)

    run(folder, start)
    url = f"http://127.0.0.1:{free_port}"
    with httpx.Client(base_url=url, **PLAIN) as http:
        job_id = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())}).json()["job_id"]
        wait_until(lambda: http.get(f"/api/status/{job_id}").json()["status"] == "completed")
        results = http.get(f"/api/status/{job_id}").json()["results_payload"]
    printed = run(folder, f"# Back up{rest}")

    assert "1 jobs in backup" in printed and printed.count("0 of them damaged") == 2
    with ServerProcess(folder / "data").start(is_ready=False) as server, server.client() as http:
        assert http.get(f"/api/status/{job_id}").json()["results_payload"] == results


def run(folder: Path, script: str) -> str:
    # The server it starts outlives the shell, so that its output must not be waited for.
    log = folder / "runbook.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOONREEL_PAGE": "no", "MOONREEL_DEVICE": "cpu"}
    with log.open("ab") as file:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            check=False,
        )
    text = log.read_text(encoding="utf-8")
    assert done.returncode == 0, text
    return text


def alerts() -> list[dict[str, Any]]:
    return yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]


def test_each_alert_is_of_metrics_that_are_there_and_in_the_readme(tmp_path: Path) -> None:
    with running_app(tmp_path) as app, app.client() as http:
        text = http.get("/metrics").text
    there = set(re.findall(r"^([a-z_]+)(?:\{| )", text, re.MULTILINE)) | {"up"}

    for rule in alerts():
        asked = set(re.findall(r"\b(?:moonreel|process)_[a-z_]+|\bup\b", rule["expr"]))
        assert asked and asked <= there, rule
        assert f"| `{rule['alert']}` |" in README


def test_the_unit_starts_the_app_with_settings_it_knows() -> None:
    unit = RawConfigParser(strict=False, delimiters=["="])
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "moonreel.service")
    service = unit["Service"]

    names = re.findall(rf"{PREFIX}([A-Z_]+)=", service["Environment"])
    assert names and {name.lower() for name in names} <= set(Settings.model_fields)
    assert service["ExecStart"].endswith("python app.py") and service["RestartPreventExitStatus"] == "2"
    assert f"MOONREEL_DATA_DIR=/var/lib/{service['StateDirectory']}" in service["Environment"]
    assert {service[name] for name in ("NoNewPrivileges", "PrivateTmp", "ProtectHome")} == {"yes"}


def test_the_cluster_of_compose_has_one_head_two_workers_and_a_token() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.cluster.yaml").read_text(encoding="utf-8"))
    head, *workers = (compose["services"][name] for name in ("head", "worker-1", "worker-2"))
    image = (DEPLOY / "Dockerfile.ray").read_text(encoding="utf-8")

    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token RAY_USAGE_STATS_ENABLED=0" in image
    for node in (head, *workers):
        assert node["secrets"] == list(compose["secrets"]) == ["ray_token"] and node["networks"] == ["cluster"]
        assert (
            node["read_only"] and node["cap_drop"] == ["ALL"] and node["build"]["dockerfile"] == "deploy/Dockerfile.ray"
        )
    assert head["environment"]["MOONREEL_POOL"] == "ray" and head["ports"][0].startswith("127.0.0.1:")
    assert all("ports" not in node and "head:6379" in node["command"] for node in workers)
    gpus = [node["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for node in workers]
    assert gpus == [["0"], ["1"]]


def test_compose_agrees_with_the_image() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    service, dockerfile = compose["services"]["moonreel"], (DEPLOY / "Dockerfile").read_text(encoding="utf-8")

    mounted = [volume.partition(":")[2] for volume in service["volumes"]]
    assert f"VOLUME {mounted}".replace("'", '"') in dockerfile
    assert service["ports"][0].endswith(":7860") and "EXPOSE 7860" in dockerfile
    assert (DEPLOY / service["build"]["dockerfile"].removeprefix("deploy/")).exists()
    assert set(compose["volumes"]) == {volume.partition(":")[0] for volume in service["volumes"]}
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert "--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges" in README
