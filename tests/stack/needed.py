"""What a test needs and this machine has not: it is skipped, and says why; with REQUIRE_ALL=1 it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from processes import NotReady


def missing(what: str) -> NoReturn:
    """Skip this test, or fail it."""
    (pytest.fail if os.environ.get("REQUIRE_ALL") == "1" else pytest.skip)(what)


@contextmanager
def needed() -> Iterator[None]:
    """Around the start of a server: a RuntimeError says what is missing. One that is there and ends always fails."""
    try:
        yield
    except NotReady:
        raise
    except RuntimeError as error:
        missing(str(error))
