"""Every error a caller can see. `code` is part of the API and never changes; the message is for people.

* DescriberError
  + InputError            the request can be fixed            (HTTP 400, 413, 415 or 422; exit code 2)
    - UnsupportedUrl, DownloadFailed, VideoTooLarge
    - VideoNotFound, VideoUnreadable, DecoderStopped, NoFrames, ImageUnreadable, QuestionTooLong, InvalidOption
  + ModelError            this host needs attention           (job error; /api/ready says 503; exit code 3)
    - WeightsNotFound, WeightsMismatch, DeviceUnavailable, OutOfMemory, NotANumber, NotReady
  + JobError              a job cannot be had, changed or finished (HTTP 404, 409, 422, 429 or 507; or the job's error)
    - JobNotFound, FrameNotFound, VideoNotKept, JobRunning, JobFinished, NotRetryable
    - QueueFull, RateLimited, StorageFull, IdempotencyMismatch, ResultsDamaged
    - DeadlineExceeded, TooManyFailures, NothingDescribed, ModelChanged, ServerDied, UnexpectedFailure
  + AccessError           the one who asks may not            (HTTP 400, 401, 403 or 503)
    - Unauthorized, CrossSite, ForeignHost, ServerBusy
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


class NotReady(ModelError):
    """Nothing can be answered now: the model is being loaded, or the server stops. The message says which."""

    code = "not_ready"


class JobError(DescriberError):
    """A job cannot be had, changed or finished."""

    code = "job_error"


class JobNotFound(JobError):
    """There is no such job, or it is somebody else's. The message begins with "Job ID not found in store"."""

    code = "job_not_found"


class FrameNotFound(JobError):
    """The job has no such frame, or no picture of it."""

    code = "frame_not_found"


class VideoNotKept(JobError):
    """The job's video is not here: not yet, or never."""

    code = "video_not_kept"


class JobRunning(JobError):
    """The job is queued or running, so this has to wait."""

    code = "job_running"


class JobFinished(JobError):
    """The job has ended, so there is nothing to cancel."""

    code = "job_finished"


class NotRetryable(JobError):
    """Only failed and canceled jobs can be tried again."""

    code = "not_retryable"


class QueueFull(JobError):
    """As many jobs wait as may."""

    code = "queue_full"
    retry_after_s = 30.0


class RateLimited(JobError):
    """Too many requests in too short a time."""

    code = "rate_limited"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageFull(JobError):
    """This host has no room for more."""

    code = "storage_full"


class ResultsDamaged(JobError):
    """The stored results of a job do not check. Nothing is deleted; the operator decides."""

    code = "results_damaged"


class IdempotencyMismatch(JobError):
    """An Idempotency-Key came again with another request."""

    code = "idempotency_mismatch"


class DeadlineExceeded(JobError):
    """The job took longer than its deadline."""

    code = "deadline_exceeded"


class TooManyFailures(JobError):
    """Too many frames in a row failed. The message tells the first cause."""

    code = "too_many_failures"


class NothingDescribed(JobError):
    """Every frame of the video failed. The message tells the first cause."""

    code = "nothing_described"


class ModelChanged(JobError):
    """The job was begun with another model than this server runs."""

    code = "model_changed"


class ServerDied(JobError):
    """The server died several times over this job."""

    code = "server_died"


class UnexpectedFailure(JobError):
    """Something failed that should not. The server's log tells what."""

    code = "internal_error"


class AccessError(DescriberError):
    """The one who asks may not."""

    code = "access_error"


class Unauthorized(AccessError):
    """No valid key came along."""

    code = "unauthorized"


class CrossSite(AccessError):
    """A page of another site sent this request."""

    code = "cross_site"


class ForeignHost(AccessError):
    """The request names a host that is not this server."""

    code = "foreign_host"


class ServerBusy(AccessError):
    """The server answers as many requests as it can already."""

    code = "server_busy"


class Canceled(DescriberError):
    """Somebody asked to stop; nothing is wrong."""

    code = "canceled"
