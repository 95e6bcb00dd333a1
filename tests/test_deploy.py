"""The container, without Docker: what deploy/Dockerfile says is read, and done as far as no root is needed.

Not done: the base image, apt-get and pip. Test: pytest tests/test_deploy.py
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import ROOT, wait_until

KEY = "alice-key-0123456789"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The lines of the Dockerfile, those that go on put together, as (name, rest)."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]


def all_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


class Container:
    """A folder in place of the image's /, with the files, the environment and the commands of the Dockerfile."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.folder = self._moved(all_of("WORKDIR")[0])
        for name in [self.folder, *self.volumes()]:
            Path(name).mkdir()
        for rest in all_of("COPY"):
            *sources, target = rest.split()
            for source in map(ROOT.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, Path(self.folder, target), ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, Path(self.folder, target))
        words = (word.partition("=") for rest in all_of("ENV") for word in shlex.split(rest))
        self.environment = {name: self._moved(value) for name, _, value in words}

    def volumes(self) -> list[str]:
        return [self._moved(path) for rest in all_of("VOLUME") for path in json.loads(rest)]

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Run a command as the image would, with a port and a model of this test's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOONREEL_", "HF_"))}
        mine = {"MOONREEL_MODEL": "demo", "MOONREEL_PORT": self.port}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [part.replace("7860", self.port) for part in command],
                cwd=self.folder,
                env={**kept, **self.environment, **mine, **environment},
                stdout=log,
                stderr=log,
            )

    def is_healthy(self) -> bool:
        command = json.loads(all_of("HEALTHCHECK")[0].partition(" CMD ")[2])
        return self.start(*command).wait(30) == 0

    def _moved(self, path: str) -> str:
        """A path of the image, or a list of them, where this test has it."""
        path = path.replace("/venv/bin", str(Path(sys.executable).parent)).replace("$PATH", os.environ["PATH"])
        return re.sub(r"^/(app|data|weights)\b", rf"{self.root}/\1", path)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    yield Container(tmp_path)


def test_the_image_serves_is_healthy_and_ends_on_sigterm(container: Container) -> None:
    (command,) = map(json.loads, all_of("CMD"))
    assert not container.is_healthy()
    server = container.start(*command, MOONREEL_API_KEYS=f"alice:{KEY}")
    try:
        wait_until(lambda: server.poll() is not None or container.is_healthy(), 60)
        assert server.poll() is None, container.log.read_text(encoding="utf-8")
        url = f"http://127.0.0.1:{container.port}"
        assert httpx.get(f"{url}/api/jobs/list", trust_env=False).status_code == 401
        page = httpx.get(url, headers={"Host": "any.example"}, trust_env=False)
        assert page.status_code == 200 and "Moonreel" in page.text
    finally:
        server.terminate()
        assert server.wait(30) == 0
    assert (Path(container.environment["MOONREEL_DATA_DIR"]) / "session-secret").is_file()


def test_the_image_does_not_serve_others_without_a_key(container: Container) -> None:
    (command,) = map(json.loads, all_of("CMD"))

    assert container.start(*command).wait(60) == 2
    assert "API_KEYS" in container.log.read_text(encoding="utf-8")


def test_data_and_weights_are_in_volumes_that_the_readme_mounts(container: Container) -> None:
    kept = {container.environment[name] for name in ("MOONREEL_DATA_DIR", "HF_HOME")}

    assert kept == set(container.volumes())
    for path in json.loads(all_of("VOLUME")[0]):
        assert f":{path} " in README


def test_the_image_runs_as_a_user_who_owns_the_volumes() -> None:
    names = [name for name, _ in instructions()]
    (user,) = all_of("USER")

    assert user not in ("root", "0") and f"--create-home {user}" in " ".join(all_of("RUN"))
    assert f"chown {user}:{user} /data /weights" in " ".join(all_of("RUN"))
    assert names.index("USER") > max(number for number, name in enumerate(names) if name in ("RUN", "COPY"))


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = {source for rest in all_of("COPY") for source in rest.split()[:-1]}
    ray = (ROOT / "deploy" / "Dockerfile.ray").read_text(encoding="utf-8")
    copied.update(source for line in re.findall(r"^COPY (.*)", ray, re.MULTILINE) for source in line.split()[:-1])

    assert ignored[0] == "*"
    assert {entry[1:] for entry in ignored if entry.startswith("!")} == copied


@pytest.mark.parametrize("script", all_of("RUN"))
def test_a_step_of_the_build_is_a_script(script: str) -> None:
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
