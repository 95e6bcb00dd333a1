"""A cluster as the README starts it: `ray start` for each node, then the app, and what the app tells of the nodes.

And what is said where versions differ.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from browsing import launched, visiting
from playwright.sync_api import expect
from serving import SAMPLE, ServerProcess, wait_until

from pipeline import cluster
from pipeline.cluster import Cluster
from pipeline.cluster_host import EngineHost, Wanted
from pipeline.errors import DeviceUnavailable

ray: Any = import_module("ray")  # which is no package but this folder, for who checks types without it

pytestmark = pytest.mark.filterwarnings("default")  # of ray and of what it starts
RAY = str(Path(sys.executable).with_name("ray"))
START_S = 120


@contextmanager
def node(log: Path, *arguments: str) -> Iterator[None]:
    """`ray start`, which ends with its processes."""
    with log.open("ab") as out:
        command = [RAY, "start", *arguments, "--block", "--disable-usage-stats"]
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or b"Ray runtime started" in log.read_bytes(), START_S)
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield
    finally:
        process.terminate()
        process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a head that takes no instances, with two nodes of one GPU each, as they say."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    here = ("--node-ip-address", "127.0.0.1", "--num-cpus")
    with ExitStack() as stack:
        head = ("--head", "--port", port, "--include-dashboard", "false", *here, "0", "--num-gpus", "0")
        stack.enter_context(node(tmp_path / "head.log", *head))
        for name in ("one", "two"):
            log = tmp_path / f"{name}.log"
            stack.enter_context(node(log, "--address", f"127.0.0.1:{port}", *here, "2", "--num-gpus", "1"))
        yield f"127.0.0.1:{port}"


def test_the_app_tells_of_the_nodes(address: str, tmp_path: Path) -> None:
    server = ServerProcess(
        tmp_path / "data", environment={"RAY_ADDRESS": address}, pool="ray", instances="auto", slots=4, page=True
    )
    with server.start(), server.client() as http, launched() as browser, visiting(browser, server.url) as visits:
        nodes = wait_until(lambda: len(found := http.get("/api/ready").json()["nodes"]) == 2 and found)
        assert [(one["num_instances"], one["num_gpus"], one["num_frames"]) for one in nodes] == [(1, 1, 0)] * 2

        form = {"target_fps": 25, "reuse_similar": 0}
        job_id = http.post("/api/upload", files={"file": ("v.mp4", SAMPLE.read_bytes())}, data=form).json()["job_id"]
        wait_until(lambda: http.get(f"/api/status/{job_id}").json()["status"] == "completed", 240)
        nodes = http.get("/api/ready").json()["nodes"]
        metrics = http.get("/metrics").text
        page = visits.open()
        line = page.locator("[data-nodes] summary")
        expect(line).to_contain_text("Cluster: 2 nodes, 2 GPUs, 2 instances, ")
        line.click()
        cells = page.locator("[data-nodes] tbody tr").first.locator("th, td").all_text_contents()
        assert server.stop() == 0

    assert cells[:4] == ["1", "1", "1", str(nodes[0]["num_frames"])]
    assert sum(one["num_frames"] for one in nodes) == 600 and all(one["num_frames"] > 0 for one in nodes)
    assert sum(one["frames_per_second"] for one in nodes) > 0
    names = [line for line in metrics.splitlines() if line.startswith("moonreel_node_gpus{")]
    assert len(names) == 2 and all(socket.gethostname() in name and name.endswith(" 1.0") for name in names)


def test_other_versions_are_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ray, and of what answers depend on."""
    monkeypatch.setattr(ray, "__version__", "2.0.1")
    with pytest.raises(DeviceUnavailable, match=r"Ray: 2\.\d+\.\d+ .* Ray: 2\.0\.1 .* need them"):
        Cluster(Wanted("demo"), address)
    monkeypatch.undo()

    monkeypatch.setattr(cluster, "versions", lambda: "Python 3, torch 1, Moonreel 2")
    try:
        connected = Cluster(Wanted("demo", device="cpu"), address, host=EngineHost)
        with pytest.raises(DeviceUnavailable, match=r"has Python .* where Python 3, torch 1, Moonreel 2 is expected"):
            connected.make_engine()
        connected.close()
    finally:
        ray.shutdown()
