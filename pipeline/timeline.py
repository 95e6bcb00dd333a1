"""When frames are shown, and what damage leaves out: arithmetic on the timestamps that a decoder gives.

Knows nothing of files and decoders. Test: pytest tests/test_timeline.py
"""

import math
from collections.abc import Iterator

from pipeline.decoder_events import Note
from pipeline.errors import VideoUnreadable

MAX_JUMP_S = 3600  # a longer pause is a broken clock


class Clock:
    """The player's clock, in seconds since the container's start. It always advances: where a timestamp is missing,
    reset or absurd, time goes on by one frame; where one is repeated, by half of that, so that the next is right again.
    """

    def __init__(self, start_s: float | None, frame_s: float) -> None:
        """start_s is the container's own start, if it says; frame_s the time from one frame to the next."""
        self.frame_s = frame_s
        self.origin_s = math.inf if start_s is None else start_s
        self.last_s: float | None = None
        self._was_repeated = False

    def read(self, frame_time_s: float | None) -> float:
        """Tell when the next frame is shown, by its timestamp."""
        next_s = 0.0 if self.last_s is None else self.last_s + self.frame_s
        if frame_time_s is None:
            time_s = next_s
        elif self.last_s is None:
            self.origin_s = min(self.origin_s, frame_time_s)
            time_s = frame_time_s - self.origin_s
        else:
            time_s = frame_time_s - self.origin_s
            is_repeated = self.last_s - self.frame_s < time_s <= self.last_s and not self._was_repeated
            if is_repeated:
                time_s = self.last_s + self.frame_s / 2
            elif not self.last_s < time_s <= self.last_s + MAX_JUMP_S:
                self.origin_s = frame_time_s - next_s
                time_s = next_s
            self._was_repeated = is_repeated
        self.last_s = time_s
        return time_s


class Damage:
    """What packets that do not decode leave out."""

    MAX_GAPS = 20  # to tell one by one
    NUM_GOOD = 32  # frames after which a bad packet has left no gap; more than a decoder holds back

    def __init__(self, max_bad_packets: int) -> None:
        self._max_bad_packets = max_bad_packets
        self._num_bad_in_a_row = self._num_unexplained = self._num_good = self._num_gaps = 0

    def count_bad_packet(self, last_s: float | None) -> None:
        """Raises VideoUnreadable if there are too many."""
        self._num_bad_in_a_row, self._num_unexplained = self._num_bad_in_a_row + 1, self._num_unexplained + 1
        self._num_good = 0
        if self._num_bad_in_a_row > self._max_bad_packets:
            where, advice = (
                ("At the beginning", "Download or export it again.")
                if last_s is None
                else (f"After {last_s:.3f} s", "Ask for the part before, with end_s.")
            )
            raise VideoUnreadable(
                f"{where}, {self._num_bad_in_a_row:,} packets in a row are damaged; {self._max_bad_packets:,} "
                f"are the most that are skipped (limit max_bad_packets). {advice}"
            )

    def note_gap(self, last_s: float, time_s: float, frame_s: float) -> Iterator[Note]:
        """Note what is missing before the frame at time_s, if anything is."""
        self._num_bad_in_a_row, self._num_good = 0, self._num_good + 1
        # A bad packet shows before the frames ahead of it do: one of the next gaps is the one it leaves.
        if self._num_unexplained and self._num_good <= self.NUM_GOOD and time_s - last_s > 1.5 * frame_s:
            self._num_unexplained, self._num_gaps = 0, self._num_gaps + 1
            if self._num_gaps <= self.MAX_GAPS:
                yield Note(f"Damaged: nothing decodes between {last_s:.3f} s and {time_s:.3f} s.")

    def note_rest(self, is_cut: bool) -> Iterator[Note]:
        """At the end of the video, which explains by itself what is bad last if it is cut."""
        if self._num_gaps > self.MAX_GAPS:
            yield Note(f"Damaged: {self._num_gaps - self.MAX_GAPS} more intervals after these.")
        elif self._num_unexplained and not self._num_gaps and not is_cut:
            yield Note(f"{self._num_unexplained} damaged packets were skipped.")
