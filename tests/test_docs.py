"""The README keeps up with the code."""

import re
from pathlib import Path
from typing import Any

import pytest
import wrong_inputs
from serving import SAMPLE, running_app, wait_until

from app import ROUTERS, make_app
from jobs.service import Service
from jobs.settings import Settings
from pipeline import errors
from pipeline.__main__ import parse_arguments
from pipeline.errors import DescriberError
from pipeline.sampling import LIMITS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def leaves(error: type[DescriberError]) -> list[type[DescriberError]]:
    children = error.__subclasses__()
    return [leaf for child in children for leaf in leaves(child)] if children else [error]


@pytest.mark.parametrize("error", leaves(DescriberError), ids=lambda error: error.__name__)
def test_every_error_code_is_in_the_readme(error: type[DescriberError]) -> None:
    assert f"`{error.code}`" in README
    assert error.__name__ in (errors.__doc__ or "")


def test_error_codes_are_unique() -> None:
    codes = [error.code for error in leaves(DescriberError)]

    assert len(codes) == len(set(codes))


def test_every_option_is_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])

    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert options
    assert {option for option in options if f"`{option}" not in README and f" {option}" not in README} == set()


def test_the_limits_of_the_readme_are_those_of_the_code() -> None:
    rows = [f"| `{name}` | {limit.default:,.12g} | {limit.metadata['help']} |" for name, limit in LIMITS.items()]

    assert "\n".join(["| limit | default | of what |", "| --- | --- | --- |", *rows]) in README


def test_the_settings_of_the_readme_are_those_of_the_code() -> None:
    assert f"<!-- settings -->\n{settings_table()}\n<!-- /settings -->" in README, settings_table()


def settings_table() -> str:
    rows = [
        f"| `{name.upper()}` | {shown_default(field.default)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| setting | default | what it is |", "| --- | --- | --- |", *rows])


def shown_default(value: object) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.12g}" if isinstance(value, int | float) else f"`{value}`"


def test_every_route_is_in_the_readme(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    service = Service(settings)
    paths = make_app(service, settings).openapi()["paths"]
    service.store.close()

    routes = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert len(routes) > 15
    assert [route for route in routes if f"`{route}`" not in README] == []


def test_the_route_of_the_readme_can_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"<!-- extend -->\n```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {"__name__": "words"}
    exec(compile(snippet, "README.md", "exec"), names)

    monkeypatch.setattr("app.ROUTERS", [*ROUTERS, names["word_router"]])

    with running_app(tmp_path / "data") as app, app.client() as client:
        job_id = client.post("/api/upload", files={"file": ("sample.mp4", SAMPLE.read_bytes())}).json()["job_id"]
        wait_until(lambda: client.get(f"/api/status/{job_id}").json()["status"] == "completed")
        words = client.get(f"/api/jobs/{job_id}/words").json()
        assert client.get("/api/jobs/job_0/words").json()["code"] == "job_not_found"

    assert words[0][0] == "a" and words[0][1] > 25


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/*.py")]), ids=lambda path: path.name
)
def test_every_file_of_the_library_is_in_the_file_tree(path: Path) -> None:
    is_listed = path.name in README or path.parent.name == "demo" or path.name == "__init__.py"

    assert is_listed


def test_every_command_of_the_readme_names_a_module_that_exists() -> None:
    for module in re.findall(r"python -m ([a-z_.]+)", README):
        if module.split(".")[0] in ("pipeline", "jobs", "benchmark", "tests"):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_what_wrong_files_and_urls_answer_is_what_the_readme_says() -> None:
    assert f"<!-- wrong -->\n{wrong_inputs.table()}\n<!-- /wrong -->" in README, "see tests/wrong_inputs.py"


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example = re.findall(r"```python\n(from pipeline.*?)```", README, re.DOTALL)[0]

    exec(compile(example, "README.md", "exec"), {})

    assert len(capsys.readouterr().out.splitlines()) == 25
