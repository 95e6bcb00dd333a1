"""Jobs whose frames look alike: repeats are stored and counted apart, and a start goes on as if there had been none
before it. The measure itself: test_similarity.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_bench import Bench, Death
from local_server import Lab

from jobs.frame_store import Result
from pipeline.demo import SAMPLE_VIDEO
from pipeline.moondream.checkpoint import Checkpoint
from pipeline.results import FrameResult

ASKED: dict[str, Any] = {
    "target_fps": 3,
    "reuse_similar": 10,
    "max_frames": 60,
}  # 20 s: three still scenes, and a star that moves


@pytest.fixture
def bench(tmp_path: Path, demo: Checkpoint, lab: Lab) -> Iterator[Bench]:
    bench = Bench(tmp_path, demo, lab)
    yield bench
    bench.close()


def told(results: list[Result]) -> list[tuple[Any, ...]]:
    return [(r["frame_idx"], r["description"], r.get("reused_from_frame_idx")) for r in results]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, demo: Checkpoint) -> list[tuple[Any, ...]]:
    """What an undisturbed run says."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"), demo, Lab())
    job_id = bench.upload(SAMPLE_VIDEO, **ASKED)
    assert bench.run(job_id)["status"] == "completed"
    results = told(bench.results(job_id))
    bench.close()
    return results


def test_repeats_are_counted_apart_and_have_their_pictures(bench: Bench, expected: list[tuple[Any, ...]]) -> None:
    job_id = bench.upload(SAMPLE_VIDEO, **ASKED)
    record = bench.run(job_id)
    num_reused = sum(original is not None for *_, original in expected)

    assert 30 < num_reused < 60
    assert (record["num_frames"], record["num_frames_reused"], record["num_frames_failed"]) == (60, num_reused, 0)
    assert len(list(bench.store.files.of(job_id).glob("frames/*.jpg"))) == 60
    assert len(bench.watch.submitted) == 60 - num_reused
    for frame_idx, description, original in expected:
        if original is not None:
            assert original < frame_idx
            assert (original, description, None) in expected


@pytest.mark.parametrize("num_before", [1, 5, 17, 40])
def test_a_start_after_a_death_goes_on_with_the_same_originals(
    bench: Bench, expected: list[tuple[Any, ...]], num_before: int
) -> None:
    job_id = bench.upload(SAMPLE_VIDEO, **ASKED)

    def die() -> None:
        raise Death

    bench.after_frames(num_before, die)
    with pytest.raises(Death):
        bench.worker.run_next()
    bench.reopen()
    assert num_before <= len(bench.results(job_id)) < 60
    bench.run(job_id)

    assert told(bench.results(job_id)) == expected


def test_a_retry_does_the_repeats_of_a_failed_frame_again(bench: Bench, expected: list[tuple[Any, ...]]) -> None:
    job_id = bench.upload(SAMPLE_VIDEO, **ASKED)

    def break_some() -> None:
        with bench.store.frames(job_id) as frames:
            failed = [FrameResult(r["frame_idx"], 0, "", "error", "broken") for r in frames.results()[2:5]]
            frames.append([result.to_json(job_id) for result in failed])
        bench.store.cancel(job_id)

    bench.after_frames(12, break_some)
    bench.run(job_id)
    bench.store.retry(job_id)
    bench.run(job_id)

    assert told(bench.results(job_id)) == expected


def test_frames_that_look_alike_are_described_if_that_is_asked_for(bench: Bench) -> None:
    job_id = bench.upload(SAMPLE_VIDEO, **{**ASKED, "reuse_similar": 0})
    record = bench.run(job_id)

    assert record["num_frames_reused"] == 0 and len(bench.watch.submitted) == 60
