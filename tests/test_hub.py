"""Where a checkpoint's files are found. The hub is a server on this machine (fake_hub.py)."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fake_hub import COMMIT, ROOT, FakeHub, hub_of, look_up
from huggingface_hub.utils import hf_raise_for_status

from pipeline.errors import WeightsNotFound
from pipeline.moondream import hub
from pipeline.moondream.hub import MODEL_ID, REVISION, find_checkpoint

FIND = "from pipeline.moondream.hub import *; print(repr(find_checkpoint(*sys.argv[1:])))"
FIND_TOKENIZER = "from pipeline.moondream.hub import *; print(download_tokenizer())"
DEMO_ADVICE = ", or start with --model demo, which needs no download."
ADVICE = "give a local folder with --model" + DEMO_ADVICE


# --- folders and names


def test_a_folders_files_are_found(tiny_folder: Path) -> None:
    files = find_checkpoint(str(tiny_folder))

    assert (files.model, files.revision) == (str(tiny_folder), None)
    assert files.config == tiny_folder / "config.json"
    assert files.weights == (tiny_folder / "model.safetensors",)
    assert files.tokenizer == tiny_folder / "tokenizer.json"


def test_a_home_folder_may_begin_with_a_tilde(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))

    assert find_checkpoint(f"~/{tiny_folder.name}").config == tiny_folder / "config.json"


def test_demo_is_the_products_own_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEMO_FOLDER", tiny_folder)

    files = find_checkpoint("demo")

    assert (files.model, files.config) == ("demo", tiny_folder / "config.json")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "~/nowhere", "a/b/c", "../x"])
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(WeightsNotFound, match=f"neither a folder nor a hub id such as {MODEL_ID}.*{DEMO_ADVICE}"):
        find_checkpoint(name)


@pytest.mark.parametrize("name", ["a--b/c", "x/y..z", "org/name.git", "spa ce/x"])
def test_an_id_that_the_hub_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(WeightsNotFound, match=f"is not a hub id.*{DEMO_ADVICE}"):
        find_checkpoint(name)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=rf"has no config\.json.*{DEMO_ADVICE}"):
        find_checkpoint(str(tmp_path))


def test_a_folder_without_weights_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(WeightsNotFound, match=rf"it has no model\*\.safetensors file.*{DEMO_ADVICE}"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)

    with pytest.raises(WeightsNotFound, match=f"is not an index of safetensors files.*{DEMO_ADVICE}"):
        find_checkpoint(str(tmp_path))


def test_no_code_of_a_repository_is_ever_run() -> None:
    """What lets transformers do so appears nowhere."""
    option = "trust_remote_" + "code"

    assert [path for path in (ROOT / "pipeline").rglob("*.py") if option in path.read_text(encoding="utf-8")] == []


# --- the cache, offline


def cached(home: Path, repo_id: str, revision: str, source: Path) -> Path:
    """Lay a repository's files out as the hub's cache does -> its snapshot."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(source, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(("revision", "arguments"), [(REVISION, []), ("other", ["other"])])
def test_the_real_model_is_found_in_the_cache_at_its_revision(
    tmp_path: Path, tiny_folder: Path, revision: str, arguments: list[str]
) -> None:
    snapshot = cached(tmp_path, MODEL_ID, revision, tiny_folder)

    found = look_up(FIND, MODEL_ID, *arguments, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert str(snapshot / "model.safetensors") in found.printed, found.error
    assert f"model='{MODEL_ID}', revision='{revision}'" in found.printed


def test_another_model_is_taken_at_main(tmp_path: Path, tiny_folder: Path) -> None:
    cached(tmp_path, "some/model", "main", tiny_folder)

    found = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert "model='some/model', revision='main'" in found.printed, found.error


def test_the_tokenizer_is_found_in_the_cache(tmp_path: Path, tiny_folder: Path) -> None:
    snapshot = cached(tmp_path, "moondream/starmie-v1", "main", tiny_folder)

    found = look_up(FIND_TOKENIZER, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert found.printed == str(snapshot / "tokenizer.json"), found.error


@pytest.mark.parametrize("program", [FIND, FIND_TOKENIZER])
def test_offline_and_not_cached_says_what_to_do(tmp_path: Path, program: str) -> None:
    found = look_up(program, *([MODEL_ID] if program == FIND else []), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert found.error.startswith("WeightsNotFound: ") and found.error.endswith(ADVICE)
    assert "are not complete in the local cache, and HF_HUB_OFFLINE is set. Unset it, " in found.error


def test_a_snapshot_that_is_not_complete_says_so(tmp_path: Path, tiny_folder: Path) -> None:
    (cached(tmp_path, MODEL_ID, REVISION, tiny_folder) / "model.safetensors").unlink()

    found = look_up(FIND, MODEL_ID, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert found.error.startswith("WeightsNotFound: The weights of") and "incomplete" in found.error


# --- the hub, as a server on this machine


@pytest.fixture
def fake(tiny_folder: Path, tmp_path: Path) -> Iterator[FakeHub]:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "repository"))
    (folder / "moondream.py").write_text("raise SystemExit('code of a repository ran')")
    with hub_of(folder) as fake:
        yield fake


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gated", "are gated. Accept their terms at https://huggingface.co/some/gated and set HF_TOKEN"),
        ("unknown", "The hub has no repository some/unknown, or it is private. Check the name"),
        ("private", "The hub has no repository some/private, or it is private. Check the name"),
        ("moved", "some/moved has no revision 'v2'. Check --revision"),
        ("broken", "are not complete in the local cache, and the hub answered 500. Try again later"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(fake: FakeHub, tmp_path: Path, kind: str, said: str) -> None:
    found = look_up(FIND, f"some/{kind}", "v2", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)

    assert found.error.startswith("WeightsNotFound: ") and said in found.error and found.error.endswith(DEMO_ADVICE)


def test_a_connection_that_breaks_off_says_what_to_do(fake: FakeHub, tmp_path: Path) -> None:
    """Errors of the HTTP client are no OSErrors: this one came through as it was."""
    found = look_up(FIND, "some/hangs-up", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)

    assert found.error.startswith("WeightsNotFound: ") and found.error.endswith(DEMO_ADVICE)


def test_a_hub_that_is_not_there_says_what_to_do(fake: FakeHub, tmp_path: Path) -> None:
    found = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:1")

    assert "Connection refused). Check the network, " in found.error
    assert found.error.startswith("WeightsNotFound: ") and found.error.endswith(ADVICE)


def test_a_checkpoint_is_downloaded_without_its_code_and_only_once(fake: FakeHub, tmp_path: Path) -> None:
    first = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)
    second = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)
    offline = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT
    assert str(snapshot / "model.safetensors") in first.printed, first.error
    assert first == second == offline
    assert sorted(fake.downloads) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(fake.downloads)


def test_a_download_that_breaks_off_is_resumed(fake: FakeHub, tmp_path: Path) -> None:
    content = os.urandom(24 * 2**20)  # huggingface_hub keeps whole chunks of 10 MiB
    (fake.folder / "model.safetensors").write_bytes(content)
    fake.num_breaks = 1

    found = look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)

    weights = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT / "model.safetensors"
    assert found.error == ""
    assert weights.read_bytes() == content
    assert fake.ranges == ["", f"bytes={10 * 2**20}-"]


def test_a_full_disk_is_told_with_other_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill)
    with pytest.raises(
        WeightsNotFound, match=r"No space left on device\. Free some space, set HF_HOME to a folder with"
    ):
        find_checkpoint("some/model")


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "Check HF_TOKEN"), (403, "Check HF_TOKEN"), (503, "Try again later")]
)
def test_a_file_that_the_hub_refuses_is_told_without_its_address(
    monkeypatch: pytest.MonkeyPatch, status: int, advice: str
) -> None:
    """The signed address stood in /api/ready, with the advice to check the network."""
    request = httpx2.Request("GET", "https://cdn.example/weights?Signature=SECRET")

    def refuse(*_: object, **__: object) -> None:
        hf_raise_for_status(httpx2.Response(status, request=request))

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightsNotFound, match=f"the hub answered {status}. {advice}, ") as caught:
        find_checkpoint(MODEL_ID)
    assert "SECRET" not in str(caught.value) and "http" not in str(caught.value)


def test_what_processes_that_ended_left_of_a_download_is_removed(fake: FakeHub, tmp_path: Path) -> None:
    """Each stop in mid-download left up to 4 GB for ever."""
    blobs = tmp_path / "hub" / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    for name, age_s in (("old", 3600), ("live", 5)):
        path = blobs / f"{name}.incomplete"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    look_up(FIND, "some/model", HF_HOME=str(tmp_path), HF_ENDPOINT=fake.url)

    assert [path.name for path in blobs.glob("*.incomplete")] == ["live.incomplete"]
