"""Imports point one way: app -> jobs -> pipeline; nothing imports benchmark; each heavy library stays in its place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "jobs", "benchmark")
# What a file may not import, by the folder it lies in.
FORBIDDEN = {"pipeline": ("jobs", "benchmark", "app"), "jobs": ("benchmark", "app"), "benchmark": ("app",)}
# Where a library may be imported at all; the rest of the code must do without.
CONFINED = {
    "torch": ("pipeline/moondream", "pipeline/demo", "benchmark"),
    "transformers": ("pipeline/moondream", "benchmark"),
    "tokenizers": ("pipeline/moondream", "pipeline/demo", "benchmark"),
    "huggingface_hub": ("pipeline/moondream",),
    "httpcore2": ("pipeline/safe_http.py",),
    "idna": ("pipeline/urls.py",),
    "av": ("pipeline/decoder", "pipeline/picture.py", "pipeline/demo/sample.py", "benchmark"),
    "playwright": ("benchmark/page.py",),
    "gradio": ("app.py", "jobs/ui.py"),
    "tinydb": ("jobs/store.py",),
    "orjson": ("jobs/",),
    "uvicorn": ("app.py", "jobs/log.py"),
    "prometheus_client": ("jobs/metrics.py",),
    "streaming_form_data": ("jobs/uploads.py",),
    "fastapi": ("app.py", "jobs/api", "jobs/http.py", "jobs/uploads.py"),
    "pydantic_settings": ("jobs/settings.py",),
    "filelock": ("jobs/store.py",),
}
NO_TORCH = ("scheduler.py", "decoding.py", "prompts.py", "config.py", "image_crops.py", "hub.py")


def sources() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")] + list(ROOT.glob("app.py"))
    return sorted(path.relative_to(ROOT) for path in files)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", sources(), ids=str)
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops.intersection(FORBIDDEN.get(path.parts[0], ()))
    for library, places in CONFINED.items():
        assert library not in tops or path.as_posix().startswith(places), f"{path} imports {library}"


@pytest.mark.parametrize("face", ["jobs/api.py", "jobs/api_results.py", "jobs/http.py", "jobs/ui.py"])
def test_the_faces_know_the_store_and_not_the_worker(face: str) -> None:
    assert not {"jobs.worker", "jobs.job_run", "jobs.service"}.intersection(imports(Path(face)))


@pytest.mark.parametrize("name", NO_TORCH)
def test_a_file_without_tensors_does_without_torch(name: str) -> None:
    assert "torch" not in {module.split(".")[0] for module in imports(Path("pipeline/moondream") / name)}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_no_file_outgrows_a_reader(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400
