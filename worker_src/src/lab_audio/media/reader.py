"""An archive is read in a process of its own: what is in it may crash a parser, fill its memory, or keep it at work.

    stream --> feeding thread --> stdin [ parser ] stdout --> members

The parser is `archive.read` or `archive.sources`. What it finds comes back as frames: a length of four bytes and so
many bytes. A frame of JSON is an entry, or how it ended; after an entry that is a file come its bytes, in frames up to
an empty one.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from lab_audio.contracts import SourceFile
from lab_audio.errors import Retryable
from lab_audio.media import archive
from lab_audio.media.archive import ArchiveBroken, Member, Readable

MEMORY = 1 << 30  # bytes of address space
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CPU_SECONDS, BYTES_A_SECOND = 60, 5_000_000  # a bound; it needs a tenth of that
CHUNK = 1 << 18
STEP_SECONDS = 120  # of work over what it has read: less than systemd waits for a sign of life
PATIENCE = 5  # seconds until a process that says no more has ended
LENGTH = struct.Struct(">I")
BROKEN = 0xFFFFFFFF
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")  # no secret is among them


class Killed(Retryable):
    """The parser was killed, for want of this host's memory perhaps: the archive may be good."""


class Died(ArchiveBroken):
    """The parser died over the archive; what it found last may be missing."""


def read(stream: Readable, size: int, *, compressed: bool = False) -> Iterator[Member]:
    """The entries of an archive of so many bytes, as `archive.read` finds them.

    Raises ArchiveBroken, and Died where the parser dies over it; Killed. What `stream` raises passes through.
    """
    with _parser("unpack" if compressed else "read", stream, size) as frames:
        while entry := frames.entry():
            name, problem = entry["name"], entry["problem"]
            body = None if problem else _Body(frames)
            file = None if body is None else cast(BinaryIO, io.BufferedReader(body, CHUNK))
            yield Member(name, entry["size"], file, problem)
            while body is not None and body.read(CHUNK):
                pass


def sources(stream: Readable, size: int) -> Iterator[SourceFile]:
    """What an archive of so many bytes was made of, as `archive.sources` finds it. Raises as `read` does."""
    with _parser("sources", stream, size) as frames:
        while entry := frames.entry():
            yield SourceFile(**entry)


class _Frames:
    """What a parser says. `blamed`: the error for what it says of the archive, or for that it says no more (None)."""

    def __init__(self, out: BinaryIO, blamed: Callable[[str | None], BaseException]) -> None:
        self._out, self._blamed = out, blamed

    def entry(self) -> dict[str, Any] | None:
        """The next entry; None at the end."""
        found: dict[str, Any] = json.loads(self.take(self.length()))
        if "broken" in found:
            raise self._blamed(found["broken"])
        return None if "end" in found else found

    def length(self) -> int:
        return int(LENGTH.unpack(self.take(LENGTH.size))[0])

    def take(self, size: int) -> bytes:
        data = self._out.read(size)
        if len(data) < size:
            raise self._blamed(None)
        return data


class _Body(io.RawIOBase):
    """The bytes of one member."""

    def __init__(self, frames: _Frames) -> None:
        self._frames, self._left, self._ended = frames, 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._left and not self._ended:
            self._left = self._frames.length()
            if self._left == BROKEN:
                self._frames.entry()
            self._ended = not self._left
        data = self._frames.take(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


@contextmanager
def _parser(what: str, stream: Readable, size: int) -> Iterator[_Frames]:
    """A parser at work on a stream."""
    seconds = CPU_SECONDS + size // BYTES_A_SECOND
    process = subprocess.Popen(
        [sys.executable, "-m", "lab_audio.media.reader", what, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        cwd="/",  # Python would import what lies in the working directory
        start_new_session=True,  # Ctrl-C is not for it
    )
    stdin, stdout = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
    failures: list[BaseException] = []

    def feed() -> None:
        try:
            while block := stream.read(CHUNK):
                stdin.write(block)
        except BrokenPipeError:
            pass  # it has heard enough, or died
        except BaseException as error:
            failures.append(error)
        finally:
            with suppress(BrokenPipeError):
                stdin.close()

    feeder = threading.Thread(target=feed, name="archive", daemon=True)

    def blamed(said: str | None) -> BaseException:
        if said is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            code = process.wait()
            if failures:
                return failures[0]
            if -code in FROM_OUTSIDE:
                return Killed(
                    f"what reads the archive was killed ({signal.Signals(-code).name}); is memory short here?"
                )
            if code == -signal.SIGXCPU:
                return Died(f"it kept its reader at work for more than {min(seconds, STEP_SECONDS)} seconds")
            return Died(f"its reader died over it ({signal.Signals(-code).name if code < 0 else code})")
        return failures[0] if failures else ArchiveBroken(said)

    feeder.start()
    try:
        yield _Frames(stdout, blamed)
        feeder.join()
        if failures:
            raise failures[0]
    finally:
        process.kill()
        stdout.close()
        feeder.join()
        process.wait()


def _main(what: str, seconds: int) -> None:
    """The parser's process."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    with open(0, "rb", buffering=0) as stdin, open(1, "wb", buffering=CHUNK) as out:
        stream = _Input(stdin, seconds)
        try:
            for entry in (
                archive.sources(stream) if what == "sources" else archive.read(stream, compressed=what == "unpack")
            ):
                if isinstance(entry, Member):
                    _tell(out, {"name": entry.name, "size": entry.size, "problem": entry.problem})
                    if entry.file is not None:
                        _tell_body(out, entry.file)
                else:
                    _tell(out, vars(entry))
            _tell(out, {"end": True})
        except ArchiveBroken as error:
            _tell(out, {"broken": str(error)})
        except MemoryError:
            _tell(out, {"broken": f"it needs more than {MEMORY >> 20} MiB of memory to be read"})


class _Input:
    """The archive. Over what it gives at a time the parser may work for STEP_SECONDS, and for `seconds` over it all."""

    def __init__(self, stream: BinaryIO, seconds: int) -> None:
        self._stream, self._seconds = stream, seconds

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        used = math.ceil(sum(os.times()[:2]))
        limits = (min(used + STEP_SECONDS, self._seconds), self._seconds + PATIENCE)
        resource.setrlimit(resource.RLIMIT_CPU, limits)
        return data


def _tell(out: BinaryIO, entry: dict[str, Any]) -> None:
    text = json.dumps(entry).encode()
    out.write(LENGTH.pack(len(text)) + text)
    out.flush()  # what was found is not lost if this dies over what comes


def _tell_body(out: BinaryIO, file: BinaryIO) -> None:
    try:
        while data := file.read(CHUNK):
            out.write(LENGTH.pack(len(data)) + data)
    except (ArchiveBroken, MemoryError):
        out.write(LENGTH.pack(BROKEN))
        raise
    out.write(LENGTH.pack(0))
    out.flush()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
