"""The settings of the app: read once, in main(), from the environment (MOONREEL_NAME) and the command line (--name).

Below main(), everything gets explicit arguments. Each help text here is also the README's row and the --help line.
On a Hugging Face Space, other defaults hold: space_defaults().
Test: pytest tests/test_settings.py
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from pipeline.errors import InvalidOption
from pipeline.moondream.hub import MODEL_ID
from pipeline.moondream.scheduler import MAX_INSTANCES, MAX_SLOTS
from pipeline.sampling import DEFAULT_LIMITS, DecodeLimits

PREFIX = "MOONREEL_"
GB = 1_000_000_000
SPACE_STORAGE = Path("/data")  # where a Space has its storage by custom, if it has any that stays


def _setting(default: Any, help_text: str, **bounds: Any) -> Any:
    return Field(default, description=help_text, **bounds)


def _auto_or_up_to(most: int) -> PlainValidator:
    def check(value: object) -> Literal["auto"] | int:
        text = str(value)
        if text == "auto":
            return "auto"
        if text.isascii() and text.isdecimal() and 1 <= int(text) <= most:
            return int(text)
        raise PydanticCustomError(
            "auto_or_number", "Input should be auto, or a number from 1 to {most}", {"most": most}
        )

    return PlainValidator(check)


class Settings(BaseSettings):
    """Describe any video, frame by frame. Each option can also be set in the environment, as MOONREEL_NAME."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, cli_kebab_case=True, cli_implicit_flags=True
    )

    model: str = _setting(MODEL_ID, "hub id, checkpoint folder, or demo")
    revision: str | None = _setting(None, "revision of a hub id; without one, that which this version is tested with")
    device: str = _setting("auto", "auto (all GPUs, or what there is), cuda (the first), cuda:N, mps or cpu")
    dtype: str = _setting("auto", "auto, bfloat16, float16 or float32")
    instances: Annotated[Literal["auto"] | int, _auto_or_up_to(MAX_INSTANCES)] = _setting(
        "auto", "instances of the model on each device, or auto: as measured there, or as its memory allows"
    )
    slots: Annotated[Literal["auto"] | int, _auto_or_up_to(MAX_SLOTS)] = _setting(
        "auto", "frames that an instance has in flight together, or auto, likewise"
    )
    pool: Literal["local", "ray"] = _setting(
        "local", "instances in this process, or on the Ray cluster at RAY_ADDRESS (see requirements-ray.txt)"
    )
    gpus_per_instance: float = _setting(
        1, "on a Ray cluster, GPUs of an instance: with 0.5, two share one; 0 for a cluster without", ge=0, le=16
    )
    ray_jpeg: bool = _setting(False, "send frames to a Ray cluster as JPEG: less to carry, and answers may differ")

    data_dir: Path = _setting(Path("data"), "where jobs, videos and results are kept; one server at a time")
    host: str = _setting("127.0.0.1", "address to listen on; others than this computer need keys, or allow_anonymous")
    port: int = _setting(7860, "port to listen on; 0 for a free one", ge=0, le=65535)
    page: bool = _setting(True, "serve the page and gradio_client, too; without, the API alone, which starts faster")
    root_path: str = _setting(
        "", "path that a proxy in front puts before this server's: /video", pattern=r"^(/[A-Za-z0-9._~-]+)*$"
    )
    api_keys: str = _setting("", "keys that callers must send, each seeing its own jobs: name:KEY,name:KEY")
    admin_keys: str = _setting("", "keys that see all jobs and /metrics: name:KEY")
    allow_anonymous: bool = _setting(False, "serve other computers without keys: whoever knows a job's id may see it")
    allowed_hosts: str = _setting(
        "", "names that this server goes by: a.example,*.b.example; by itself it knows localhost"
    )
    cors_origins: str = _setting("", "origins whose pages may use the API: https://a.example,https://b.example")
    embed_origins: str = _setting("", "origins whose pages may show this one in a frame: https://a.example")
    rate_limit_per_minute: int = _setting(120, "jobs that one caller may submit, or change, in a minute", ge=1)
    anonymous_upload_bytes: int = _setting(
        10 * GB, "bytes that one address may upload in a day without a key, where keys are not asked for", ge=1
    )

    max_video_bytes: int = _setting(DEFAULT_LIMITS.max_video_bytes, "size of a video, uploaded or downloaded", ge=1)
    max_duration_s: float = _setting(
        DEFAULT_LIMITS.max_duration_s, "length of a video, or of its part before end_s", gt=0
    )
    max_frames: int = _setting(DEFAULT_LIMITS.max_frames, "frames to describe in a job", ge=1)
    max_tokens: int = _setting(256, "longest answer that a job may ask for, in tokens", ge=1, le=2048)
    max_queued_jobs: int = _setting(100, "jobs that may wait; more are answered 429", ge=1)
    max_queued_jobs_per_caller: int = _setting(100, "jobs of one caller that may wait; more are answered 429", ge=1)
    max_running_jobs: int = _setting(2, "jobs that run at a time", ge=1, le=64)
    max_failures_in_row: int = _setting(10, "frames that may fail one after the other before the job fails", ge=1)
    job_deadline_s: float | None = _setting(None, "longest run of a job, in seconds; without one, no limit", gt=0)
    batch_deadline_s: float = _setting(300, "longest time for one batch; an instance beyond it counts as stuck", gt=0)
    exit_when_stuck_s: float = _setting(
        60, "the server ends, for its supervisor to restart it, so long after that, or when no instance works", gt=0
    )

    answer_cache_bytes: int = _setting(
        GB, "most bytes of answers kept to be given again, for the same picture and question; 0 keeps none", ge=0
    )
    retention_days: float = _setting(30, "finished jobs are deleted after so many days", gt=0)
    retention_bytes: int = _setting(
        20 * GB, "most bytes kept in all; beyond, the oldest finished jobs are deleted", ge=1
    )
    min_free_bytes: int = _setting(GB // 2, "free bytes of the disk below which nothing is accepted", ge=0)

    allow_private_urls: str = _setting(
        "", "hosts of your own network that URLs may lead to: nas.local,10.0.0.5; * for all"
    )
    proxy_url: str | None = _setting(
        None, "HTTP proxy for downloads and webhooks; it keeps away from private addresses then"
    )
    webhook_secret: str | None = _setting(
        None, "signs webhooks: whsec_ and base64; without one, data_dir/webhook-secret"
    )
    log_format: Literal["text", "json"] = _setting("text", "log lines for people, or for machines")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Where values come from, the first one winning. The command line stands before all of these."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, space_defaults())

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(
            max_video_bytes=self.max_video_bytes, max_duration_s=self.max_duration_s, max_frames=self.max_frames
        )


def space_defaults() -> dict[str, Any]:
    """The defaults that differ on a Hugging Face Space: it is there for all who come, by the names in SPACE_HOST, and
    shown in a frame of huggingface.co. Elsewhere, nothing."""
    if os.environ.get("SYSTEM") != "spaces":
        return {}
    defaults: dict[str, Any] = {
        "host": "0.0.0.0",
        "allow_anonymous": True,
        "allowed_hosts": os.environ.get("SPACE_HOST", ""),  # with commas, where it has a domain of its own, too
        "embed_origins": "https://huggingface.co",
    }
    if SPACE_STORAGE.is_dir() and os.access(SPACE_STORAGE, os.W_OK):
        defaults["data_dir"] = SPACE_STORAGE / "moonreel"
    return defaults


def read_settings(arguments: list[str]) -> Settings:
    """Read the environment, and these command-line arguments above it. Raises InvalidOption naming what is wrong, and
    SystemExit for --help and for arguments that do not exist."""
    names = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    if strangers := sorted(name for name in os.environ if name.startswith(PREFIX) and name not in names):
        raise InvalidOption(f"There is no setting {strangers[0]}. See python app.py --help.")
    hyphened = [re.sub("^--[a-z_-]+", lambda name: name[0].replace("_", "-"), argument) for argument in arguments]
    try:
        return Settings(_cli_parse_args=hyphened, _cli_prog_name="python app.py")  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise InvalidOption(f"Settings: {wrong}. Set MOONREEL_NAME, or --name on the command line.") from None


def listed(text: str) -> frozenset[str]:
    """Read a setting of several words, with commas between."""
    return frozenset(word.strip() for word in text.split(",") if word.strip())
