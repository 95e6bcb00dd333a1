"""The queue between jobs and engines, without either."""

import numpy as np
import pytest

from pipeline.errors import QuestionTooLong
from pipeline.lanes import FrameQueue, Lane, PoolClosed, QueuedFrame
from pipeline.moondream.config import VisionConfig
from pipeline.moondream.image_crops import Crops, make_crops
from pipeline.moondream.prompts import Query

IMAGE = np.zeros((2, 2, 3), np.uint8)


@pytest.fixture
def queue() -> FrameQueue:
    return FrameQueue()


def lane_with(queue: FrameQueue, *keys: str, alone: str = "", weight: int = 1) -> Lane:
    lane = Lane(queue, lambda: 2, weight=weight)
    for key in keys:
        lane.submit(key, IMAGE, [Query()], is_alone=key == alone)
    return lane


def take(queue: FrameQueue, limit: int = 99) -> list[QueuedFrame]:
    taken = queue.take(limit)
    assert taken is not None
    return taken


def keys(frames: list[QueuedFrame]) -> list[object]:
    return [frame.key for frame in frames]


def test_lanes_take_turns(queue: FrameQueue) -> None:
    lane_with(queue, "a0", "a1", "a2", "a3")
    lane_with(queue, "b0", "b1")

    assert keys(take(queue, 3)) == ["a0", "b0", "a1"]
    lane_with(queue, "c0")
    assert queue.num_waiting == 4
    assert keys(take(queue)) == ["c0", "b1", "a2", "a3"]  # first those that have had nothing
    assert take(queue) == []


def test_a_lane_has_as_many_frames_at_its_turn_as_it_weighs(queue: FrameQueue) -> None:
    lane_with(queue, *(f"a{i}" for i in range(7)), weight=3)
    lane_with(queue, *(f"b{i}" for i in range(5)))
    lane_with(queue, "c0", weight=9)

    assert keys(take(queue)) == ["a0", "b0", "c0", "a1", "a2", "b1", "a3", "a4", "a5", "b2", "a6", "b3", "b4"]


def test_a_frame_that_failed_is_left_to_another_instance_while_one_works(queue: FrameQueue) -> None:
    lane_with(queue, "a0")
    for instance in (1, 2):
        queue.set_working(instance, True)
    (frame,) = queue.take(1, instance=1) or []
    assert queue.held_by(1) == [frame] and queue.held_by(2) == []
    frame.failed_in = 1
    queue.retry_alone(frame)

    assert queue.take(1, instance=1) == []
    queue.set_working(2, False)
    assert queue.take(1, instance=1) == [frame]
    queue.retry_alone(frame)
    queue.set_working(2, True)
    assert queue.take(1, instance=2) == [frame]


def test_a_lane_prepares_its_frames_and_leaves_to_the_engine_what_it_cannot(queue: FrameQueue) -> None:
    """In its own thread: the model goes on meanwhile. An engine tells what is wrong with a frame, as ever."""
    config = VisionConfig()
    lane = Lane(queue, lambda: 9, prepare=lambda image: make_crops(image, config))
    bad = np.zeros((2, 2), np.uint8)
    lane.submit("good", IMAGE, [Query()])
    lane.submit("bad", bad, [Query()])

    good, left = take(queue)
    assert isinstance(good.image, Crops) and left.image is bad


def test_the_first_frames_of_a_new_lane_go_before_those_of_older_ones(queue: FrameQueue) -> None:
    old = lane_with(queue, *(f"a{i}" for i in range(12)))
    take(queue, 6)
    lane_with(queue, *(f"b{i}" for i in range(8)))

    assert keys(take(queue, 5)) == ["b0", "a6", "b1", "a7", "b2"]
    lane_with(queue, "c0")
    assert keys(take(queue)) == ["a8", "c0", "a9", "b3", "a10", "b4", "a11", "b5", "b6", "b7"]
    assert old.num_taken == 12


def test_new_lanes_without_end_do_not_starve_an_old_one(queue: FrameQueue) -> None:
    lane_with(queue, *(f"a{i}" for i in range(9)))
    take(queue, 5)
    taken = []
    for number in range(8):
        lane_with(queue, f"b{number}")
        taken += keys(take(queue, 1))

    assert [key for key in taken if str(key).startswith("a")] == ["a5", "a6", "a7", "a8"]


def test_a_frame_to_be_alone_waits_for_the_others_and_holds_up_those_behind(queue: FrameQueue) -> None:
    lane_with(queue, "a0", "a1", "a2", alone="a1")
    lane_with(queue, "b0", "b1")

    before = take(queue)
    assert keys(before) == ["a0", "b0"]
    queue.finish(before[0])
    assert take(queue) == []
    queue.finish(before[1])
    (alone,) = take(queue)
    assert alone.key == "a1"
    assert take(queue) == []
    queue.finish(alone)
    assert keys(take(queue)) == ["b1", "a2"]


def test_frames_tried_again_are_alone_and_come_first(queue: FrameQueue) -> None:
    lane_with(queue, "a0", "a1", "a2")
    for frame in reversed(take(queue, 2)):
        queue.retry_alone(frame)

    order = []
    while taken := take(queue):
        order.append(keys(taken))
        for frame in taken:
            queue.finish(frame)
    assert order == [["a0"], ["a1"], ["a2"]]


def test_a_closed_lane_leaves_nothing_waiting_and_lets_the_next_be_alone(queue: FrameQueue) -> None:
    lane = lane_with(queue, "a0", "a1", "a2", alone="a1")
    lane_with(queue, "b0")
    (first,) = take(queue, 1)
    lane.close()

    assert first.is_canceled
    assert queue.num_waiting == 1
    assert keys(take(queue)) == ["b0"]
    queue.retry_alone(first)
    assert queue.num_waiting == 0


def test_what_is_delivered_after_a_cancel_is_nobodys(queue: FrameQueue) -> None:
    lane = lane_with(queue, "a0", "a1")
    refused, canceled = take(queue)
    lane.cancel("a1")
    lane.deliver(canceled, QuestionTooLong("Too long."))
    lane.deliver(refused, QuestionTooLong("Far too long."))

    assert lane.num_in_flight == 1 and lane.has_completed
    with pytest.raises(QuestionTooLong, match="Far"):
        lane.step()
    assert lane.num_in_flight == 0 and not lane.has_completed
    assert lane.step() == []


def test_a_key_may_be_used_again_after_a_cancel(queue: FrameQueue) -> None:
    lane = lane_with(queue, "a0")
    (old,) = take(queue)
    lane.cancel("a0")
    lane.submit("a0", IMAGE, [Query()])
    lane.deliver(old, QuestionTooLong("Of the old one."))

    assert not lane.has_completed


def test_a_closed_queue_takes_and_gives_nothing(queue: FrameQueue) -> None:
    lane = lane_with(queue, "a0")
    queue.close()

    assert queue.take(9, is_patient=True) is None
    with pytest.raises(PoolClosed):
        lane.submit("a1", IMAGE, [Query()])
    with pytest.raises(PoolClosed):
        lane.step()
