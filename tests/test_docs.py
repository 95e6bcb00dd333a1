"""The README keeps up with the code."""

import re
from pathlib import Path

import pytest
import wrong_inputs

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


@pytest.mark.parametrize("path", sorted(ROOT.glob("pipeline/**/*.py")), ids=lambda path: path.name)
def test_every_file_of_the_library_is_in_the_file_tree(path: Path) -> None:
    is_listed = path.name in README or path.parent.name == "demo" or path.name == "__init__.py"

    assert is_listed


def test_every_command_of_the_readme_names_a_module_that_exists() -> None:
    for module in re.findall(r"python -m ([a-z_.]+)", README):
        if module.split(".")[0] in ("pipeline", "benchmark"):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_what_wrong_files_and_urls_answer_is_what_the_readme_says() -> None:
    assert f"<!-- wrong -->\n{wrong_inputs.table()}\n<!-- /wrong -->" in README, "see tests/wrong_inputs.py"


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    exec(compile(example, "README.md", "exec"), {})

    assert len(capsys.readouterr().out.splitlines()) == 25
