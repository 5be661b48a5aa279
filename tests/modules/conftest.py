"""Run a module as Ansible does: in a process of its own, with its arguments as JSON, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
PYTHON = os.environ.get("MODULE_PYTHON", sys.executable)  # of the host
Run = Callable[..., dict[str, Any]]


def command(name: str, arguments: Path) -> list[str]:
    """The command line of a module, which reads its arguments from a file; measured where coverage is asked for."""
    measured = ["-m", "coverage", "run", "--parallel-mode"] if os.environ.get("COVERAGE_FILE") else []
    return [PYTHON, *measured, "-m", f"ansible_collections.lab.audio.plugins.modules.{name}", str(arguments)]


def environment(**more: str) -> dict[str, str]:
    """What a module finds in its environment: none of this process's settings of lab.audio."""
    ours = ("S3_", "REDIS_", "DATABASE_", "CREDENTIALS_", "LAB_", "SCRATCH_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONPATH": str(CHECKOUT / "collections"), "LC_ALL": "C.UTF-8", **more}


def write_arguments(path: Path, params: dict[str, Any], *, check: bool = False, diff: bool = True) -> Path:
    own = {"_ansible_check_mode": check, "_ansible_diff": diff, "_ansible_remote_tmp": str(path.parent)}
    path.write_text(json.dumps({"ANSIBLE_MODULE_ARGS": {**params, **own}}, default=str))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("gpu_volume", device=..., check=True, env={...})`: the module's result. Fails on a traceback."""

    def run_module(
        name: str, *, check: bool = False, env: dict[str, str] | None = None, **params: Any
    ) -> dict[str, Any]:
        arguments = write_arguments(tmp_path / f"{name}.arguments.json", params, check=check)
        done = subprocess.run(
            command(name, arguments), env=environment(**(env or {})), capture_output=True, text=True, timeout=240
        )
        assert "Traceback" not in done.stderr, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        assert bool(result.get("failed")) == (done.returncode != 0)
        if "required Python library" in result.get("msg", ""):
            result.pop("exception", None)  # that of the import; newer ansible-cores keep it to themselves
        assert "Traceback" not in json.dumps(result), result
        return result

    return run_module


@pytest.fixture
def predicted(run: Run) -> Run:
    """Run in check mode, then in earnest, then again: check says what the run does, and the second run does nothing."""

    def run_three_times(name: str, **params: Any) -> dict[str, Any]:
        said = run(name, check=True, **params)
        did = run(name, **params)
        for key in ("changed", "plan", "diff", "failed", "msg"):
            assert said.get(key) == did.get(key), f"{key}: check mode says {said.get(key)}, the run {did.get(key)}"
        if not did.get("failed"):
            again = run(name, **params)
            assert (again.get("failed"), again["changed"], again.get("plan")) == (None, False, []), again
        return did

    return run_three_times
