"""check and repair of a data directory that lost its records, and what a server says of one."""

import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from job_house import House

from jobs.job_store import JobStore
from jobs.mend import RecordsLost
from tests.attacks import ROOT


def command(action: str, folder: Path) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "-m", "jobs.store", action, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("is_empty", [True, False])
def test_lost_records_are_damage_and_repair_keeps_the_videos(tmp_path: Path, is_empty: bool) -> None:
    """Bug: beside an empty or missing jobs.jsonl, a server started, and deleted the uploads of all jobs."""
    house = House(tmp_path / "data")
    job_id = house.add(video=b"video")
    house.store.close()
    records = house.folder / "jobs.jsonl"
    records.write_bytes(b"") if is_empty else records.unlink()

    with pytest.raises(RecordsLost, match="Restore the file from a backup"):
        JobStore(house.folder)
    code, said = command("check", house.folder)
    assert code == 1 and f"no record of {job_id}" in said
    assert command("repair", house.folder)[0] == 0
    assert command("check", house.folder)[0] != 1
    with closing(JobStore(house.folder)) as store:
        store.recover()
    assert (house.folder / "orphans" / job_id / "video").read_bytes() == b"video"


def test_a_job_whose_line_is_moved_aside_keeps_its_video(tmp_path: Path) -> None:
    """Bug: a repair moved the line of an upload aside, and the next start deleted its video."""
    house = House(tmp_path / "data")
    job_ids = [house.add(video=b"video %d" % number) for number in range(2)]
    house.store.close()
    records = house.folder / "jobs.jsonl"
    data = records.read_bytes()
    records.write_bytes(data[:-20] + b"?" + data[-19:])

    assert command("check", house.folder)[0] == 1
    assert command("repair", house.folder)[0] == 0
    with closing(JobStore(house.folder)) as store:
        store.recover()
        assert store.get(job_ids[0])["status"] == "submitted"
        assert store.files.video(job_ids[0]).read_bytes() == b"video 0"
    assert (house.folder / "orphans" / job_ids[1] / "video").read_bytes() == b"video 1"
    assert stat.S_IMODE(records.stat().st_mode) == 0o600
