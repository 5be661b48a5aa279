"""The tar room: archives that come out byte-equal each time, and a reader that trusts no archive."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import lzma
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from lab_audio import notify
from lab_audio.contracts import MAX_INTEGER, SourceFile, item_of
from lab_audio.errors import Fatal, LabAudioError, Permanent, Retryable

BLOCK = 512
RECORD = 20 * BLOCK
CHUNK = 1 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_MEMBERS = 100_000
MAX_RATIO = 100  # of a compressed archive's content to itself; sound hardly packs

_BZIP2 = tuple(b"BZh%d1AY&SY" % level for level in range(1, 10))  # "BZh" alone a name may begin with, too
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    **dict.fromkeys(_BZIP2, "bzip2"),
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    **dict.fromkeys(_BZIP2, bz2.BZ2File),
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_NOT_A_FILE = {
    tarfile.SYMTYPE: "is a symbolic link, not a file",
    tarfile.LNKTYPE: "is a hard link, not a file",
    tarfile.CHRTYPE: "is a device, not a file",
    tarfile.BLKTYPE: "is a device, not a file",
    tarfile.FIFOTYPE: "is a named pipe, not a file",
}


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes or fewer; none at the end."""


class ArchiveBroken(Permanent):
    """What was read is no whole, plain tar; the members before the damage are good."""


@dataclass(frozen=True)
class Built:
    """An archive on disk: SHA-256 in hex, size in bytes, number of members."""

    sha256: str
    size: int
    file_count: int


@dataclass(frozen=True)
class Member:
    """One entry of an archive that is no directory; `file` can be read until the next one is asked for.

    `name` is clean text and unique in its archive. Where `problem` says why the entry is not taken,
    `file` is None.
    """

    name: str
    size: int
    file: BinaryIO | None
    problem: str | None


def build(members: Iterable[tuple[SourceFile, BinaryIO]], path: Path) -> Built:
    """Write a PAX tar of `members`, in order, to `path` (mode 0600); the same members give the same bytes.

    The headers are written here and not by tarfile, whose bytes differ between versions of Python.
    Raises Retryable where a member's stream is not as long as announced or the disk is full, Fatal for
    other trouble with `path`, and what the streams raise. `path` may be left incomplete then.
    """
    digest, size, count = hashlib.sha256(), 0, 0
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb", buffering=CHUNK) as out:
            os.fchmod(fd, 0o600)

            def write(data: bytes) -> None:
                nonlocal size
                out.write(data)
                digest.update(data)
                size += len(data)
                notify.progress()

            for file, stream in members:
                write(_headers_of(file))
                left = file.size
                while left and (data := stream.read(min(left, CHUNK))):
                    write(data)
                    left -= len(data)
                if left or stream.read(1):
                    came = f"only {file.size - left}" if left else "more than that"
                    raise Retryable(
                        f"{file.path!r}: {file.size} bytes were announced, {came} came; did the file change?"
                    )
                write(bytes(-file.size % BLOCK))
                count += 1
            write(bytes(2 * BLOCK))
            write(bytes(-size % RECORD))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (Retryable if full else Fatal)(f"cannot write the archive {path}: {error.strerror}") from error
    return Built(digest.hexdigest(), size, count)


def _headers_of(file: SourceFile) -> bytes:
    name = file.path.encode("utf-8", "surrogateescape")
    records = _pax_record(b"mtime", file.mtime.encode())
    if len(name) > 100 or not name.isascii():
        records = _pax_record(b"path", name) + records
    if file.size >= 8**11:
        records += _pax_record(b"size", b"%d" % file.size)
    return (
        _header(b"././@PaxHeader", len(records), 0, b"x")
        + records
        + bytes(-len(records) % BLOCK)
        + _header(file.path.encode("ascii", "replace"), file.size, file.mtime_ns // 10**9, b"0")
    )


def _header(name: bytes, size: int, mtime: int, kind: bytes) -> bytes:
    """One ustar block. Numbers that do not fit are 0 here and exact in the pax records."""

    def octal(value: int) -> bytes:
        return b"%011o\0" % (value if 0 <= value < 8**11 else 0)

    block = struct.pack(
        "100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x",
        name, b"0000644", b"0000000", b"0000000", octal(size), octal(mtime), b" " * 8, kind, b"",
        b"ustar", b"00", b"", b"", b"0000000", b"0000000", b"",
    )  # fmt: skip
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (key, value)
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%s" % (length, rest)


def read(stream: Readable, *, compressed: bool = False) -> Iterator[Member]:
    """The entries of a tar, in order, without directories; `stream` is read once, to its end.

    `compressed`: it may be packed with gzip, bzip2 or xz, into no less than 1 / MAX_RATIO of its size.
    Raises ArchiveBroken, after all members before the damage, where the archive is truncated, garbled, too large or
    not a tar; reading a member that is cut off raises it too. What `stream` raises passes through.
    """
    forward = _Forward(_unpacked(stream) if compressed else stream)
    seen: dict[int, int] = {}
    for info in _entries(forward):
        if info.isdir():
            continue
        if len(seen) == MAX_MEMBERS:
            raise ArchiveBroken(f"more than {MAX_MEMBERS} members")
        name, repeated = _unique(_clean(info.name), seen)
        problem = _problem(info) or ("name occurs twice" if repeated else None)
        file = None if problem else cast(BinaryIO, io.BufferedReader(_Body(forward, info.size), 1 << 16))
        yield Member(name, info.size, file, problem)


def sources(stream: Readable) -> Iterator[SourceFile]:
    """What `build` was given: path, size and exact mtime of each regular member. Raises as `read` does."""
    for info in _entries(_Forward(stream)):
        if not _problem(info):
            yield SourceFile.from_tar(info)


def _problem(info: tarfile.TarInfo) -> str | None:
    """Why an entry is not a plain file, for a person."""
    if info.issparse():
        return "is stored sparse; make the archive without --sparse"
    if info.isreg():
        return None
    return _NOT_A_FILE.get(info.type, f"is of type {info.type!r}, not a file")


def _clean(name: str) -> str:
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    return text or "(no name)"


def _unique(name: str, seen: dict[int, int]) -> tuple[str, bool]:
    """A name whose item is new, and whether that took a number. `seen`: item to the last number used."""

    def item(text: str) -> int:
        return int(item_of(text), 16)

    unique, first = name, item(name)
    while (key := item(unique)) in seen:
        seen[first] += 1
        unique = f"{name} ({seen[first]})"
    seen[key] = 1
    return unique, unique != name


def _entries(forward: _Forward) -> Iterator[tarfile.TarInfo]:
    """Every header that tarfile finds; then, as it is lenient there, the end must be the end."""
    archive: tarfile.TarFile | None = None
    while True:
        try:
            archive = archive or tarfile.TarFile(fileobj=cast(BinaryIO, forward), encoding="utf-8")
            info = archive.next()
        except (LabAudioError, MemoryError):
            raise
        except Exception as error:  # hostile headers make tarfile raise nearly anything
            if forward.failure:
                raise forward.failure from None
            raise ArchiveBroken(_why(forward, f" ({error})")) from None
        if info is None:
            if forward.failure:
                raise forward.failure
            break
        if not 0 <= info.size <= MAX_INTEGER:
            raise ArchiveBroken(f"header before byte {forward.position} has an impossible size")
        archive.members.clear()  # type: ignore[attr-defined]
        forward.header_bytes = 0
        yield info
    if forward.last.strip(b"\0"):
        raise ArchiveBroken(_why(forward))
    second = forward.take(BLOCK)
    if second.strip(b"\0"):
        raise ArchiveBroken(f"data after the end of the archive, before byte {forward.position}")
    if len(second) < BLOCK:
        raise ArchiveBroken("archive is truncated: its end is missing")
    while data := forward.take(CHUNK):
        if data.strip(b"\0"):
            raise ArchiveBroken(f"data after the end of the archive, before byte {forward.position}")


def _why(forward: _Forward, detail: str = "") -> str:
    """What is wrong with the block that tarfile read last."""
    if forward.position <= BLOCK:
        for magic, kind in _COMPRESSED.items():
            if forward.last.startswith(magic):
                return f"is {kind}-compressed; only plain tar is taken"
        if len(forward.last) == BLOCK:
            return "is not a tar archive"
    if len(forward.last) < forward.asked:
        return "archive is truncated"
    return f"header before byte {forward.position} is broken{detail}"


class _Forward:
    """A stream read from front to back, as tarfile wants it: full reads, tell, and a seek that only skips."""

    mode = "rb"

    def __init__(self, stream: Readable) -> None:
        self._raw = _Raw(stream)
        self._buffer = io.BufferedReader(self._raw, CHUNK)
        self.position = 0
        self.header_bytes = 0
        self.asked = 0
        self.last = b""

    @property
    def failure(self) -> BaseException | None:
        """What the stream itself raised."""
        return self._raw.failure

    def take(self, size: int) -> bytes:
        """As many bytes as asked for, fewer only at the end."""
        data = self._buffer.read(size)
        self.position += len(data)
        return data

    def read(self, size: int) -> bytes:
        """What tarfile reads: headers. It would read one of gigabytes, and a cut-off sparse map for ever."""
        self.header_bytes += size
        if size < 0 or self.header_bytes > MAX_HEADER_BYTES:
            raise ArchiveBroken(f"header at byte {self.position} is larger than {MAX_HEADER_BYTES} bytes")
        self.asked, self.last = size, self.take(size)
        return self.last

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if position < self.position:
            raise ArchiveBroken(f"header before byte {self.position} points backwards")
        while self.position < position:
            if not self.take(min(position - self.position, CHUNK)):
                raise ArchiveBroken("archive is truncated")

    def close(self) -> None:
        """tarfile closes what it opened; the stream is the caller's."""


def _unpacked(stream: Readable) -> Readable:
    """The bytes of an archive that may be compressed."""
    packed = _Packed(stream)
    for magic, opener in _OPENERS.items():
        if packed.head.startswith(magic):
            return _Unpacked(packed, opener(packed))
    return packed


class _Packed:
    """A stream whose first bytes are looked at before it is read, and that counts how many were read."""

    def __init__(self, stream: Readable) -> None:
        self._raw = _Raw(stream)
        self._buffer = io.BufferedReader(self._raw, CHUNK)
        self.head = self._next = self._buffer.read(max(map(len, _OPENERS)))
        self.position = 0

    @property
    def failure(self) -> BaseException | None:
        return self._raw.failure

    def read(self, size: int = -1, /) -> bytes:
        data, self._next = (self._next[:size], self._next[size:]) if self._next else (self._buffer.read1(size), b"")
        self.position += len(data)
        return data


class _Unpacked:
    """What a compressed stream holds. Raises ArchiveBroken where it is damaged, or unpacks to too much."""

    def __init__(self, packed: _Packed, opened: Any) -> None:
        self._packed, self._opened = packed, opened
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            data: bytes = self._opened.read1(size)  # of what comes before damage nothing is lost
        except EOFError:
            raise ArchiveBroken("archive is truncated") from None
        except (OSError, zlib.error, lzma.LZMAError) as error:
            if self._packed.failure:
                raise
            raise ArchiveBroken(f"its compression is broken ({error})") from None
        self._position += len(data)
        if self._position > MAX_RATIO * self._packed.position + CHUNK:
            raise ArchiveBroken(f"unpacks to more than {MAX_RATIO} times its size")
        return data


class _Raw(io.RawIOBase):
    """Anything with read(n), for io.BufferedReader; remembers what the stream itself raised."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.failure: BaseException | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except BaseException as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        return len(data)


class _Body(io.RawIOBase):
    """The bytes of one member."""

    def __init__(self, forward: _Forward, size: int) -> None:
        self._forward = forward
        self._position = forward.position
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._left:
            return 0
        if self._position != self._forward.position:
            raise ValueError("a member is read after the next one was asked for")
        data = self._forward.take(min(len(buffer), self._left, CHUNK))
        if not data:
            raise ArchiveBroken("archive is truncated")
        buffer[: len(data)] = data
        self._left -= len(data)
        self._position += len(data)
        return len(data)
