from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from world import World


@pytest.fixture
def world(tmp_path: Path, env: dict[str, str]) -> Iterator[World]:
    """An empty lab on the stack's real servers."""
    lab = World(tmp_path / "lab", env)
    lab.reset()
    yield lab
    lab.engine.dispose()
