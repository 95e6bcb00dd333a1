"""A job as it is shown, and told by webhook: the contract's names, no secrets, and a progress that never falls."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from job_house import HOOK, House, frame

from jobs import live as live_module
from jobs.live import Live
from jobs.record import FINISHED, Record, new_record
from jobs.schema import JobRequest, JobStatus, JobSummary, ResultsPayload
from jobs.views import FrameCounts, results_payload, status, stored_counts, summary
from pipeline.results import FrameResult

SECRET_URL = "https://example.com/film.mp4?token=secret&x=1"
MODEL = {"id": "vikhyatk/moondream2", "revision": "2025-06-21", "device": "cuda:0", "dtype": "bfloat16"}
COUNTS = FrameCounts(num_frames=0, num_failed=0, num_reused=0, last_seq=0)


class Clock:
    """Stands for the monotonic clock."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live_module, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "data")
    yield house
    house.store.close()


def job(video_url: str = SECRET_URL, asked: dict[str, Any] | None = None, **fields: Any) -> Record:
    request = JobRequest(video_url=video_url, **asked or {}).model_dump()
    return cast(Record, {**new_record("job_1", 1, "owner", request, 1000.0), **fields})


def shown(record: Record, counts: FrameCounts = COUNTS, live: Live | None = None, **others: Any) -> dict[str, Any]:
    """A status, checked against the schema: all of its names, and no other."""
    answer = status(record, counts, live, others.get("position"), others.get("results"))
    assert answer.keys() == JobStatus.model_fields.keys()
    JobStatus.model_validate(answer)
    short = summary(record, counts, live)
    assert short.keys() == JobSummary.model_fields.keys()
    JobSummary.model_validate(short)
    assert {**answer, **short, "video_url": ""} == {**answer, "video_url": ""}
    return answer


def test_a_new_job_is_shown_as_it_was_asked_for() -> None:
    asked = {
        "target_fps": 2,
        "question": "Who?",
        "start_s": 1.5,
        "end_s": 9,
        "caption_length": "short",
        "metadata": {"album": 7},
    }
    answer = shown(job(asked=asked), position=3)

    for name, value in {
        "job_id": "job_1",
        "status": "submitted",
        "input_target_fps": 2,
        "input_question": "Who?",
        "submitted_at": 1000.0,
        "processing_started_at": None,
        "stage": None,
        "progress": 0.0,
        "frames_processed": 0,
        "total_frames_expected": None,
        "frames_per_second": None,
        "eta_seconds": None,
        "queue_position": 3,
        "start_s": 1.5,
        "end_s": 9,
        "caption_length": "short",
        "metadata": {"album": 7},
        "results_payload": None,
    }.items():
        assert answer[name] == value, name


def test_a_summary_hides_the_query_of_the_url_and_a_status_does_not() -> None:
    record = job()

    assert "secret" not in str(summary(record))
    assert summary(record)["video_url"].startswith("https://example.com/film.mp4")
    assert shown(record)["video_url"] == SECRET_URL


def test_neither_shows_who_owns_the_job_or_where_it_is_told() -> None:
    record = job(asked={"webhook_url": "https://hooks.example"}, owner="key-7", idempotency_key="hashed")

    assert not [text for text in ("hooks.example", "key-7", "hashed") if text in str(shown(record))]


def test_the_name_of_an_upload_is_shown_as_it_is() -> None:
    for url in ("upload:holiday.mp4", "upload:what? #1 & 2.mp4"):
        record = job(url, container="mp4")
        assert summary(record)["video_url"] == shown(record)["video_url"] == url


def test_progress_rises_through_the_stages_from_0_to_100() -> None:
    live, record, progress = Live(), job(), []

    def look(counts: FrameCounts = COUNTS, live: Live | None = live, **fields: Any) -> None:
        record.update(cast(Record, fields))
        progress.append(shown(record, counts, live)["progress"])

    look(live=None)
    look(status="processing", processing_started_at=1001.0)
    look(stage="downloading", model=MODEL)
    live.num_bytes_expected = 1000
    for live.bytes_downloaded in (0, 1, 500, 1000, 1100):
        look()
    look(container="mp4")
    look(stage="describing", num_frames_expected=40)
    for i in range(1, 46):  # more than were expected
        look(replace(COUNTS, num_frames=i))
    look(replace(COUNTS, num_frames=45), None, status="completed", stage=None, num_frames_expected=45)

    assert progress == sorted(progress)
    assert (progress[0], progress[2], progress[7], progress[9]) == (0.0, 0.0, 5.0, 5.0)
    assert (progress[5], progress[29]) == (2.5, 52.5)
    assert progress[-7:] == [99.9, 99.9, 99.9, 99.9, 99.9, 99.9, 100.0]


def test_where_lengths_are_unknown_progress_waits() -> None:
    live = Live(bytes_downloaded=5_000_000)
    downloading = job(status="processing", stage="downloading")
    describing = job(status="processing", stage="describing", container="mp4")

    assert shown(downloading, live=live)["progress"] == 0.0
    assert shown(downloading, live=live)["bytes_downloaded"] == 5_000_000
    assert shown(describing, replace(COUNTS, num_frames=9), live)["progress"] == 5.0
    assert shown({**describing, "num_frames_expected": 0}, live=live)["progress"] == 5.0


def test_an_upload_needs_no_download_and_a_restarted_job_keeps_its_progress() -> None:
    upload = job("upload:a.mp4", container="mp4")
    restarted = job(container="mp4", num_frames_expected=10, num_frames=4)

    assert shown(upload)["progress"] == 5.0
    assert shown(restarted, stored_counts(restarted))["progress"] == summary(restarted)["progress"] == 43.0


@pytest.mark.parametrize("ended", ["failed", "canceled"])
def test_a_job_that_was_not_completed_never_shows_100(ended: str) -> None:
    record = job(status=ended, container="mp4", num_frames=10, num_frames_expected=10, error_code="server_died")

    assert shown(record, stored_counts(record))["progress"] == 99.9


def test_counts_come_from_the_record_unless_they_are_given() -> None:
    record = job(status="failed", num_frames=9, num_frames_failed=2, num_frames_reused=1, last_seq=11)
    counted = FrameCounts(num_frames=12, num_failed=3, num_reused=2, last_seq=15)

    names = ("frames_processed", "frames_failed", "frames_reused")
    assert [summary(record)[name] for name in names] == [9, 2, 1]
    assert [shown(record, counted)[name] for name in (*names, "last_seq")] == [12, 3, 2, 15]


def test_the_rate_is_that_of_this_start(clock: Clock) -> None:
    record = job(status="processing", stage="describing", container="mp4", num_frames_expected=60)
    live = Live(describing_since_s=100.0, num_frames_before=20)

    def rate_and_eta(num_frames: int) -> tuple[Any, Any]:
        answer = shown(record, replace(COUNTS, num_frames=num_frames), live)
        return answer["frames_per_second"], answer["eta_seconds"]

    clock.now_s = 104.0
    assert rate_and_eta(20) == (None, None)  # nothing yet
    assert rate_and_eta(30) == (2.5, 12.0)
    assert rate_and_eta(60) == (10.0, 0.0)
    assert rate_and_eta(70) == (12.5, 0.0)  # more than were expected
    clock.now_s = 100.0
    assert rate_and_eta(21) == (1000.0, 0.0)  # no division by nothing
    record["num_frames_expected"] = None
    assert rate_and_eta(21) == (1000.0, None)


def test_before_the_description_and_after_the_end_there_is_no_rate(clock: Clock) -> None:
    clock.now_s = 200.0
    record = job(status="processing", stage="downloading", num_frames_expected=60)
    for live in (None, Live()):
        answer = shown(record, replace(COUNTS, num_frames=30), live)
        assert (answer["frames_per_second"], answer["eta_seconds"]) == (None, None)


def test_the_share_of_a_download_is_never_above_100() -> None:
    assert Live().download_percent == 0.0
    assert Live(bytes_downloaded=5).download_percent == 0.0
    assert Live(bytes_downloaded=0, num_bytes_expected=10).download_percent == 0.0
    assert Live(bytes_downloaded=5, num_bytes_expected=0).download_percent == 0.0
    assert Live(bytes_downloaded=5, num_bytes_expected=10).download_percent == 50.0
    assert Live(bytes_downloaded=15, num_bytes_expected=10).download_percent == 100.0


def test_a_sign_of_life_is_noted(clock: Clock) -> None:
    live = Live(moved_at_s=100.0)
    clock.now_s = 130.0
    live.moved()
    assert live.moved_at_s == 130.0


def test_a_failed_job_tells_its_error() -> None:
    answer = shown(job(status="failed", failed_at=1002.0, error_code="download_failed", error_message="No such host."))

    assert (answer["error_code"], answer["error_message"], answer["failed_at"]) == (
        "download_failed",
        "No such host.",
        1002.0,
    )


def test_the_payload_has_all_results_and_the_seconds_of_each_stage() -> None:
    record = job(
        status="completed",
        model=MODEL,
        average_fps=29.97,
        is_truncated=True,
        warnings=["A gap at 3 s."],
        timings={"video_download": 1.23456, "overall_pipeline_internal": 9.0},
    )
    found = [
        {**FrameResult(0, 0, "A dog.", num_tokens=3, finish_reason="eos").to_json("job_1"), "seq": 2},
        {**FrameResult(30, 1001, "", "error", "The model failed.").to_json("job_1"), "seq": 1},
    ]
    payload = results_payload(record, found)

    assert payload.keys() == ResultsPayload.model_fields.keys()
    assert payload["timings_seconds"] == {
        "video_download": 1.235,
        "frame_extraction": 0.0,
        "distributed_frame_processing_map": 0.0,
        "overall_pipeline_internal": 9.0,
    }
    assert (payload["total_frames_submitted_to_workers"], payload["total_frames_results_received"]) == (2, 2)
    assert (payload["video_url"], payload["truncated"], payload["warnings"]) == (SECRET_URL, True, ["A gap at 3 s."])
    answer = shown(record, replace(COUNTS, num_frames=2), results=payload)
    frames = JobStatus.model_validate(answer).model_dump()["results_payload"]["frame_results"]
    assert [frame["error_message"] for frame in frames] == [None, "The model failed."]


# What the store puts into the outbox of the webhooks


def test_each_end_of_a_job_with_a_webhook_is_told_once(house: House) -> None:
    job_ids = [house.add(webhook_url=HOOK, metadata={"n": i}) for i in range(4)]
    house.store.cancel(job_ids[0])
    for ended in FINISHED:
        house.run(ended, frame(0), error_message="Why" if ended == "failed" else None)
    house.add()
    house.run("completed")

    for store in house.now_and_later():
        items = sorted(store.outgoing(), key=lambda item: job_ids.index(item.job_id))
        assert [(item.job_id, item.url, item.num_tries) for item in items] == [(i, HOOK, 0) for i in job_ids]
        assert len({item.webhook_id for item in items}) == 4
        bodies = [orjson.loads(item.body) for item in items]
        assert [body["type"] for body in bodies] == [f"job.{ended}" for ended in ("canceled", *FINISHED)]
        for item, body in zip(items, bodies, strict=True):
            assert body["data"] == summary(store.get(item.job_id))
            assert item.next_try_at == item.created_at
            assert "secret" not in str(body)


def test_what_waits_to_end_or_goes_back_to_the_queue_is_not_told(house: House) -> None:
    job_id = house.add(webhook_url=HOOK)
    house.run("submitted")
    assert house.store.claim(0)
    house.store.cancel(job_id)

    for store in house.now_and_later():
        assert store.outgoing() == []


def test_a_try_is_noted_and_the_last_one_ends_it(house: House) -> None:
    for _ in range(2):
        house.added("completed", webhook_url=HOOK)
    failed, delivered = house.store.outgoing()
    house.store.webhook_tried(failed, next_try_at=2000.0, outcome="failed: no answer")
    house.store.webhook_tried(delivered, next_try_at=None, outcome="delivered")

    for store in house.now_and_later():
        again = replace(failed, num_tries=1, next_try_at=2000.0)
        assert store.outgoing() == [again]
        store.webhook_tried(delivered, next_try_at=3000.0, outcome="told twice")  # comes not back
        assert store.outgoing() == [again]


def test_a_retried_job_that_ends_again_is_told_again(house: House) -> None:
    job_id = house.added("failed", webhook_url=HOOK)
    house.store.retry(job_id)
    house.run("completed")

    for store in house.now_and_later():
        first, second = store.outgoing()
        assert first.webhook_id != second.webhook_id
        assert [orjson.loads(item.body)["type"] for item in (first, second)] == ["job.failed", "job.completed"]
    house.store.webhook_tried(second, next_try_at=None, outcome="delivered")
    for store in house.now_and_later():
        assert store.outgoing() == [first]


def test_a_deleted_job_is_not_told(house: House) -> None:
    job_id = house.added("completed", webhook_url=HOOK)
    (item,) = house.store.outgoing()
    house.store.delete(job_id)

    for store in house.now_and_later():
        assert store.outgoing() == []
        store.webhook_tried(item, next_try_at=2000.0, outcome="failed")  # it was on its way


def test_a_new_webhook_wakes_the_sender(house: House) -> None:
    house.store.wait_for_webhook(0.01)
    started_s = time.monotonic()
    sender = threading.Thread(target=house.store.wait_for_webhook, args=(20,))
    sender.start()
    while sender.is_alive():
        house.store.cancel(house.add(webhook_url=HOOK))

    assert time.monotonic() - started_s < 10
