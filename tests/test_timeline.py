"""When frames are shown, and what damage leaves out, without a decoder."""

import pytest

from pipeline.errors import VideoUnreadable
from pipeline.timeline import Clock, Damage


def read(times_s: list[float | None], start_s: float | None = 0.0) -> list[float]:
    clock = Clock(start_s, frame_s=0.04)
    return [round(clock.read(time_s), 3) for time_s in times_s]


def test_times_count_from_the_containers_start() -> None:
    assert read([1.4, 1.44, 1.48], start_s=1.4) == [0, 0.04, 0.08]
    assert read([3.4, 3.44], start_s=1.4) == [2, 2.04]  # the sound began earlier
    assert read([1.4, 1.44], start_s=None) == [0, 0.04]
    assert read([1.4, 1.44], start_s=9.0) == [0, 0.04]  # no picture is shown before 0


def test_missing_times_go_on_by_a_frame() -> None:
    assert read([None, None, 0.08, None]) == [0, 0.04, 0.08, 0.12]


def test_a_clock_that_starts_again_goes_on_counting() -> None:
    assert read([8.0, 8.04, 0.0, 0.04]) == [8.0, 8.04, 8.08, 8.12]


def test_an_absurd_jump_is_a_broken_clock() -> None:
    assert read([0.0, 0.04, 95_443.7, 95_443.74]) == [0, 0.04, 0.08, 0.12]
    assert read([0.0, 3599.0]) == [0, 3599.0]


def test_a_repeated_time_does_not_shift_those_after_it() -> None:
    """Each repeat made all later times a frame too late, a second in ten."""
    assert read([0.0, 0.04, 0.04, 0.08, 0.12, 0.11, 0.16]) == [0, 0.04, 0.06, 0.08, 0.12, 0.14, 0.16]


def test_a_clock_that_stands_still_goes_on() -> None:
    times_s = read([0.0] * 100)

    assert times_s == sorted(set(times_s))
    assert 2 < times_s[-1] < 4


def gaps(frames_s: list[float | None], max_bad_packets: int = 500) -> list[str]:
    """What is noted of frames at these times, 25 per second, and of bad packets, None."""
    damage, last_s, notes = Damage(max_bad_packets), None, []
    for time_s in frames_s:
        if time_s is None:
            damage.count_bad_packet(last_s)
        else:
            notes += damage.note_gap(last_s or 0.0, time_s, 0.04)
            last_s = time_s
    return [note.warning for note in [*notes, *damage.note_rest(is_cut=False)]]


def frames(first: int, last: int) -> list[float | None]:
    return [i / 25 for i in range(first, last)]


def test_the_gap_that_a_bad_packet_leaves_is_noted() -> None:
    assert gaps([*frames(0, 10), None, *frames(10, 14), *frames(20, 60)]) == [
        "Damaged: nothing decodes between 0.520 s and 0.800 s."
    ]


def test_a_bad_packet_that_leaves_no_gap_is_counted() -> None:
    assert gaps([*frames(0, 10), None, *frames(10, 60)]) == ["1 damaged packets were skipped."]


def test_a_pause_long_after_a_bad_packet_is_no_damage() -> None:
    """A pause of a varying frame rate was called damaged, seconds after a packet that had left no gap."""
    assert gaps([*frames(0, 10), None, *frames(10, 60), *frames(200, 210)]) == ["1 damaged packets were skipped."]


def test_many_gaps_are_told_in_few_words() -> None:
    """A file of two gigabytes could make a million warnings."""
    notes = gaps([time_s for i in range(0, 3000, 3) for time_s in (i / 25, None)])

    assert len(notes) == 21
    assert notes[-1] == "Damaged: 979 more intervals after these."


@pytest.mark.parametrize(
    ("before", "words"),
    [([], "At the beginning, 4 packets in a row .* Download"), (frames(0, 10), r"After 0\.360 s, 4 packets .* end_s")],
)
def test_too_many_bad_packets_in_a_row_are_the_end(before: list[float | None], words: str) -> None:
    gaps([*before, None, None, None, 1.0, None, None, None], max_bad_packets=3)
    with pytest.raises(VideoUnreadable, match=words):
        gaps([*before, None, None, None, None], max_bad_packets=3)
