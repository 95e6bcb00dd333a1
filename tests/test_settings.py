"""The settings: from the environment and the command line, and what is said of wrong ones."""

import os
from pathlib import Path

import pytest

from app import EXIT_BAD_SETTINGS, main
from jobs.settings import PREFIX, Settings, listed, read_settings
from pipeline.errors import InvalidOption
from pipeline.moondream.hub import MODEL_ID
from pipeline.sampling import DEFAULT_LIMITS


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def test_without_any_the_defaults_of_the_design_hold() -> None:
    settings = read_settings([])

    assert (settings.model, settings.host, settings.port) == (MODEL_ID, "127.0.0.1", 7860)
    assert settings.decode_limits == DEFAULT_LIMITS
    assert (settings.max_queued_jobs, settings.max_running_jobs, settings.retention_days) == (100, 2, 30)
    assert (settings.max_tokens, settings.retention_bytes, settings.data_dir) == (256, 20_000_000_000, Path("data"))
    assert not (settings.api_keys or settings.admin_keys or settings.allow_anonymous or settings.allow_private_urls)


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONREEL_PORT", "8000")
    monkeypatch.setenv("MOONREEL_ALLOW_ANONYMOUS", "true")
    monkeypatch.setenv("MOONREEL_DATA_DIR", "/srv/moonreel")

    settings = read_settings([])
    assert (settings.port, settings.allow_anonymous, settings.data_dir) == (8000, True, Path("/srv/moonreel"))


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONREEL_PORT", "8000")
    monkeypatch.setenv("MOONREEL_MODEL", "demo")

    settings = read_settings(["--port", "9000", "--allow-anonymous"])
    assert (settings.port, settings.model, settings.allow_anonymous) == (9000, "demo", True)


def test_on_a_space_other_defaults_hold_and_everything_else_wins_over_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("jobs.settings.SPACE_STORAGE", tmp_path)
    monkeypatch.setenv("SPACE_HOST", "me-moonreel.hf.space,moonreel.example")
    assert read_settings([]).allowed_hosts == ""

    monkeypatch.setenv("SYSTEM", "spaces")
    settings = read_settings([])
    assert (settings.host, settings.port, settings.allow_anonymous) == ("0.0.0.0", 7860, True)
    assert listed(settings.allowed_hosts) == {"me-moonreel.hf.space", "moonreel.example"}
    assert (settings.embed_origins, settings.data_dir) == ("https://huggingface.co", tmp_path / "moonreel")
    assert settings.model == MODEL_ID

    monkeypatch.setenv("MOONREEL_DATA_DIR", "elsewhere")
    settings = read_settings(["--host=127.0.0.1", "--no-allow-anonymous"])
    assert (settings.host, settings.allow_anonymous, settings.data_dir) == ("127.0.0.1", False, Path("elsewhere"))


def test_a_space_without_storage_keeps_its_data_beside_the_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jobs.settings.SPACE_STORAGE", tmp_path / "none")
    monkeypatch.setenv("SYSTEM", "spaces")

    assert read_settings([]).data_dir == Path("data")


def test_instances_and_slots_are_numbers_or_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (read_settings([]).instances, read_settings([]).slots) == ("auto", "auto")
    monkeypatch.setenv("MOONREEL_SLOTS", "auto")
    monkeypatch.setenv("MOONREEL_INSTANCES", "2")

    assert (read_settings([]).instances, read_settings(["--slots=16"]).slots) == (2, 16)
    with pytest.raises(InvalidOption, match="SLOTS: Input should be auto, or a number from 1 to 1024"):
        read_settings(["--slots=many"])


@pytest.mark.parametrize("flag", ["--max-queued-jobs=7", "--max_queued_jobs=7", "--max-queued_jobs=7"])
def test_flags_are_written_with_either_line(flag: str) -> None:
    assert read_settings([flag]).max_queued_jobs == 7


def test_a_flags_value_keeps_its_underscores() -> None:
    assert read_settings(["--data-dir=/a_b", "--api-keys", "a_b:--key_with_16_letters"]).data_dir == Path("/a_b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "99999"),
        ("port", "many"),
        ("slots", "0"),
        ("slots", "2.5"),
        ("instances", "65"),
        ("instances", "all"),
        ("max_running_jobs", "65"),
        ("retention_days", "0"),
        ("job_deadline_s", "-1"),
        ("min_free_bytes", "-1"),
        ("log_format", "xml"),
        ("root_path", "video"),
        ("root_path", "/video/"),
        ("allow_anonymous", "perhaps"),
    ],
)
def test_a_wrong_setting_is_named_wherever_it_stands(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    if name != "allow_anonymous":  # whose flag has no value
        with pytest.raises(InvalidOption, match=rf"^Settings: {name.upper()}: "):
            read_settings([f"--{name}={value}"])
    monkeypatch.setenv(f"MOONREEL_{name}".upper(), value)
    with pytest.raises(InvalidOption, match=rf"^Settings: {name.upper()}: "):
        read_settings([])


def test_an_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of MOONREEL_API_KEY, without S, would leave the server open."""
    monkeypatch.setenv("MOONREEL_API_KEY", "secret-0123456789")

    with pytest.raises(InvalidOption, match="no setting MOONREEL_API_KEY") as raised:
        read_settings([])
    assert "secret" not in str(raised.value)


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        read_settings(["--prot=1"])

    assert raised.value.code == 2 and "--prot=1" in capsys.readouterr().err


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        read_settings(["--help"])

    told = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in told
        assert field.description and field.description in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port=x"],
        ["--host=0.0.0.0"],
        ["--api-keys=short"],
        ["--webhook-secret=nonsense"],
        ["--api-keys=a:0123456789abcdef,a:fedcba9876543210"],
    ],
)
def test_the_app_ends_with_what_is_wrong(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.set_up_log", lambda log_format: None)  # the test's own stays

    assert main([f"--data-dir={tmp_path / 'data'}", *arguments]) == EXIT_BAD_SETTINGS
    told = capsys.readouterr().err
    assert told.startswith("error: ") and arguments[0].partition("=")[0][2:].upper().replace("-", "_") in told.upper()
    assert "0123456789abcdef" not in told and "nonsense" not in told


def test_a_list_is_written_with_commas() -> None:
    assert listed(" a.example, b.example ,,") == {"a.example", "b.example"}
    assert listed("") == frozenset()
