"""What may be asked of a job, and the codes of its errors."""

import math
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from jobs.api import SubmitBody
from jobs.schema import MAX_METADATA_BYTES, ErrorCode, JobOptions, JobRequest, Problem
from pipeline.moondream.prompts import Caption, Query

URL = "https://example.com/video.mp4"


def errors_of(**fields: Any) -> list[str]:
    """The fields that a request with these is refused for; "" is for several together."""
    with pytest.raises(ValidationError) as raised:
        JobRequest.model_validate({"video_url": URL, **fields})
    return [".".join(map(str, error["loc"])) for error in raised.value.errors()]


def test_a_request_needs_only_its_video() -> None:
    request = JobRequest.model_validate({"video_url": URL})

    assert (request.target_fps, request.question, request.metadata) == (1, "Describe this scene.", {})
    assert request.task() == Query("Describe this scene.", max_tokens=request.max_tokens)
    with pytest.raises(ValidationError):
        JobRequest.model_validate({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("target_fps", value) for value in (0, -1, 1000.1, math.nan, math.inf, "x", None, [1])),
        *(("start_s", value) for value in (-0.1, 1e10, math.nan, math.inf)),
        *(("end_s", value) for value in (0, -1, 1e300, math.nan, math.inf)),
        *(("max_frames", value) for value in (0, -1, 1.5, "many")),
        *(("max_tokens", value) for value in (0, -1, 0.5)),
        *(("temperature", value) for value in (-0.1, 2.1, math.nan)),
        *(("caption_length", value) for value in ("", "tiny", 1)),
        *(("question", value) for value in ("x" * 4001, 1, None)),
        *(("video_url", value) for value in ("", " ", "x" * 8193, None, 1)),
        ("webhook_url", "x" * 8193),
        ("metadata", "{"),
        ("no_such_field", 1),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(name: str, value: Any) -> None:
    assert errors_of(**{name: value}) == [name]


@pytest.mark.parametrize(
    "fields",
    [
        {"start_s": 5, "end_s": 5},
        {"start_s": 5, "end_s": 4},
        {"question": " "},
    ],
)
def test_fields_that_make_no_sense_together_are_refused(fields: dict[str, Any]) -> None:
    assert errors_of(**fields) == [""]


@pytest.mark.parametrize("name", ["question", "video_url", "webhook_url"])
def test_half_characters_are_refused(name: str) -> None:
    """JSON can spell them, as in "\\ud800"; nothing can store them."""
    assert len(errors_of(**{name: "https://example.com/\ud800"})) == 1


def test_metadata_may_have_4_kb() -> None:
    fits = {"text": "x" * (MAX_METADATA_BYTES - len('{"text":""}'))}

    assert JobRequest.model_validate({"video_url": URL, "metadata": fits}).metadata == fits
    assert errors_of(metadata={"text": fits["text"] + "x"}) == ["metadata"]


def test_metadata_counts_bytes_not_characters() -> None:
    assert errors_of(metadata={"text": "é" * (MAX_METADATA_BYTES // 2)}) == ["metadata"]


@pytest.mark.parametrize("value", [1 << 64, "\ud800", {"\ud800": 1}, object(), {1: 2}])
def test_metadata_that_json_cannot_hold_is_refused(value: Any) -> None:
    assert errors_of(metadata={"value": value}) == ["metadata"]


@pytest.mark.parametrize("value", ["[1]", "1", '"x"', "null", [1], 1, None])
def test_metadata_is_an_object(value: Any) -> None:
    assert errors_of(metadata=value) == ["metadata"]


def test_a_form_writes_metadata_as_json_and_numbers_as_texts() -> None:
    options = JobOptions.model_validate({"target_fps": "0.5", "max_frames": "3", "metadata": '{"a": [1, null]}'})

    assert (options.target_fps, options.max_frames, options.metadata) == (0.5, 3, {"a": [1, None]})


def test_spaces_around_texts_do_not_count() -> None:
    request = JobRequest.model_validate({"video_url": f" {URL} ", "question": " Who? "})

    assert (request.video_url, request.question) == (URL, "Who?")


def test_a_caption_length_makes_the_task_a_caption() -> None:
    task = JobRequest.model_validate({"video_url": URL, "caption_length": "long", "max_tokens": 7}).task()

    assert isinstance(task, Caption) and (task.length, task.max_tokens) == ("long", 7)


def test_what_the_body_sets_is_told_from_what_it_leaves_out() -> None:
    """So that the query is asked for the rest, and only for that."""
    body = SubmitBody.model_validate({"target_fps": 1, "video_url": None})

    assert body.model_dump(exclude_unset=True, exclude_none=True) == {"target_fps": 1}


def test_a_stored_request_is_read_back_as_it_was() -> None:
    request = JobRequest.model_validate({"video_url": URL, "end_s": 9, "metadata": {"a": [1.5, "é", None]}})

    assert JobRequest.model_validate(orjson.loads(orjson.dumps(request.model_dump()))) == request


def test_a_problems_code_is_one_of_the_enum() -> None:
    shown = {"title": "Not Found", "status": 404, "detail": "x"}

    assert Problem.model_validate({**shown, "code": "job_not_found"}).code == ErrorCode("job_not_found")
    with pytest.raises(ValidationError):
        Problem.model_validate({**shown, "code": "no_such_code"})
