"""Who sits in which slot: names only, no tensors. Run: pytest tests/test_scheduler.py"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.moondream.scheduler import Admission, Scheduler

ROOT = Path(__file__).parent.parent


def scheduler(num_slots: int, **images: list[str]) -> Scheduler[str]:
    """A scheduler where the items of these images wait, in this order."""
    made: Scheduler[str] = Scheduler(num_slots)
    for image, items in images.items():
        made.add(image, items)
    return made


def placed(admissions: list[Admission[str]]) -> list[tuple[int, str, str]]:
    return [(a.slot, a.item, a.prefix) for a in admissions]


def test_scheduling_needs_no_torch() -> None:
    program = "import sys, pipeline.moondream.scheduler; print('torch' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert said.stdout.strip() == "False"


# --- slots


def test_the_first_come_sit_in_the_lowest_slots_and_the_rest_wait() -> None:
    s = scheduler(2, a=["a1"], b=["b1"], c=["c1"])

    assert placed(s.admit()) == [(0, "a1", "new"), (1, "b1", "new")]
    assert (s.num_waiting, s.busy) == (1, {0: "a1", 1: "b1"})
    assert s.admit() == []


def test_a_freed_slot_goes_to_the_next_in_line() -> None:
    s = scheduler(2, a=["a1"], b=["b1"], c=["c1"], d=["d1"])
    s.admit()

    s.finish([1])

    assert placed(s.admit()) == [(1, "c1", "new")]


def test_an_urgent_one_goes_before_the_others_and_those_may_be_held_back() -> None:
    s = scheduler(2, a=["a1"], b=["b1"], c=["c1"])
    s.add("u", ["u1"], is_urgent=True)
    s.add("v", ["v1"], is_urgent=True)
    assert s.next_images(3) == ["u", "v", "a"]

    s.drop("v")

    assert placed(s.admit(only_urgent=True)) == [(0, "u1", "new")]
    assert (s.admit(only_urgent=True), s.num_waiting) == ([], 3)
    assert placed(s.admit()) == [(1, "a1", "new")]


def test_an_urgent_image_may_take_the_prefix_of_one_whose_items_wait() -> None:
    s = scheduler(1, a=["a1", "a2"])
    s.admit()
    s.add("u", ["u1"], is_urgent=True)
    s.finish([0])
    assert placed(s.admit()) == [(0, "u1", "new")]
    s.finish([0])

    assert placed(s.admit()) == [(0, "a2", "new")]


def test_several_freed_slots_are_filled_from_the_lowest() -> None:
    s = scheduler(3, a=["a1"], b=["b1"], c=["c1"], d=["d1"], e=["e1"])
    s.admit()

    s.finish([2, 0])

    assert placed(s.admit()) == [(0, "d1", "new"), (2, "e1", "new")]


def test_a_step_covers_up_to_the_last_busy_slot() -> None:
    s = scheduler(4, a=["a1"], b=["b1"], c=["c1"])
    assert s.num_active_slots == 0

    s.admit()
    covered = [s.num_active_slots]
    for slot in (1, 2, 0):
        s.finish([slot])
        covered.append(s.num_active_slots)

    assert covered == [3, 3, 1, 0]


def test_images_worth_encoding_are_the_next_in_line_each_once() -> None:
    s = scheduler(1, a=["a1", "a2"], b=["b1"], c=["c1"])

    assert s.next_images(2) == ["a", "b"]
    assert s.next_images(9) == ["a", "b", "c"]
    s.admit()
    assert s.next_images(1) == ["a"]  # a2 still waits


# --- prefixes


def test_questions_about_one_image_compute_its_prefix_once_and_copy_it() -> None:
    s = scheduler(3, a=["a1", "a2", "a3"])

    admissions = s.admit()

    assert placed(admissions) == [(0, "a1", "new"), (1, "a2", "copy"), (2, "a3", "copy")]
    assert [a.source_slot for a in admissions] == [None, 0, 0]


def test_the_next_question_finds_the_prefix_in_the_slot_that_was_freed() -> None:
    s = scheduler(2, a=["a1", "a2", "a3"])
    s.admit()

    s.finish([1])

    assert placed(s.admit()) == [(1, "a3", "kept")]


def test_a_slot_that_holds_the_prefix_is_taken_before_a_lower_one() -> None:
    s = scheduler(2, b=["b1"], a=["a1", "a2"])
    s.admit()

    s.finish([0, 1])

    assert placed(s.admit()) == [(1, "a2", "kept")]


def test_a_prefix_is_copied_from_a_slot_that_is_busy() -> None:
    s = scheduler(2, b=["b1"], a=["a1", "a2"])
    s.admit()

    s.finish([0])

    assert s.admit() == [Admission(0, "a2", "a", "copy", source_slot=1)]


def test_another_image_writes_over_a_prefix_that_nobody_waits_for() -> None:
    s = scheduler(1, a=["a1"], b=["b1"])
    s.admit()
    s.finish([0])
    s.admit()
    s.finish([0])

    s.add("a", ["a2"])

    assert placed(s.admit()) == [(0, "a2", "new")]


# --- drop


def test_dropping_an_image_frees_its_slots_and_leaves_the_line() -> None:
    s = scheduler(2, a=["a1", "a2", "a3"], b=["b1"])
    s.admit()

    assert sorted(s.drop("a")) == ["a1", "a2", "a3"]
    assert (s.busy, s.num_waiting) == ({}, 1)
    assert placed(s.admit()) == [(0, "b1", "new")]


def test_a_dropped_images_prefix_is_not_used_again() -> None:
    s = scheduler(1, a=["a1"])
    s.admit()
    s.drop("a")

    s.add("a", ["another picture"])

    assert placed(s.admit()) == [(0, "another picture", "new")]


def test_dropping_what_is_not_there_changes_nothing() -> None:
    s = scheduler(1, a=["a1"])
    s.admit()

    assert s.drop("b") == []
    assert s.busy == {0: "a1"}


# --- anything goes


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_rules_hold(seed: int) -> None:
    """Random traffic: nobody shares a slot, all are admitted once and in order, prefixes are computed once and are
    where they are said to be."""
    rng = random.Random(seed)
    num_slots = rng.randint(1, 6)
    s: Scheduler[tuple[int, int]] = Scheduler(num_slots)
    content: dict[int, int] = {}  # slot -> the image whose prefix a real cache would hold
    waiting: list[tuple[int, int]] = []
    computed: set[int] = set()
    num_admitted, num_images = 0, 0

    for _ in range(300):
        if rng.random() < 0.4:
            items = [(num_images, k) for k in range(rng.randint(1, 4))]
            s.add(num_images, items)
            waiting += items
            num_images += 1
        busy_before = dict(s.busy)
        admissions = s.admit()
        assert [a.item for a in admissions] == waiting[: len(admissions)]
        del waiting[: len(admissions)]
        num_admitted += len(admissions)
        assert len({a.slot for a in admissions}) == len(admissions)
        assert not busy_before.keys() & {a.slot for a in admissions}
        assert s.busy == {**busy_before, **{a.slot: a.item for a in admissions}}
        assert all(0 <= slot < num_slots for slot in s.busy)
        assert len(s.busy) == num_slots or not waiting
        kept_before = {a.slot: content.get(a.slot) for a in admissions if a.prefix == "kept"}
        for a in admissions:  # the order of the engine: compute first, then copy
            if a.prefix == "new":
                assert a.item[0] not in computed
                computed.add(a.item[0])
                content[a.slot] = a.item[0]
        for a in admissions:
            if a.source_slot is not None:
                content[a.slot] = content[a.source_slot]
            assert content[a.slot] == a.image == a.item[0]
            assert a.prefix != "kept" or kept_before[a.slot] == a.image
        s.finish([slot for slot in list(s.busy) if rng.random() < 0.3])
        if num_images and rng.random() < 0.05:
            image = rng.randrange(num_images)
            gone = s.drop(image)
            assert all(item[0] == image for item in gone)
            waiting = [item for item in waiting if item[0] != image]
        assert s.num_waiting == len(waiting)
        assert s.num_active_slots == max(s.busy, default=-1) + 1

    assert num_admitted > 50
