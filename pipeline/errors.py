"""Every error a caller can see. `code` is part of the API and never changes; the message is for people.

* DescriberError
  + InputError            the request can be fixed            (HTTP 400, 413, 415 or 422; exit code 2)
    - UnsupportedUrl, DownloadFailed, VideoTooLarge
    - VideoNotFound, VideoUnreadable, DecoderStopped, NoFrames, ImageUnreadable, QuestionTooLong, InvalidOption
  + ModelError            this host needs attention           (job error; /api/ready says 503; exit code 3)
    - WeightsNotFound, WeightsMismatch, DeviceUnavailable, OutOfMemory, NotANumber
  + Canceled              somebody asked to stop

HTTP numbers and exit codes live where they are used; they are shown here for the reader only.
"""

from typing import ClassVar


class DescriberError(Exception):
    """The root of the tree. The message says what happened and what to try."""

    code: ClassVar[str] = "error"


class InputError(DescriberError):
    """The request can be fixed by the one who made it."""

    code = "invalid_input"


class UnsupportedUrl(InputError):
    """A URL may not be followed, by its text or by where it leads. The message begins with "Invalid video URL"."""

    code = "invalid_video_url"


class DownloadFailed(InputError):
    """The URL may be followed, but no video came of it."""

    code = "download_failed"


class VideoTooLarge(InputError):
    """The video has more than this host takes: bytes, pixels, seconds or frames. The message names the limit."""

    code = "too_large"


class VideoNotFound(InputError):
    """There is no such file."""

    code = "video_not_found"


class VideoUnreadable(InputError):
    """The file is there, but it is no video that this host can decode."""

    code = "not_a_video"


class DecoderStopped(InputError):
    """The decoder's process ended in the middle of the video: it crashed, or took too much. The message says where."""

    code = "decoder_stopped"


class NoFrames(InputError):
    """The video opens, but no frame of the asked window decodes."""

    code = "no_frames"


class ImageUnreadable(InputError):
    """An image is not RGB uint8 (H, W, 3), or is empty."""

    code = "image_unreadable"


class QuestionTooLong(InputError):
    """Image, prompt and answer do not fit the model's context together."""

    code = "question_too_long"


class InvalidOption(InputError):
    """An option is outside its range."""

    code = "invalid_field"


class ModelError(DescriberError):
    """The model cannot answer on this host until somebody acts."""

    code = "model_error"


class WeightsNotFound(ModelError):
    """The checkpoint cannot be had: no network, unknown id, gated, or not a checkpoint."""

    code = "weights_not_found"


class WeightsMismatch(ModelError):
    """The checkpoint's keys or shapes are not those its config asks for."""

    code = "weights_mismatch"


class DeviceUnavailable(ModelError):
    """The device asked for is not on this host."""

    code = "device_unavailable"


class NotANumber(ModelError):
    """The model's numbers overflow for this image, in this number format."""

    code = "not_a_number"


class OutOfMemory(ModelError):
    """One frame alone does not fit the device's memory."""

    code = "out_of_memory"


class Canceled(DescriberError):
    """Somebody asked to stop; nothing is wrong."""

    code = "canceled"
