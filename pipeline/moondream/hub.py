"""Where a checkpoint's files are: the demo's folder, a local folder, or the hub's cache, filled if need be.

Downloads resume after a broken connection, keep the files that are complete, show a progress bar (or report to
on_progress, without one), and honour HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, all by huggingface_hub (which starts a file
anew if the process itself ended). Nothing but weights, config and tokenizer is fetched, and no code of a repository is
ever run. Test: pytest tests/test_hub.py tests/test_hub_progress.py
"""

import contextlib
import errno
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub import utils as hub_utils

from pipeline.errors import WeightsNotFound

MODEL_ID = "vikhyatk/moondream2"
REVISION = "2025-06-21"
TOKENIZER_ID = "moondream/starmie-v1"
DEMO = "demo"

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "checkpoint"
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
PART_AGE_S = 600  # of what is left of a download
ANEW = "Download the checkpoint again"
LARGE_BYTES = 10 * 2**20  # config and tokenizer, begun first, are not worth a word: 100% of them would mislead
BYTES_BAR = "huggingface_hub.snapshot_download"  # the name of the bar that counts bytes on the disk, of all files


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint is: the bytes that are downloaded, or loaded. total_bytes is None where the hub does not
    tell, and grows in the first moments of a download, as its files are begun."""

    stage: Literal["downloaded", "loaded"]
    num_bytes: int
    total_bytes: int | None


OnProgress = Callable[[Progress], None]  # may be called from any thread


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint. `model` and `revision` name it in results."""

    model: str
    revision: str | None
    config: Path
    weights: tuple[Path, ...]
    tokenizer: Path | None


def find_checkpoint(model: str, revision: str | None = None, on_progress: OnProgress | None = None) -> CheckpointFiles:
    """Find "demo", a local folder, or a hub id at a revision (default: REVISION for MODEL_ID, else main), downloading
    what is missing. Raises WeightsNotFound, saying why and what to do."""
    if model == DEMO:
        return _files_in(DEMO_FOLDER, DEMO, None)
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return _files_in(folder, model, None)
    if not model or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise _not_found(f"{model!r} is neither a folder nor a hub id such as {MODEL_ID}", "Check --model")
    revision = revision or (REVISION if model == MODEL_ID else "main")
    return _files_in(_download(model, revision, FILES, on_progress), model, revision)


def download_tokenizer(on_progress: OnProgress | None = None) -> Path:
    """The tokenizer.json that the real checkpoints were trained with. Raises WeightsNotFound."""
    return _download(TOKENIZER_ID, "main", ["tokenizer.json"], on_progress) / "tokenizer.json"


def _download(repo_id: str, revision: str, patterns: list[str], on_progress: OnProgress | None) -> Path:
    bar = None if on_progress is None else _reporting(on_progress)
    weights = f"The weights of {repo_id}"
    _remove_parts(repo_id)
    try:
        return Path(
            huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns, tqdm_class=bar)
        )
    except hub_errors.GatedRepoError as error:
        advice = f"Accept their terms at https://huggingface.co/{repo_id} and set HF_TOKEN"
        raise _not_found(f"{weights} are gated", advice) from error
    except hub_errors.RepositoryNotFoundError as error:
        reason = f"The hub has no repository {repo_id}, or it is private"
        raise _not_found(reason, "Check the name, set HF_TOKEN for a private one") from error
    except hub_errors.RevisionNotFoundError as error:
        raise _not_found(f"{repo_id} has no revision {revision!r}", "Check --revision") from error
    except hub_errors.HFValidationError as error:
        raise _not_found(f"{repo_id!r} is not a hub id such as {MODEL_ID}", "Check --model") from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, hub_errors.HfHubHTTPError) as error:
        is_answer = isinstance(error, hub_errors.HfHubHTTPError)  # its cause is the same, in the HTTP client's words
        reason, advice = _why_not(error if is_answer else error.__cause__ or error)
        reason = f"{weights} at {revision} are not complete in the local cache, and {reason}"
        raise _not_found(reason, f"{advice}, give a local folder with --model") from error
    # A full disk; a connection that breaks off: the HTTP client's own error, which is no OSError.
    except (OSError, hub_errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        advice = "Free some space, set HF_HOME to a folder with more" if is_full else "Check the network"
        raise _not_found(f"Downloading {repo_id} at {revision} failed: {_said(error)}", advice) from error


def _remove_parts(repo_id: str) -> None:
    """Remove what processes that ended left of downloads: huggingface_hub gives each try a name of its own, and never
    looks at it again. One that goes on writes all the time."""
    folder = Path(hub_constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    for path in folder.glob("blobs/*.incomplete"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > PART_AGE_S:
                path.unlink()


def _reporting(on_progress: OnProgress) -> type[Any]:
    """A progress bar that is not shown. Of the three that snapshot_download makes, one counts the bytes on the disk,
    also those of a try that broke off; its total is that of the files which were not there at the beginning."""

    class Bar(hub_utils.tqdm):
        def __init__(self, *args: Any, name: str | None = None, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self._counts_bytes, self._num_bytes = name == BYTES_BAR, 0

        def update(self, n: float | None = 1) -> None:
            self._num_bytes += int(n or 0)
            self.refresh()

        def refresh(self, *args: Any, **options: Any) -> None:  # called when the total grows, too
            if self._counts_bytes and max(self._num_bytes, self.total or 0) >= LARGE_BYTES:
                on_progress(Progress("downloaded", self._num_bytes, self.total or None))

    return Bar


def _not_found(reason: str, advice: str) -> WeightsNotFound:
    return WeightsNotFound(f"{reason}. {advice}, or start with --model demo, which needs no download.")


def _why_not(error: BaseException) -> tuple[str, str]:
    """-> why the hub gave nothing, and what to do"""
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "Unset it"
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = error.response.status_code
        return f"the hub answered {status}", "Check HF_TOKEN" if status in (401, 403) else "Try again later"
    return f"the hub cannot be reached ({_said(error)})", "Check the network"


def _said(error: BaseException) -> str:
    """What an error says, without addresses, as those of downloads are signed."""
    lines = re.sub(r"https?://\S+", "…", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def _files_in(folder: Path, model: str, revision: str | None) -> CheckpointFiles:
    config, tokenizer, index = (
        folder / name for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")
    )
    try:
        is_checkpoint = config.is_file()
    except OSError as error:
        raise _not_found(f"{folder} cannot be read: {error.strerror}", "Check its permissions") from error
    if not is_checkpoint:
        raise _not_found(f"{folder} is not a checkpoint: it has no config.json", "Check --model")
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            weights = [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _not_found(f"{index} is not an index of safetensors files: {error}", ANEW) from error
    elif (whole := folder / "model.safetensors").is_file():
        weights = [whole]
    else:
        weights = sorted(folder.glob("model*.safetensors"))
    missing = [path.name for path in weights if not path.is_file()]
    if missing or not weights:
        what = f"{', '.join(missing[:3])} missing" if missing else "it has no model*.safetensors file"
        raise _not_found(f"The weights of {folder} are incomplete: {what}", ANEW)
    return CheckpointFiles(model, revision, config, tuple(weights), tokenizer if tokenizer.is_file() else None)
