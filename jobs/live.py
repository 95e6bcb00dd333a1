"""What is known of a running job beyond its record: how fast it goes. Lost with the process, and never needed again."""

import time
from dataclasses import dataclass, field


@dataclass
class Live:
    """Written by the job's thread, read by all. Times are of the monotonic clock, in seconds."""

    bytes_downloaded: int | None = None
    num_bytes_expected: int | None = None
    describing_since_s: float | None = None
    num_frames_before: int = 0  # stored by earlier starts
    moved_at_s: float = field(default_factory=time.monotonic)  # the last sign of life

    def moved(self) -> None:
        self.moved_at_s = time.monotonic()

    def frames_per_second(self, num_frames: int) -> float | None:
        """The rate of this start; None before its first frame."""
        if self.describing_since_s is None or num_frames <= self.num_frames_before:
            return None
        return (num_frames - self.num_frames_before) / max(1e-3, time.monotonic() - self.describing_since_s)

    @property
    def download_percent(self) -> float:
        if not self.bytes_downloaded or not self.num_bytes_expected:
            return 0.0
        return min(100.0, 100 * self.bytes_downloaded / self.num_bytes_expected)
