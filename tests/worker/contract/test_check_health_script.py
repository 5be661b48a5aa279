"""deploy/check-health.sh on hosts of every kind; ssh, sudo and lab-audio are stand-ins, and nobody is waited for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "check-health.sh"
PROGRAMS = {
    "timeout": '[ "$1" = 20 ] || exit 99; shift; case "$*" in *hangs*) exit 124;; esac; exec "$@"',
    "ssh": 'while [ "$1" != -- ]; do shift; done; [ "$2" != gone ] || { echo "cannot be reached" >&2; exit 255; }\n'
    'echo "a notice of ssh" >&2; HOST=$2 exec sh -c "$3"',
    "id": "echo 1000",
    "sudo": '[ "$1" = -n ] || exit 99; shift; [ "$HOST" != closed ] || { echo "a password is required" >&2; exit 1; }\n'
    'exec "$@"',
    "lab-audio": 'case "$*" in --version) echo 1;; check-health) echo "all of $HOST";;\n'
    '*) printf \'{\\n  "host": "%s"\\n}\\n\' "$HOST";; esac; [ "$HOST" != poor ] || [ "$1" = --version ] || exit 1',
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def run(path: str, *arguments: str, host: str = "here") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": path, "HOST": host}
    return subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("host", "code", "said"),
    [
        ("good", 0, "a notice of ssh"),
        ("poor", 1, "a notice of ssh"),
        ("closed", 2, "a password is required"),
        ("gone", 2, "cannot be reached"),
        ("hangs", 2, "no answer"),
    ],
)
def test_a_host_that_cannot_be_asked_is_no_warning(path: str, host: str, code: int, said: str) -> None:
    done = run(path, "good", host)
    assert done.returncode == code
    assert f"{host}: {said}" in done.stderr.splitlines()
    assert done.stdout.startswith("== good\nall of good\n")


def test_each_document_is_a_line(path: str) -> None:
    done = run(path, "--json", "good", "closed", "poor", "gone", "hangs")
    assert done.returncode == 2
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"host": "good"}, {"host": "poor"}]


@pytest.mark.parametrize(("host", "code"), [("good", 0), ("poor", 1), ("closed", 2)])
def test_here(path: str, host: str, code: int) -> None:
    done = run(path, host=host)
    assert (done.returncode, done.stdout) == (code, "" if code == 2 else f"all of {host}\n")
