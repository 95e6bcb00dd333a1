"""The load program, for a few visitors, and what its judges find. The long one: python -m tests.load"""

import json
from contextlib import closing
from pathlib import Path

import load
import pytest
from local_server import LocalServer
from local_server import http as reply
from process_watch import Held, percentile
from visitors import Tally, Visitor, Wish

REST = Held(rss_bytes=500_000_000, children_bytes=0, num_files=20, num_threads=15, num_children=0)


@pytest.mark.long
def test_a_few_visitors_are_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load.load(3, 1, 0.5, tmp_path, warm_up=1, rest_s=0.1)

    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["jobs_completed"] == found["jobs_accepted"] >= 3
    assert found["statuses"]["429"] >= 1 and found["statuses"]["206"] == found["jobs_completed"]
    assert found["events"] > 0 and found["status_ms"]["p50"] > 0


def crowd(poll_s: float = 0.01) -> load.Crowd:
    crowd = load.Crowd("http://127.0.0.1:1", [])
    crowd.tally.poll_s, crowd.lags_s = [poll_s] * 100, [0.0]
    crowd.tally.answered(429, "queue_full")
    return crowd


def test_a_good_run_is_good() -> None:
    assert load.judge(crowd(), REST, REST, REST, 1) == 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("slow", "99th percentile of status is 300 ms"),
        ("unreached", "99th percentile of status is inf ms"),
        ("grown", "memory went from 500,000,000 to 560,000,000 bytes"),
        ("leaking", "num_threads at rest went from 15 to 19"),
        ("generous", "nobody was asked to come back later"),
    ],
)
def test_a_bad_run_is_named(what: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = crowd(0.3 if what == "slow" else 0.01)
    if what == "generous":
        seen.tally.statuses.clear()
    if what == "unreached":
        seen.tally.poll_s = []
    changed = {"grown": Held(560_000_000, 0, 20, 15, 0), "leaking": Held(500_000_000, 0, 20, 19, 0)}

    assert load.judge(seen, REST, REST, changed.get(what, REST), 1) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        ("500 Internal Server Error", (), "was answered 500"),
        ("429 Too Many Requests", (), "429 without Retry-After"),
        ("503 Service Unavailable", ("Retry-After: 0",), "was answered 503"),
        ("200 OK", (), "a submit was answered 200"),
    ],
)
def test_a_visitor_complains_of_what_should_not_be(status: str, headers: tuple[str, ...], words: str) -> None:
    server, tally = LocalServer(), Tally()
    try:
        server.replies["/api/submit"] = [reply(b"{}", status, headers)]
        with closing(Visitor(f"http://127.0.0.1:{server.port}", 1, tally)) as visitor:
            assert visitor.submit(Wish("http://x/v.mp4", {})) is None
    finally:
        server.stop()

    assert any(words in text for text in tally.wrong), tally.wrong


def test_a_stream_that_skips_a_frame_is_complained_of() -> None:
    server, tally = LocalServer(), Tally()
    try:
        events = [f"event: {name}\nid: {seq}\ndata: x\n\n" for name, seq in (("frame", 1), ("frame", 3), ("done", 3))]
        server.replies["/api/jobs/j/events"] = [reply("".join(events).encode())]
        with closing(Visitor(f"http://127.0.0.1:{server.port}", 1, tally)) as visitor:
            visitor.follow("j")
    finally:
        server.stop()

    assert tally.num_events == 3
    assert "after 2 frames: [1, 3]" in tally.wrong[0]


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]

    assert [percentile(values, percent) for percent in (50, 99, 100)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 99) == 7.0
