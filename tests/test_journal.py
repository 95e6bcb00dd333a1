"""The file of changes: what is acknowledged stays, what is torn goes, what is damaged is named."""

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.journal import Change, Journal, JournalDamaged, damaged_lines, decode, encode, repair

ROOT = Path(__file__).parent.parent
CHANGES = [Change("jobs", {f"job_{i}": {"text": f"número {i}", "n": i}}) for i in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of CHANGES."""
    path = tmp_path / "jobs.jsonl"
    journal = Journal(path)
    for change in CHANGES:
        journal.append(change)
    journal.close()
    return path


def read(path: Path) -> list[Change]:
    journal = Journal(path)
    try:
        return list(journal.read())
    finally:
        journal.close()


def test_changes_come_back_in_order(path: Path) -> None:
    assert read(path) == CHANGES
    assert read(path) == CHANGES


def test_a_line_is_plain_json_with_a_checksum() -> None:
    line = encode(Change("jobs", {"a": {"n": 1}, "b": None}))

    assert line == b'["jobs",{"a":{"n":1},"b":null},"2c38db4c"]\n'
    assert decode(line) == Change("jobs", {"a": {"n": 1}, "b": None})


def test_cut_anywhere_it_keeps_every_whole_line_and_takes_new_ones(path: Path) -> None:
    data = path.read_bytes()
    ends = [0]
    while ends[-1] < len(data):
        ends.append(data.index(b"\n", ends[-1]) + 1)
    torn = [b'["jobs",{}', '["jobs",{"job_7":{"text":"né'.encode()[:-1]]
    for size in range(len(data) + 1):
        for tail in (b"", *(torn if size in ends else ())):
            path.write_bytes(data[:size] + tail)
            num_whole = sum(end <= size for end in ends[1:])
            journal = Journal(path)
            assert list(journal.read()) == CHANGES[:num_whole]
            journal.append(CHANGES[0])
            journal.close()
            assert read(path) == [*CHANGES[:num_whole], CHANGES[0]]
        path.write_bytes(data[:size] + b"\0" * 7)
        with pytest.raises(JournalDamaged):
            read(path)


def test_a_torn_line_is_cut_with_a_word_in_the_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(path.read_bytes()[:-1])

    assert read(path) == CHANGES[:-1]
    assert "cut 56 bytes of a line that was never finished (kept in jobs.jsonl.cut)" in caplog.text


@pytest.mark.parametrize("line_number", [1, 3, 4])
@pytest.mark.parametrize("bit", [0, 100, 200, -20])
def test_one_flipped_bit_before_the_last_line_is_named_and_nothing_is_changed(
    path: Path, line_number: int, bit: int
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[line_number - 1])
    damaged[bit // 8] ^= 1 << bit % 8
    lines[line_number - 1] = bytes(damaged)
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()

    with pytest.raises(JournalDamaged, match=f"damaged in line {line_number}, at byte .*python -m jobs.store repair"):
        read(path)
    assert path.read_bytes() == before
    assert damaged_lines(path) == [line_number]


def test_any_flipped_bit_of_the_last_line_is_damage(path: Path) -> None:
    """Bug: a last line that did not check was taken for a torn one, and acknowledged uploads were gone with it."""
    data = path.read_bytes()
    begin = data.rindex(b"\n", 0, -1)  # with the newline before
    for bit in range(8 * begin, 8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(JournalDamaged, match=r"damaged in line [456]"):
            read(path)
        assert path.read_bytes() == flipped and damaged_lines(path)
    assert not path.with_name("jobs.jsonl.cut").exists()


@pytest.mark.parametrize("kept", [-1, -5, -56, -57, -80, -171, 0], ids=str)
@pytest.mark.parametrize("num_more", [0, 512])
def test_zeros_at_the_end_are_damage(path: Path, kept: int, num_more: int) -> None:
    """Bug: zeros over the last lines were cut off like a torn line, with the acknowledged lines below them."""
    data = path.read_bytes()
    path.write_bytes(data[: kept or None] + b"\0" * (-kept + num_more))
    if kept or num_more:
        with pytest.raises(JournalDamaged):
            read(path)
        assert len(damaged_lines(path)) == 1 == len(repair(path))
    assert read(path) == CHANGES[: path.read_bytes().count(b"\n")]


def test_a_torn_line_behind_a_flipped_newline_is_damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b'*["jobs",{"job_7')

    with pytest.raises(JournalDamaged, match="damaged in line 5"):
        read(path)


def test_cut_lines_are_kept_beside_and_do_not_grow_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.journal.MAX_CUT_BYTES", 100)
    cut, torn = path.with_name("jobs.jsonl.cut"), b'["jobs",{"job_9":{"text":"never acknow'
    sizes = []
    for _ in range(6):
        with path.open("ab") as file:
            file.write(torn)
        assert read(path) == CHANGES
        assert cut.read_bytes().endswith(torn + b"\n")
        sizes.append(cut.stat().st_size)

    assert sizes == [39, 78, 117, 39, 78, 117]
    assert stat.S_IMODE(cut.stat().st_mode) == 0o600


def test_a_torn_line_that_cannot_be_kept_does_not_keep_a_server_from_starting(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.with_name("jobs.jsonl.cut").mkdir()
    path.write_bytes(path.read_bytes()[:-1])

    assert read(path) == CHANGES[:-1]
    assert "never finished (not kept: Is a directory)" in caplog.text


def test_repair_moves_damaged_lines_aside(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1], lines[3] = b"damage\n", b'["jobs",{},"00000000"]\n'
    path.write_bytes(b"".join(lines))

    assert repair(path) == [2, 4]
    assert path.with_name("jobs.jsonl.damaged-1").read_bytes() == lines[1] + lines[3]
    assert read(path) == [CHANGES[0], CHANGES[2], CHANGES[4]]
    assert repair(path) == []


def test_repair_keeps_the_mode_and_what_was_moved_aside_before(path: Path) -> None:
    """Bug: a repair left a file of mode 0644; and a second one wrote over what an earlier one had moved aside, if an
    operator had deleted one of these files."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.with_name("jobs.jsonl.damaged-2").write_bytes(b"earlier")
    path.chmod(0o640)
    for damaged in (b"first\n", b"second\n"):
        path.write_bytes(lines[0] + damaged + lines[1])
        assert repair(path) == [2]

    found = {name: path.with_name(f"jobs.jsonl.damaged-{name}") for name in "123"}
    assert [found[name].read_bytes() for name in "123"] == [b"first\n", b"earlier", b"second\n"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in (path, found["1"], found["3"])} == {0o640}


def test_repair_gives_the_files_to_the_owner_of_the_damaged_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: repaired by root, the file belonged to root, and the server's user could not open it."""
    given: list[tuple[str, int, int]] = []
    monkeypatch.setattr("jobs.journal.os.chown", lambda part, uid, gid: given.append((part.name, uid, gid)))
    path.write_bytes(path.read_bytes() + b"damage\n")
    of = path.stat()
    repair(path)

    assert given == [(f"jobs.jsonl{end}.part", of.st_uid, of.st_gid) for end in (".damaged-1", "")]


def test_repair_without_room_changes_nothing(path: Path) -> None:
    """A limit of the file size stands for the disk; the damaged line fits, the repaired file does not."""
    damaged = path.read_bytes() * 20 + b"damage\n"
    path.write_bytes(damaged)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            repair(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert [file.name for file in path.parent.iterdir()] == ["jobs.jsonl"]
    assert path.read_bytes() == damaged
    assert repair(path) == [101]


def test_rewriting_replaces_all_at_once_and_goes_on(path: Path) -> None:
    journal = Journal(path)
    assert len(list(journal.read())) == 5
    journal.rewrite(CHANGES[:2])
    journal.append(CHANGES[4])
    journal.close()

    assert read(path) == [CHANGES[0], CHANGES[1], CHANGES[4]]
    assert [file.name for file in path.parent.iterdir()] == ["jobs.jsonl"]


def test_a_full_disk_refuses_the_write_and_keeps_everything(tmp_path: Path) -> None:
    """A limit of the file size stands for the disk; it is part of the write that does not fit."""
    journal, written = Journal(tmp_path / "jobs.jsonl"), 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            while written < 100:
                journal.append(CHANGES[0])
                written += 1
        with pytest.raises(OSError):
            journal.append(CHANGES[0])
        with pytest.raises(OSError):
            journal.rewrite(CHANGES * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal.append(CHANGES[1])  # there is room again
    journal.close()

    assert written > 5
    assert read(tmp_path / "jobs.jsonl") == [CHANGES[0]] * written + [CHANGES[1]]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_json_cannot_hold_is_refused_before_it_is_written(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(TypeError):
        journal.append(Change("jobs", {"a": {"x": object()}}))
    journal.close()

    assert read(path) == CHANGES


@pytest.mark.parametrize("after", [1, 17, 60])
def test_killed_at_any_moment_it_keeps_what_was_acknowledged(tmp_path: Path, after: int) -> None:
    code = (
        "import sys; from pathlib import Path; from jobs.journal import *\n"
        "journal = Journal(Path(sys.argv[1])); n = 0\n"
        "while True:\n"
        "    journal.append(Change('t', {str(n): {'n': n, 'text': 'x' * (n % 3000)}})); print(n, flush=True); n += 1\n"
        "    if n % 25 == 0: journal.rewrite([Change('t', {str(i): {'n': i}}) for i in range(n)])"
    )
    path = tmp_path / "t.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    acknowledged = [int(process.stdout.readline()) for _ in range(after)]
    process.kill()
    acknowledged += [int(line) for line in process.stdout.read().splitlines() if line]
    process.communicate()

    found = [document["n"] for change in read(path) for document in change.documents.values() if document]
    assert found[: len(acknowledged)] == acknowledged
    assert len(found) <= len(acknowledged) + 1


def test_the_file_is_for_its_owner_only(path: Path) -> None:
    assert os.stat(path).st_mode & 0o077 == 0
