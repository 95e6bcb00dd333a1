"""Files and servers made to take everything do not get it. Print the figures: python -m tests.bombs"""

from pathlib import Path

import bombs
import pytest


@pytest.mark.parametrize("name", bombs.BOMBS)
def test_a_bomb_is_refused_or_cut_within_its_limits(name: str, tmp_path: Path) -> None:
    assert bombs.run(name, tmp_path)["ok"] is True
