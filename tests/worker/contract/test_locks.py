"""The locks that hosts install from: whole, with hashes, and of the versions that the tests have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[3]
LOCKS = ROOT / "worker_src" / "locks"
# whisperx wants torch 2.8, which the tests do not have: its CUDA is the one that ctranslate2 can use.
OF_CUDA = {"torch", "torchaudio", "torchcodec", "torchvision", "triton"}


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^ ;\\\n]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


TESTED = pins((ROOT / "tests" / "stack" / "locks" / "demo.txt").read_text())


@pytest.mark.parametrize("profile", ["base", "cpu", "cuda"])
class TestLock:
    def test_every_line_is_a_pin_with_hashes(self, profile: str) -> None:
        text = (LOCKS / f"{profile}.txt").read_text()
        entries = text.replace("\\\n", " ").splitlines()
        assert len(entries) == len(pins(text)) > 20
        assert [entry for entry in entries if not re.search(r" --hash=sha256:[0-9a-f]{64}( |$)", entry)] == []

    def test_what_the_package_asks_for_is_in_it(self, profile: str) -> None:
        project = tomllib.loads((ROOT / "worker_src" / "pyproject.toml").read_text())["project"]
        asked = project["dependencies"] + ([] if profile == "base" else project["optional-dependencies"]["gpu"])
        names = {normal(re.match(r"[A-Za-z0-9_.-]+", line)[0]) for line in asked}  # type: ignore[index]
        locked = pins((LOCKS / f"{profile}.txt").read_text())
        assert names - set(locked) == set()

    def test_versions_are_those_that_the_tests_have(self, profile: str) -> None:
        locked = pins((LOCKS / f"{profile}.txt").read_text())
        others = {
            name: (version, TESTED[name])
            for name, version in locked.items()
            if name in TESTED and version.removesuffix("+cpu") != TESTED[name]
        }
        assert set(others) <= (OF_CUDA if profile == "cuda" else set()), others


def test_only_the_lock_for_gpus_brings_cuda() -> None:
    for profile in ("base", "cpu"):
        locked = pins((LOCKS / f"{profile}.txt").read_text())
        assert [name for name in locked if name.startswith(("nvidia-", "cuda-", "triton"))] == []
    assert pins((LOCKS / "cpu.txt").read_text())["torch"].endswith("+cpu")
    assert "nvidia-cublas-cu12" in pins((LOCKS / "cuda.txt").read_text())
