"""The server holds against every attack of tests/attacks."""

import importlib

import pytest

from tests.attacks.__main__ import names, run


@pytest.mark.parametrize("name", names())
def test_each_attack_can_be_imported_and_says_what_it_tests(name: str) -> None:
    module = importlib.import_module(f"tests.attacks.{name}")

    assert module.POINT and module.TITLE and callable(module.attack)


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_the_server_holds(name: str) -> None:
    is_held, line = run(name)

    assert is_held, line
