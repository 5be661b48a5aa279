"""Transcoding with the real ffmpeg, and with programs that behave badly in its place."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import time
import tracemalloc
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from needed import missing

from lab_audio.errors import Fatal, Permanent, Retryable
from lab_audio.media import sandbox, transcode
from lab_audio.media.transcode import decode, duration, encode, ffmpeg_command

SOUNDS = sorted((Path(__file__).parents[2] / "stack" / "sounds").rglob("*.mp3"))
SPEECH = SOUNDS[0]


def need(condition: bool, what: str) -> None:
    if not condition:
        missing(what)


@pytest.fixture(autouse=True)
def _ffmpeg() -> None:
    try:
        ffmpeg_command()
    except Fatal as error:
        missing(str(error))


@pytest.fixture(params=["system", "imageio-ffmpeg"])
def either_ffmpeg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "imageio-ffmpeg":
        need(importlib.util.find_spec("imageio_ffmpeg") is not None, "imageio-ffmpeg is not installed")
        monkeypatch.setenv("PATH", "")


@pytest.fixture
def numpy() -> Any:
    need(importlib.util.find_spec("numpy") is not None, "numpy is not installed: pip install 'lab-audio[gpu]'")
    import numpy

    return numpy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where only the Opus may appear."""
    made = tmp_path / "batch"
    made.mkdir()
    return made


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fake_ffmpeg(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    directory.mkdir(exist_ok=True)
    program = directory / "ffmpeg"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "enclosed", lambda argv, _cpu_seconds: list(argv))  # there is no bash in it
    monkeypatch.setattr(sandbox, "problem", lambda: "there is no bash in it")


def wav_of_silence() -> bytes:
    """Sound, but not of the kind that is asked for."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(bytes(64_000))
    return file.getvalue()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


class Dribble(io.RawIOBase):
    """A source of short reads that ends in an error, if one is given."""

    def __init__(self, data: bytes, error: Exception | None = None) -> None:
        self._data = io.BytesIO(data)
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._data.read(min(1000, len(buffer)))
        if not block and self._error:
            raise self._error
        buffer[: len(block)] = block
        return len(block)


class TestEncode:
    @pytest.mark.usefixtures("either_ffmpeg")
    def test_the_same_bytes_give_the_same_file(self, folder: Path) -> None:
        data = SPEECH.read_bytes()
        sources: list[BinaryIO] = [io.BytesIO(data), io.BufferedReader(Dribble(data)), SPEECH.open("rb")]
        made = []
        for number, source in enumerate(sources):
            with source:
                encoded = encode(source, folder / f"{number}.opus", bitrate=24_000, timeout=60)
            file = (folder / f"{number}.opus").read_bytes()
            assert encoded.size == len(file)
            made.append((encoded, file))
        assert made[0] == made[1] == made[2]
        assert names(folder) == ["0.opus", "1.opus", "2.opus"]

    @pytest.mark.usefixtures("either_ffmpeg")
    def test_it_is_the_speech(self, folder: Path, numpy: Any) -> None:
        with SPEECH.open("rb") as source:
            encoded = encode(source, folder / "x.opus", bitrate=24_000)
        argv = [ffmpeg_command(), "-v", "error", "-i", SPEECH, "-ac", "1", "-ar", "16000", "-f", "s16le", "-"]
        truth = numpy.frombuffer(subprocess.run(argv, capture_output=True, check=True).stdout, "<i2") / 32768
        (samples,) = decode(folder / "x.opus")
        assert samples.dtype == numpy.float32 and samples.ndim == 1
        assert abs(encoded.seconds - len(truth) / 16_000) < 0.1
        assert abs(encoded.seconds - len(samples) / 16_000) < 0.001
        assert 0.1 < abs(samples).max() <= 1

        def loudness(samples: Any) -> Any:
            return numpy.sqrt((samples[: len(truth) // 800 * 800 - 1600].reshape(-1, 800) ** 2).mean(axis=1))

        assert numpy.corrcoef(loudness(truth), loudness(samples))[0, 1] > 0.95

    def test_bitrate(self, folder: Path) -> None:
        sizes = [
            encode(io.BytesIO(SPEECH.read_bytes()), folder / "x.opus", bitrate=rate).size
            for rate in (12_000, 24_000, 48_000)
        ]
        assert sizes[0] * 1.5 < sizes[1] < sizes[2] / 1.5

    def test_tags_and_pictures_stay_out(self, folder: Path, tmp_path: Path) -> None:
        tagged = tmp_path / "tagged.mp3"
        argv = [
            ffmpeg_command(),
            "-v",
            "error",
            "-i",
            SPEECH,
            "-f",
            "lavfi",
            "-i",
            "color=red:s=64x64:d=0.04",
        ]
        argv += [
            "-map",
            "0:a",
            "-map",
            "1:v",
            "-c:a",
            "copy",
            "-c:v",
            "png",
            "-disposition:v",
            "attached_pic",
        ]
        subprocess.run([*argv, "-metadata", "title=Very private", tagged], check=True)
        assert b"PNG" in tagged.read_bytes() and b"Very private" in tagged.read_bytes()
        with tagged.open("rb") as source:
            encode(source, folder / "x.opus", bitrate=24_000)
        plain = encode(io.BytesIO(SPEECH.read_bytes()), folder / "plain.opus", bitrate=24_000)
        assert b"private" not in (folder / "x.opus").read_bytes()
        assert abs(duration(folder / "x.opus") - plain.seconds) < 0.1

    @pytest.mark.usefixtures("either_ffmpeg")
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"not sound at all\n" * 1000,
            bytes(100_000),
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{SPEECH}\n#EXT-X-ENDLIST\n".encode(),
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"\xff\xfb\x90\x00" * 5,
            wav_of_silence(),
        ],
        ids=["empty", "text", "zeros", "playlist", "concat", "headers-only", "wav"],
    )
    def test_no_sound(self, folder: Path, data: bytes) -> None:
        (folder / "x.opus").write_bytes(b"earlier")
        with pytest.raises(Permanent) as caught:
            encode(io.BytesIO(data), folder / "x.opus", bitrate=24_000, timeout=60)
        said = str(caught.value)
        assert 10 < len(said) < 400 and "0x" not in said and "\n" not in said
        assert names(folder) == ["x.opus"] and (folder / "x.opus").read_bytes() == b"earlier"

    def test_a_recording_that_was_cut_off_is_kept_as_far_as_it_goes(self, folder: Path) -> None:
        data = SPEECH.read_bytes()
        whole = encode(io.BytesIO(data), folder / "x.opus", bitrate=24_000)
        half = encode(io.BytesIO(data[: len(data) // 2]), folder / "x.opus", bitrate=24_000)
        assert half.seconds == pytest.approx(whole.seconds / 2, abs=0.2)

    def test_errors_of_the_source_pass(self, folder: Path) -> None:
        source = io.BufferedReader(Dribble(SPEECH.read_bytes()[:20_000], Retryable("the store is away")))
        with pytest.raises(Retryable, match="the store is away"):
            encode(source, folder / "x.opus", bitrate=24_000)
        assert names(folder) == []

    def test_a_full_disk_is_no_fault_of_the_recording(self, folder: Path) -> None:
        (folder / "x.opus.part").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            encode(io.BytesIO(SPEECH.read_bytes()), folder / "x.opus", bitrate=24_000)
        assert names(folder) == []

    def test_many_threads(self, folder: Path) -> None:
        before = len(names(Path("/proc/self/fd")))

        def make(number: int) -> str:
            source = io.BytesIO(SOUNDS[number % 3].read_bytes())
            return encode(source, folder / f"{number}.opus", bitrate=24_000, timeout=120).sha256

        with ThreadPoolExecutor(6) as pool:
            made = list(pool.map(make, range(12)))
        assert made == made[:3] * 4 and len(set(made)) == 3
        assert len(names(Path("/proc/self/fd"))) == before


class TestBadPrograms:
    def test_one_that_hangs_is_killed_with_its_children(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_ffmpeg(tmp_path / "bin", monkeypatch, f"sleep 600 & echo $$ $! > {tmp_path}/pids; wait")
        with pytest.raises(Permanent, match="not done with it in 1 seconds"):
            encode(io.BytesIO(bytes(1 << 20)), folder / "x.opus", bitrate=24_000, timeout=1)
        assert names(folder) == []
        for pid in (tmp_path / "pids").read_text().split():
            assert ends(int(pid))

    def test_one_that_is_stopped_is_killed(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_ffmpeg(tmp_path / "bin", monkeypatch, f"echo $$ > {tmp_path}/pids; kill -STOP $$")
        with pytest.raises(Permanent, match="not done with it in 1 seconds"):
            encode(io.BytesIO(bytes(1 << 20)), folder / "x.opus", bitrate=24_000, timeout=1)
        assert ends(int((tmp_path / "pids").read_text()))

    def test_one_that_closes_its_output_and_goes_on(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_ffmpeg(tmp_path / "bin", monkeypatch, f"echo $$ > {tmp_path}/pids; exec >&- 2>&-; exec sleep 600")
        with pytest.raises(Permanent, match="not done"):
            encode(io.BytesIO(b""), folder / "x.opus", bitrate=24_000, timeout=1)
        assert ends(int((tmp_path / "pids").read_text()))

    def test_an_exception_kills_it(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_ffmpeg(tmp_path / "bin", monkeypatch, f"sleep 600 & echo $$ $! > {tmp_path}/pids; cat > /dev/null; wait")

        class Interrupted(Dribble):
            def readinto(self, buffer: Any) -> int:
                if not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
                    buffer[:1] = b"x"
                    return 1
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            encode(Interrupted(b""), folder / "x.opus", bitrate=24_000)  # type: ignore[arg-type]
        for pid in (tmp_path / "pids").read_text().split():
            assert ends(int(pid))

    def test_one_that_stops_reading_and_talks_without_end(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = "exec <&-; yes noise | head -c 30000000 >&2; echo the reason >&2; echo Conversion failed! >&2; exit 3"
        fake_ffmpeg(tmp_path / "bin", monkeypatch, script)
        source = io.BytesIO(bytes(1 << 20))
        tracemalloc.start()
        try:
            with pytest.raises(Permanent, match=r"^ffmpeg: the reason$"):
                encode(source, folder / "x.opus", bitrate=24_000, timeout=120)
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()

    def test_one_that_writes_without_end(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_ffmpeg(tmp_path / "bin", monkeypatch, f"echo $$ > {tmp_path}/pids; exec cat /dev/zero")
        with pytest.raises(Permanent, match="more than 1000000 bytes"):
            encode(io.BytesIO(b"x"), folder / "x.opus", bitrate=24_000, most=1_000_000)
        assert names(folder) == []
        assert ends(int((tmp_path / "pids").read_text()))

    def test_one_that_says_nothing(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_ffmpeg(tmp_path / "bin", monkeypatch, "cat > /dev/null")
        with pytest.raises(Permanent, match="no sound"):
            encode(io.BytesIO(b"x"), folder / "x.opus", bitrate=24_000)
        assert names(folder) == []

    def test_none(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(Fatal, match="install"):
            encode(io.BytesIO(b"x"), folder / "x.opus", bitrate=24_000)


class TestDecode:
    pytestmark = pytest.mark.usefixtures("numpy")

    def test_missing_file(self, folder: Path) -> None:
        with pytest.raises(FileNotFoundError):
            next(decode(folder / "x.opus"))

    @pytest.mark.usefixtures("either_ffmpeg")
    @pytest.mark.parametrize("data", [b"", b"OggS", SPEECH.read_bytes()], ids=["empty", "magic", "mp3"])
    def test_not_opus(self, folder: Path, data: bytes) -> None:
        (folder / "x.opus").write_bytes(data)
        with pytest.raises(Permanent):
            next(decode(folder / "x.opus", timeout=60))

    def test_a_long_recording_comes_in_windows_that_are_cut_where_it_is_quiet(
        self, folder: Path, numpy: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode(io.BytesIO(SPEECH.read_bytes() * 3), folder / "x.opus", bitrate=24_000)
        (whole,) = decode(folder / "x.opus")
        monkeypatch.setattr(transcode, "WINDOW_SECONDS", 4)
        windows = list(decode(folder / "x.opus"))
        assert numpy.array_equal(numpy.concatenate(windows), whole)
        assert len(windows) > 4
        assert all(0 < len(window) <= 4 * 16_000 for window in windows)
        ends = [numpy.sqrt((window[-800:] ** 2).mean()) for window in windows[:-1]]
        assert max(ends) < 0.3 * numpy.sqrt((whole**2).mean())

    def test_two_hours_take_no_more_memory_than_a_window(self, folder: Path) -> None:
        """Of 460 MB of samples. Silence, of which MP3 needs little: its frames hold nothing."""
        frame = b"\xff\xe3\x18\xc4".ljust(72, b"\0")  # MPEG-2.5, 8 kb/s, 8 kHz, mono: 72 ms
        encoded = encode(io.BytesIO(frame * 100_000), folder / "x.opus", bitrate=6_000)
        assert encoded.seconds == pytest.approx(7200, abs=1)
        tracemalloc.start()
        try:
            seconds = [len(window) / 16_000 for window in decode(folder / "x.opus", timeout=600)]
            assert tracemalloc.get_traced_memory()[1] < 300_000_000
        finally:
            tracemalloc.stop()
        assert sum(seconds) == pytest.approx(7200, abs=1)
        assert max(seconds) <= transcode.WINDOW_SECONDS

    def test_time_in_which_nobody_asks_for_a_window_does_not_count(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode(io.BytesIO(SPEECH.read_bytes() * 20), folder / "x.opus", bitrate=24_000)
        monkeypatch.setattr(transcode, "WINDOW_SECONDS", 4)
        windows = decode(folder / "x.opus", timeout=30)
        clock = time.monotonic
        next(windows)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)
        next(windows)
        windows.close()

    def test_more_sound_than_it_says_it_has(self, folder: Path) -> None:
        encoded = encode(io.BytesIO(SPEECH.read_bytes()), folder / "x.opus", bitrate=24_000)
        assert len(list(decode(folder / "x.opus", longest=encoded.seconds + 0.1))) == 1
        with pytest.raises(Permanent, match="more sound in it than its length says"):
            list(decode(folder / "x.opus", longest=encoded.seconds - 0.1))

    def test_it_is_told_no_secret(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("S3_SECRET_KEY", "xyzzy")
        fake_ffmpeg(tmp_path / "bin", monkeypatch, "env >&2; exit 1")
        with pytest.raises(Permanent) as caught:
            encode(io.BytesIO(b"x"), folder / "x.opus", bitrate=24_000)
        assert "xyzzy" not in str(caught.value)

    def test_one_that_is_closed_early_leaves_no_program(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "x.opus").write_bytes(b"x")
        fake_ffmpeg(tmp_path / "bin", monkeypatch, f"echo $$ > {tmp_path}/pids; exec cat /dev/zero")
        monkeypatch.setattr(transcode, "WINDOW_SECONDS", 4)
        windows = decode(folder / "x.opus", timeout=60)
        next(windows)
        windows.close()
        assert ends(int((tmp_path / "pids").read_text()))


class TestDuration:
    def test_of_files_that_were_cut_off_or_are_none(self, folder: Path) -> None:
        opus = folder / "x.opus"
        encoded = encode(io.BytesIO(SPEECH.read_bytes()), opus, bitrate=24_000)
        assert duration(opus) == encoded.seconds
        whole = opus.read_bytes()
        for data, why in (
            (whole[:-10], "cut off"),
            (whole + b"OggS", "cut off"),
            (whole[: len(whole) // 2], "cut off"),
            (b"", "not Ogg Opus"),
            (whole[:30], "not Ogg Opus"),
            (SPEECH.read_bytes(), "not Ogg Opus"),
        ):
            opus.write_bytes(data)
            with pytest.raises(Permanent, match=why):
                duration(opus)
