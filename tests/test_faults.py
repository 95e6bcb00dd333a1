"""Some of the faults, that one which does not hold is named, and the row of each in the README.

All: python -m tests.faults"""

import json
import sys
from pathlib import Path

import faults
import faults_disk
import faults_net
import pytest
from serving import ROOT


@pytest.mark.parametrize("name", ["decoder_child_killed", "store_damaged"])
def test_a_fault_loses_nothing(name: str, tmp_path: Path) -> None:
    outcome = faults.FAULTS[name](tmp_path)

    assert {"decoder_child_killed": "decoder_stopped", "store_damaged": "damaged in line"}[name] in outcome.seen


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["faults", *arguments])
    return faults.main()


def test_a_fault_that_does_not_hold_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(folder: Path) -> faults.Outcome:
        raise AssertionError("a result has changed")

    monkeypatch.setitem(faults.FAULTS, "bad", bad)
    monkeypatch.setitem(faults.FAULTS, "good", lambda folder: faults.Outcome("Nothing.", "Nothing to do."))

    assert run(monkeypatch, "bad", "good") == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| good | Nothing. | Nothing to do. |"
    assert json.loads(printed[-1]) == {
        "faults": 2,
        "held": 1,
        "bad": "AssertionError: a result has changed",
        "good": "held",
    }
    assert run(monkeypatch, "good") == 0


def test_a_fault_that_this_user_cannot_put_in_is_told_from_one_that_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mounts(folder: Path) -> faults.Outcome:
        raise faults.NeedsRoot("mount: must be superuser")

    monkeypatch.setitem(faults.FAULTS, "mounts", mounts)

    assert run(monkeypatch, "mounts") == 2
    assert "mounts: needs root: mount: must be superuser" in capsys.readouterr().err


def test_every_fault_has_its_row_in_the_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--list") == 0
    names = capsys.readouterr().out.split()
    assert names == list(faults_disk.FAULTS) == list(faults_net.FAULTS) and len(names) == 15
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in names if f"| {name.replace('_', ' ')} |" not in readme] == []
