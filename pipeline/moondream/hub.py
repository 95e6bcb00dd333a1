"""Where a checkpoint's files are: the demo's folder, a local folder, or the hub's cache, filled if need be.

Downloads resume after a broken connection, keep the files that are complete, show a progress bar, and honour HF_HOME,
HF_TOKEN and HF_HUB_OFFLINE, all by huggingface_hub (which starts a file anew if the process itself ended). Nothing
but weights, config and tokenizer is fetched, and no code of a repository is ever run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from pipeline.errors import WeightsNotFound

MODEL_ID = "vikhyatk/moondream2"
REVISION = "2025-06-21"
TOKENIZER_ID = "moondream/starmie-v1"
DEMO = "demo"

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "checkpoint"
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
OFFLINE_ADVICE = "Check the network (and HF_HUB_OFFLINE), give a local folder with --model, or try --model demo."


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint. `model` and `revision` name it in results."""

    model: str
    revision: str | None
    config: Path
    weights: tuple[Path, ...]
    tokenizer: Path | None


def find_checkpoint(model: str, revision: str | None = None) -> CheckpointFiles:
    """Find "demo", a local folder, or a hub id at a revision (default: REVISION for MODEL_ID, else main), downloading
    what is missing. Raises WeightsNotFound, saying why and what to do."""
    if model == DEMO:
        return _files_in(DEMO_FOLDER, DEMO, None)
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return _files_in(folder, model, None)
    if not model or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise WeightsNotFound(f"{model!r} is neither a folder, nor a hub id such as {MODEL_ID}, nor {DEMO!r}.")
    revision = revision or (REVISION if model == MODEL_ID else "main")
    return _files_in(_download(model, revision, FILES), model, revision)


def download_tokenizer() -> Path:
    """The tokenizer.json that the real checkpoints were trained with. Raises WeightsNotFound."""
    return _download(TOKENIZER_ID, "main", ["tokenizer.json"]) / "tokenizer.json"


def _download(repo_id: str, revision: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except hub_errors.GatedRepoError as error:
        reason = f"is gated: accept its terms at https://huggingface.co/{repo_id} and set HF_TOKEN"
        raise WeightsNotFound(f"{repo_id} {reason}.") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise WeightsNotFound(
            f"The hub has no repository {repo_id}, or it is private. Check the name; for a private one set HF_TOKEN."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise WeightsNotFound(f"{repo_id} has no revision {revision!r}. Check --revision.") from error
    except hub_errors.HFValidationError as error:
        raise WeightsNotFound(f"{repo_id!r} is not a hub id such as {MODEL_ID}.") from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, hub_errors.HfHubHTTPError) as error:
        raise WeightsNotFound(
            f"{repo_id} at {revision} is not in the local cache and cannot be downloaded. {OFFLINE_ADVICE}"
        ) from error
    # A full disk; a connection that breaks off: the HTTP client's own error, which is no OSError.
    except (OSError, hub_errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise WeightsNotFound(f"Downloading {repo_id} at {revision} failed: {error}. {OFFLINE_ADVICE}") from error


def _files_in(folder: Path, model: str, revision: str | None) -> CheckpointFiles:
    config, tokenizer, index = (
        folder / name for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")
    )
    try:
        is_checkpoint = config.is_file()
    except OSError as error:
        raise WeightsNotFound(f"{folder} cannot be read: {error.strerror}. Check its permissions.") from error
    if not is_checkpoint:
        raise WeightsNotFound(f"{folder} is not a checkpoint: it has no config.json.")
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            weights = [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsNotFound(f"{index} is not an index of safetensors files: {error}") from error
    elif (whole := folder / "model.safetensors").is_file():
        weights = [whole]
    else:
        weights = sorted(folder.glob("model*.safetensors"))
    missing = [path.name for path in weights if not path.is_file()]
    if missing or not weights:
        what = f"{', '.join(missing[:3])} missing" if missing else "it has no model*.safetensors file"
        raise WeightsNotFound(f"The weights of {folder} are incomplete: {what}. Download the checkpoint again.")
    return CheckpointFiles(model, revision, config, tuple(weights), tokenizer if tokenizer.is_file() else None)
