"""What libraries log is told as our events, and harms nobody."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def events(code: str) -> tuple[list[dict[str, str]], str]:
    """What a process logs that runs this, as events, and what else it has to say. It must come to its end."""
    script = f"import logging\nfrom lab_audio import log\nlog.configure()\nlibrary = logging.getLogger('x')\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")], "\n".join(
        line for line in lines if not line.startswith("{")
    )


def test_a_sloppy_call_of_a_library_costs_its_message_only() -> None:
    told, said = events("library.warning('a', FutureWarning)\nlibrary.warning('b')")
    assert [event["event"] for event in told] == ["b"]
    assert "Logging error" in said and "FutureWarning" in said


@pytest.mark.parametrize(("level", "name"), [(1, None), (31, "warning"), (35, "error"), (99, "critical")])
def test_a_level_of_its_own_is_the_nearest_of_ours(level: int, name: str | None) -> None:
    told, said = events(f"library.setLevel(1)\nlibrary.log({level}, 'a')")
    assert [(event["level"], event["event"], event["library"]) for event in told] == (
        [(name, "a", "x")] if name else []
    )
    assert said == ""


def test_a_traceback_is_told() -> None:
    ((event,), _) = events("try:\n    1 / 0\nexcept ZeroDivisionError:\n    library.exception('odd')")
    assert event["event"] == "odd" and "ZeroDivisionError" in event["exception"]
