"""MP3 to the kept Opus, and Opus to samples: ffmpeg between pipes in a sandbox, given no path and no way to open one.

The Opus is mono and 16 kHz, as speech recognition takes it, and bit-exact: encoding the same bytes again
gives the same file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lab_audio import notify
from lab_audio.errors import Fatal, Permanent
from lab_audio.media import sandbox

SAMPLE_RATE = 16_000
LONGEST = 3600.0  # seconds of work, where no timeout is given
WINDOW_SECONDS = 1200  # of sound that are in memory at once: 77 MB
PAUSE_SECONDS = 30  # at a window's end, in which the quietest moment is where it is cut
TELL_SECONDS = 5.0  # between two signs of life while ffmpeg is at it; its deadline bounds them
STOPPED_BY_SIGNAL = 255  # how ffmpeg ends when it is asked to
_BLOCK = 1 << 16
_STDERR_KEPT = 1 << 13
_MAX_PAGE = 27 + 255 + 255 * 255
_FULL_PAGE, _PAGE_SECONDS = 27 + 255, 255 * 0.12  # least bytes and most seconds of as many packets as one holds
_GRANULE_RATE = 48_000

_QUIET = ["-nostdin", "-hide_banner", "-loglevel", "error"]
# Said after the line that tells what went wrong.
_SECONDARY = re.compile(
    r"pipe:[01]: |Conversion failed!|Error opening (in|out)put file|Exiting|out: Nothing was written"
)


class Unfinished(Permanent):
    """ffmpeg was killed, by the kernel for want of memory perhaps, or out of time; the recording may be good."""


@dataclass(frozen=True)
class Encoded:
    """An Opus file that was made: its duration in seconds, SHA-256 and size in bytes."""

    seconds: float
    sha256: str
    size: int


def ffmpeg_command() -> str:
    """Path of ffmpeg: the system's, else the one of imageio-ffmpeg. Raises Fatal without either."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise Fatal(
            "ffmpeg is missing: install it (apt install ffmpeg), or see that PATH names its directory"
        ) from None


def encode(
    mp3: BinaryIO, opus: Path, *, bitrate: int, timeout: float | None = None, most: int | None = None
) -> Encoded:
    """Encode an MP3, read to its end, at `bitrate` bits per second; `opus` appears whole or not at all.

    Raises Permanent if there is no audio in it, or more comes out than `most` bytes, or than they last at that rate;
    Unfinished if `timeout` seconds do not do; Fatal if ffmpeg is missing; OSError if `opus` cannot be written; and what
    reading `mp3` raises.
    """
    argv = [ffmpeg_command(), *_QUIET]
    argv += ["-protocol_whitelist", "pipe", "-f", "mp3", "-i", "pipe:0"]
    argv += ["-map", "0:a:0", "-vn", "-sn", "-dn", "-map_metadata", "-1", "-map_chapters", "-1"]
    argv += [
        "-ac",
        "1",
        "-ar",
        str(SAMPLE_RATE),
        "-c:a",
        "libopus",
        "-b:a",
        str(bitrate),
        "-application",
        "voip",
    ]
    argv += ["-fflags", "+bitexact", "-flags:a", "+bitexact", "-f", "ogg", "pipe:1"]
    part = opus.with_name(f"{opus.name}.part")
    digest, size = hashlib.sha256(), 0
    try:
        with part.open("wb", buffering=0) as file, closing(_output(argv, mp3, timeout)) as output:
            for block in output:
                left = memoryview(block)
                while left:
                    left = left[file.write(left) :]
                digest.update(block)
                size += len(block)
                if most is not None and size > most:
                    raise Permanent(f"ffmpeg makes more than {most} bytes of it")
            os.fsync(file.fileno())
        seconds = duration(part) if size else 0.0
        if not seconds:
            raise Permanent("there is no sound in it")
        if most is not None and seconds > most * 8 / bitrate:
            raise Permanent(f"ffmpeg says that {seconds:.0f} seconds of sound are in it, more than it can hold")
        part.replace(opus)
    finally:
        part.unlink(missing_ok=True)
    return Encoded(seconds, digest.hexdigest(), size)


def decode(opus: Path, *, timeout: float | None = None, longest: float | None = None) -> Generator[Any, None, None]:
    """Samples of an Opus file, in windows: float32 arrays of shape (n,), mono, 16 kHz, in [-1, 1].

    A recording of at most WINDOW_SECONDS is one window; a longer one is cut where it is quiet, and decoded no faster
    than it is asked for. `timeout` is of ffmpeg's own seconds. Close it if it is not read to the end.
    Raises FileNotFoundError; Permanent if it cannot be decoded, or has more than `longest` seconds, Unfinished if not
    in `timeout` seconds; Fatal.
    """
    argv = [ffmpeg_command(), *_QUIET]
    argv += ["-protocol_whitelist", "pipe", "-f", "ogg", "-i", "pipe:0"]
    argv += ["-map", "0:a:0", "-ac", "1", "-ar", str(SAMPLE_RATE), "-c:a", "pcm_s16le", "-f", "s16le", "pipe:1"]
    samples = bytearray()
    heard = 0
    with opus.open("rb") as file, closing(_output(argv, file, timeout)) as output:
        for block in output:
            samples += block
            if longest is not None and (heard + len(samples)) / (2 * SAMPLE_RATE) > longest:
                raise Permanent(f"{opus.name}: there is more sound in it than its length says")
            while len(samples) > 2 * SAMPLE_RATE * WINDOW_SECONDS:
                end = 2 * _quiet_moment(samples)
                window = _floats(samples[:end])
                del samples[:end]
                heard += end
                yield window
    if samples:
        yield _floats(samples)
    elif not heard:
        raise Permanent(f"{opus.name}: there is no sound in it")


def _quiet_moment(samples: bytearray) -> int:
    """Where to cut a full window of 16-bit samples: in the middle of the quietest tenth of a second near its end."""
    import numpy as np

    tenth, end = SAMPLE_RATE // 10, SAMPLE_RATE * WINDOW_SECONDS
    start = end - min(PAUSE_SECONDS, WINDOW_SECONDS // 2) * SAMPLE_RATE
    tail = np.frombuffer(bytes(samples[2 * start : 2 * end]), dtype="<i2").astype(np.float32)
    loudness = np.square(tail.reshape(-1, tenth)).sum(axis=1)
    return start + int(loudness.argmin()) * tenth + tenth // 2


def _floats(samples: bytearray) -> Any:
    import numpy as np

    return np.frombuffer(samples, dtype="<i2").astype(np.float32) / np.float32(32768)


def duration(opus: Path) -> float:
    """Seconds of an Ogg Opus file, from its last page. Raises Permanent if it is not one, or says what cannot be.

    RFC 7845: the granule position counts samples at 48 kHz (section 4), of which the first `pre-skip`, named
    in the identification header (section 5.1), are not played. The page layout is RFC 3533, section 6. A packet has at
    most 120 ms (RFC 6716, section 3.2).
    """
    with opus.open("rb") as file:
        head = file.read(_MAX_PAGE)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MAX_PAGE))
        tail = file.read()
    packet = 27 + head[26] if len(head) > 27 else 0
    if head[:4] != b"OggS" or head[packet : packet + 8] != b"OpusHead" or len(head) < packet + 19:
        raise Permanent(f"{opus.name} is not Ogg Opus")
    pre_skip = int.from_bytes(head[packet + 10 : packet + 12], "little")
    start = len(tail)
    while (start := tail.rfind(b"OggS", 0, start)) >= 0:
        # "OggS" may also occur within a packet: the last page is the one that ends where the file does.
        table = tail[start + 27 : start + 27 + tail[start + 26]] if start + 27 <= len(tail) else b""
        if table and start + 27 + len(table) + sum(table) == len(tail):
            granule = int.from_bytes(tail[start + 6 : start + 14], "little", signed=True)
            seconds = max(0, granule - pre_skip) / _GRANULE_RATE
            if seconds > (1 + size // _FULL_PAGE) * _PAGE_SECONDS:
                raise Permanent(f"{opus.name} says that it is {seconds:.0f} seconds long, and has {size} bytes")
            return seconds
    raise Permanent(f"{opus.name} is cut off")


def _output(argv: list[str], source: BinaryIO, timeout: float | None) -> Generator[bytes, None, None]:
    """What a program makes of `source`, its input; every program of this room is started here.

    Raises Permanent with its last words if it fails, Unfinished if it is killed or not done in time, Fatal if somebody
    ended it. However this ends, also where it is closed before, the program has ended, and the sandbox with all in it.
    The time in which nobody asks for more does not count.
    """
    try:
        process = subprocess.Popen(
            sandbox.enclosed(argv, math.ceil(timeout or LONGEST)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={},  # no secret, and nothing that would lead it elsewhere
        )
    except OSError as error:
        raise Fatal(f"{argv[0]} cannot be started: {error.strerror}") from error
    words = bytearray()
    try:
        yield from _pump(process, source, words, timeout)
    except subprocess.TimeoutExpired:
        raise Unfinished(f"ffmpeg was not done with it in {timeout:g} seconds") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
        process.wait()
    code = process.returncode
    by = sandbox.ended_by(code)
    asked = by in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) or code == STOPPED_BY_SIGNAL
    if asked and (code < 0 or sandbox.problem()):  # else it was said in the sandbox, where anything can be said
        raise Fatal("ffmpeg was ended from outside; the recording is not to blame")
    if asked or by == signal.SIGKILL:
        raise Unfinished("ffmpeg was killed")
    if by == signal.SIGXCPU:
        raise Unfinished(f"ffmpeg was not done with it in {timeout or LONGEST:g} seconds of work")
    if code:
        raise Permanent(f"ffmpeg: {_last_words(words) or (by.name if by else f'ended with {code}')}")


def _pump(
    process: subprocess.Popen[bytes], source: BinaryIO, words: bytearray, timeout: float | None
) -> Iterator[bytes]:
    """Serve the three pipes until the program has ended; `words` is the end of stderr. Raises TimeoutExpired."""
    assert process.stdin and process.stdout and process.stderr
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    waiting: memoryview | None = memoryview(b"")
    outputs = {process.stdout, process.stderr}
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdin, selectors.EVENT_WRITE)
        for output in outputs:
            ready.register(output, selectors.EVENT_READ)
        while outputs:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(process.args, timeout or 0)
            if timeout is not None:
                notify.progress()
            for key, _events in ready.select(None if timeout is None else min(left, TELL_SECONDS)):
                if key.fileobj is process.stdin:
                    waiting = waiting or memoryview(source.read(_BLOCK))
                    # A program that has heard enough closes its end.
                    with suppress(BlockingIOError):
                        try:
                            waiting = waiting[os.write(key.fd, waiting) :] if waiting else None
                        except BrokenPipeError:
                            waiting = None
                    if waiting is None:
                        ready.unregister(process.stdin)
                        process.stdin.close()
                elif block := os.read(key.fd, _BLOCK):
                    if key.fileobj is process.stdout:
                        notify.progress()
                        given = time.monotonic()
                        yield block
                        deadline += time.monotonic() - given
                    else:
                        words += block
                        del words[:-_STDERR_KEPT]
                else:
                    ready.unregister(key.fileobj)
                    outputs.discard(key.fileobj)
    process.wait(None if timeout is None else max(0, deadline - time.monotonic()))


def _last_words(words: bytearray) -> str:
    """The last line that tells what went wrong, fit for a log: no addresses, nothing unprintable."""
    lines = []
    for line in words.decode(errors="replace").splitlines():
        plain = "".join(c for c in line if c.isprintable())
        lines.append(re.sub(r"\[(\w+)[^\]]* @ 0x[0-9a-f]+\] *", r"\1: ", plain).strip()[:300])
    lines = [line for line in lines if line]
    return next((line for line in reversed(lines) if not _SECONDARY.match(line)), lines[-1] if lines else "")
