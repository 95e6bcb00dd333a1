"""Answers that are given again: the cache by itself, and in jobs."""

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from api_client import Client, ended, upload
from job_bench import DEMO, Bench
from local_server import Lab
from serving import SAMPLE, ServerProcess

from pipeline.answer_cache import AnswerCache, answer_key
from pipeline.demo import SAMPLE_VIDEO
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.moondream.prompts import Caption, Query

IMAGE = np.zeros((4, 6, 3), np.uint8)
KEY = answer_key(IMAGE, Query(), DEMO, "me")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    cache = AnswerCache(tmp_path / "answers.sqlite", 1_000_000)
    yield cache
    cache.close()


def test_an_answer_is_found_again_also_by_the_next_server(cache: AnswerCache, tmp_path: Path) -> None:
    assert cache.get(KEY) is None
    cache.put(KEY, "Äpfel.", "job_1")
    assert cache.get(KEY) == "Äpfel."

    cache.close()
    assert cache.get(KEY) is None
    again = AnswerCache(tmp_path / "answers.sqlite", 1_000_000)
    assert again.get(KEY) == "Äpfel."
    again.close()


def test_another_picture_question_model_or_owner_is_another_answer() -> None:
    other = IMAGE.copy()
    other[3, 5, 2] = 1
    model = dataclasses.replace(DEMO, revision="2")
    keys = {
        KEY,
        answer_key(other, Query(), DEMO, "me"),
        answer_key(IMAGE.reshape(6, 4, 3), Query(), DEMO, "me"),
        answer_key(IMAGE, Query("Who?"), DEMO, "me"),
        answer_key(IMAGE, Query(max_tokens=9), DEMO, "me"),
        answer_key(IMAGE, Caption("short"), DEMO, "me"),
        answer_key(IMAGE, Caption("long"), DEMO, "me"),
        answer_key(IMAGE, Query(), model, "me"),
        answer_key(IMAGE, Query(), DEMO, "you"),
    }

    assert len(keys) == 9
    assert answer_key(IMAGE.copy(), Query(), DEMO, "me") == KEY


def test_answers_go_with_their_job(cache: AnswerCache) -> None:
    cache.put(b"a", "A.", "job_1")
    cache.put(b"b", "B.", "job_2")
    cache.forget("job_1")

    assert (cache.get(b"a"), cache.get(b"b")) == (None, "B.")


def test_what_was_not_used_for_longest_makes_room(cache: AnswerCache) -> None:
    for number in range(1000):
        cache.put(number.to_bytes(4), "x" * 2000, "job_1")
        cache.get((0).to_bytes(4))

    assert 500_000 < cache.num_bytes <= 1_000_000
    assert cache.get((0).to_bytes(4)) and cache.get((999).to_bytes(4))
    assert cache.get((1).to_bytes(4)) is None


def test_a_damaged_cache_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"no database at all" * 999)
    cache = AnswerCache(path, 1_000_000)
    cache.put(KEY, "A.", "job_1")

    assert cache.get(KEY) == "A."
    assert "starts anew" in caplog.text
    cache.close()


@pytest.mark.parametrize("name", ["answers.sqlite", "answers.sqlite-wal"])
def test_a_folder_in_its_place_is_left_alone_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Bug: the server did not start, with a traceback."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "film").write_bytes(b"mine")
    cache = AnswerCache(tmp_path / "answers.sqlite", 1_000_000)
    cache.put(KEY, "A.", "job_1")

    assert cache.get(KEY) is None
    assert (tmp_path / name / "film").read_bytes() == b"mine"
    assert "There is no cache of answers" in caplog.text and "move it away and restart" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_database_of_another_shape_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE answers (key, job_id, used_at)")
    cache = AnswerCache(path, 1_000_000)
    cache.put(KEY, "A.", "job_1")

    assert cache.get(KEY) == "A."
    assert "starts anew" in caplog.text
    cache.close()


def test_without_a_place_on_the_disk_there_is_no_cache(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "no" / "such" / "folder", 1_000_000)
    cache.put(KEY, "A.", "job_1")

    assert cache.get(KEY) is None and cache.num_bytes == 0


# In jobs


def test_the_same_video_asked_the_same_again_answers_without_the_model(
    tmp_path: Path, demo: Checkpoint, lab: Lab, cache: AnswerCache
) -> None:
    bench = Bench(tmp_path, demo, lab)
    bench.reopen(options=dataclasses.replace(bench.options, cache=cache))
    asked = {"target_fps": 1, "max_tokens": 256, "max_frames": 5}  # no picture comes twice among them
    first = bench.upload(SAMPLE_VIDEO, **asked)
    bench.run(first)
    num_described = len(bench.watch.submitted)
    again, other = bench.upload(SAMPLE_VIDEO, **asked), bench.upload(SAMPLE_VIDEO, question="How many?", **asked)
    bench.run(again)
    assert len(bench.watch.submitted) == num_described == 5
    bench.run(other)
    assert len(bench.watch.submitted) == 10
    random = bench.upload(SAMPLE_VIDEO, temperature=0.5, **asked)
    bench.run(random)
    assert len(bench.watch.submitted) == 15

    assert bench.told(again) == bench.told(first)
    assert all(result["cached"] for result in bench.results(again))
    assert not any("cached" in result for result in bench.results(first))
    bench.close()


def test_a_server_remembers_answers_until_their_job_is_deleted(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data", answer_cache_bytes=1_000_000).start() as server:
        video = SAMPLE.read_bytes()
        with Client(server.url) as client:
            first = ended(client, upload(client, video, max_frames=5))
        assert server.stop() == 0
        with Client(server.start().url) as client:
            again = ended(client, upload(client, video, max_frames=5))
            client.delete(f"/api/jobs/{first['job_id']}").raise_for_status()
            anew = ended(client, upload(client, video, max_frames=5))
            metrics = client.get("/metrics").text

    cached = [[f.get("cached") for f in s["results_payload"]["frame_results"]] for s in (first, again, anew)]
    assert cached == [[None] * 5, [True] * 5, [None] * 5]
    assert 'moonreel_frames_total{outcome="cached"} 5.0' in metrics
