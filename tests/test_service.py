"""The whole server but for HTTP, with the demo model: loading, going on, getting stuck, and stopping."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_server import LocalServer, http
from pool_watch import Watch, instance_threads
from serving import DEMO, wait_until
from video_files import write_video

from jobs import service as service_module
from jobs.record import Upload
from jobs.schema import JobRequest
from jobs.service import EXIT_STUCK, Service, how_far
from jobs.settings import Settings
from jobs.store import DataInUse
from pipeline import pool as pool_module
from pipeline.errors import InvalidOption, WeightsNotFound
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.hub import DEMO_FOLDER, Progress


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "grey.avi", num_frames=6)


class Exits:
    """Takes the place of os._exit."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def __call__(self, code: int) -> None:
        self.codes.append(code)


@contextmanager
def serving(data_dir: Path, exits: Exits | None = None, **settings: Any) -> Iterator[Service]:
    read = Settings(**{**DEMO, "data_dir": data_dir, **settings})
    service = Service(read, exit_process=exits or Exits())
    service.start()
    try:
        yield service
    finally:
        service.stop()


def test_who_stops_a_service_that_stops_waits_for_its_end(tmp_path: Path, video: Path, watch: Watch) -> None:
    """Gradio's server is given up after 5 s, while the service still puts away what is finished."""
    watch.may_go_on.clear()
    with serving(tmp_path / "data") as service:
        job_id = upload(service, video)
        assert watch.has_begun.wait(60)
        threads = [threading.Thread(target=service.stop) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: service._is_stopping.is_set())
        assert all(thread.is_alive() for thread in threads)
        watch.may_go_on.set()
        for thread in threads:
            thread.join()
    with serving(tmp_path / "data") as service:
        wait_until(lambda: is_completed(service, job_id))


def upload(service: Service, video: Path, **request: Any) -> str:
    copied = Path(shutil.copy(video, service.store.files.incoming / "copy"))
    options = {"target_fps": 25, "max_tokens": 16, "reuse_similar": 0, **request}  # its greys look alike
    asked = JobRequest(video_url="upload:grey.avi", **options)
    return service.store.add(asked.model_dump(), "me", Upload(copied, "avi"))


def is_completed(service: Service, job_id: str) -> bool:
    record = service.store.get(job_id)
    assert record["status"] in ("submitted", "processing", "completed"), record["error_message"]
    return record["status"] == "completed"


@pytest.fixture
def watch(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """The engines of the services of a test."""
    watch = Watch(demo)
    monkeypatch.setattr("pipeline.moondream.instances.Engine", lambda *args: watch.make_engine())
    yield watch
    watch.may_go_on.set()


def test_jobs_are_accepted_at_once_and_run_when_the_model_is_there(tmp_path: Path, video: Path) -> None:
    with serving(tmp_path / "data") as service:
        assert service.api.model() is None
        assert service.problems() == ["The model demo is being loaded."]
        job_id = upload(service, video)
        wait_until(lambda: is_completed(service, job_id))

        assert service.problems() == []
        model = service.api.model()
        assert model and service.store.get(job_id)["model"] == vars(model)
        assert b'moonreel_frames_total{outcome="described"} 6.0' in service.metrics.text()


def test_a_model_that_cannot_be_loaded_is_a_problem_until_it_can(
    tmp_path: Path, video: Path, demo: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_module, "LOAD_AGAIN_S", 0.01)
    outcomes: list[Any] = [WeightsNotFound("No network."), ZeroDivisionError("what"), demo]
    may_go_on = threading.Semaphore(0)

    def load(*args: Any, **options: Any) -> Checkpoint:
        may_go_on.acquire()
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("pipeline.moondream.instances.load_checkpoint", load)
    with serving(tmp_path / "data") as service:
        job_id = upload(service, video, max_frames=1)
        may_go_on.release()
        wait_until(lambda: service.problems()[0].startswith("No network. The server tries again"))
        may_go_on.release()
        wait_until(lambda: "ZeroDivisionError" in service.problems()[0])
        assert "see the server's log" in service.problems()[0] and "Traceback" in caplog.text
        may_go_on.release()
        wait_until(lambda: is_completed(service, job_id))


def test_a_model_that_is_not_there_yet_is_found_when_it_is(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "LOAD_AGAIN_S", 0.01)
    folder = tmp_path / "later"
    with serving(tmp_path / "data", model=str(folder)) as service:
        job_id = upload(service, video, max_frames=1)
        wait_until(lambda: "neither a folder nor a hub id" in service.problems()[0])
        assert "or start with --model demo" in service.problems()[0]
        assert service.problems()[0].endswith("The server tries again every 0.01 s.")
        shutil.copytree(DEMO_FOLDER, tmp_path / "copy")
        (tmp_path / "copy").rename(folder)
        wait_until(lambda: is_completed(service, job_id))


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        (Progress("downloaded", 1_234_567_890, 3_950_000_000), "downloaded: 1.2 of 4.0 GB (31%)."),
        (Progress("downloaded", 12_345_678, 32_000_000), "downloaded: 12.3 of 32.0 MB (38%)."),
        (Progress("downloaded", 12_345_678, None), "downloaded: 12.3 MB."),
        (Progress("downloaded", 1_999_999_999, 2_000_000_000), "downloaded: 2.0 of 2.0 GB (99%)."),
        (Progress("loaded", 1_800_000_000, 4_000_000_000), "loaded: 45%."),
    ],
)
def test_how_far_the_model_is_is_a_sentence(progress: Progress, said: str) -> None:
    assert how_far("some/model", progress) == f"The model some/model is being {said}"


def test_a_batch_beyond_its_deadline_is_a_problem_and_then_ends_the_process(
    tmp_path: Path, video: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_module, "WATCH_S", 0.01)
    exits = Exits()
    watch.may_go_on.clear()
    with serving(tmp_path / "data", exits, batch_deadline_s=0.2, exit_when_stuck_s=0.5) as service:
        upload(service, video)
        wait_until(lambda: any("worked on one batch" in problem for problem in service.problems()))
        assert exits.codes == []
        wait_until(lambda: exits.codes)

        assert exits.codes == [EXIT_STUCK]
        assert "the server ends, to be started again" in caplog.text
        watch.may_go_on.set()


def test_where_no_instance_works_for_long_the_process_ends(
    tmp_path: Path, video: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal memory access, no engine of this process ever uses the GPU again."""
    monkeypatch.setattr(service_module, "WATCH_S", 0.01)
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.01)
    exits = Exits()
    watch.fails = lambda in_engine: True
    with serving(tmp_path / "data", exits, batch_deadline_s=0.3, exit_when_stuck_s=0.3) as service:
        job_id = upload(service, video)
        wait_until(lambda: exits.codes)

        assert exits.codes == [EXIT_STUCK]
        assert service.store.get(job_id)["status"] == "processing"  # it goes on at the next start


def test_an_instance_that_hangs_does_not_keep_another_from_working(tmp_path: Path, video: Path, watch: Watch) -> None:
    """Its own frames wait for the restart."""
    is_hanging, may_go_on = threading.Event(), threading.Event()

    def hang(in_engine: set[int]) -> bool:
        if not is_hanging.is_set():
            is_hanging.set()
            assert may_go_on.wait(60)
        return False

    watch.fails = hang
    with serving(tmp_path / "data", instances=2, batch_deadline_s=0.2, exit_when_stuck_s=3600) as service:
        upload(service, video, max_frames=1)
        assert is_hanging.wait(60)
        for _ in range(2):
            job_id = upload(service, video)
            wait_until(lambda job_id=job_id: is_completed(service, job_id))
        wait_until(lambda: any("worked on one batch" in problem for problem in service.problems()))
        may_go_on.set()


def test_a_stop_in_mid_job_is_gone_on_from_at_the_next_start(tmp_path: Path, video: Path, watch: Watch) -> None:
    watch.may_go_on.clear()
    with serving(tmp_path / "data") as service:
        job_ids = [upload(service, video) for _ in range(3)]
        assert watch.has_begun.wait(60)
        service.begin_stop()
        watch.may_go_on.set()
    assert 0 < len(watch.submitted) < 3 * 6
    with serving(tmp_path / "data") as service:
        wait_until(lambda: all(is_completed(service, job_id) for job_id in job_ids))
        for job_id in job_ids:
            with service.store.frames(job_id) as frames:
                assert [(r["frame_idx"], r["status"]) for r in frames.results()] == [(i, "success") for i in range(6)]

    assert sorted(watch.submitted) == sorted(3 * list(range(6)))


def test_a_stop_while_the_model_is_loaded_begins_nothing(
    tmp_path: Path, video: Path, demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool that came too late was left behind."""
    is_stopped, is_asked = threading.Event(), threading.Event()

    def load(*args: Any, **options: Any) -> Checkpoint:
        is_asked.set()
        assert is_stopped.wait(60)
        return demo

    monkeypatch.setattr("pipeline.moondream.instances.load_checkpoint", load)
    with serving(tmp_path / "data") as service:
        job_id = upload(service, video)
        assert is_asked.wait(60)
    is_stopped.set()
    wait_until(lambda: service.pool and not instance_threads())
    with serving(tmp_path / "data") as service:
        wait_until(lambda: is_completed(service, job_id))


def test_webhooks_are_sent(tmp_path: Path, video: Path, server: LocalServer) -> None:
    is_there = threading.Event()

    def take(connection: socket.socket) -> None:
        connection.sendall(http())
        is_there.set()

    server.replies["/hook"] = [take]
    with serving(tmp_path / "data", allow_private_urls="127.0.0.1") as service:
        upload(service, video, max_frames=1, webhook_url=f"http://127.0.0.1:{server.port}/hook")
        assert is_there.wait(60)
        wait_until(lambda: not service.store.outgoing())


def test_a_service_that_cannot_be_leaves_the_data_directory_free(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="webhook_secret"):
        Service(Settings(model="demo", data_dir=tmp_path, webhook_secret="short"))
    service = Service(Settings(model="demo", data_dir=tmp_path))
    with closing(service.store), pytest.raises(DataInUse):
        Service(Settings(model="demo", data_dir=tmp_path))
