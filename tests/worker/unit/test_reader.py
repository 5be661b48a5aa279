"""The parser in a process of its own finds what it finds in ours; and if it dies, the archive is to blame, not we."""

from __future__ import annotations

import io
import lzma
import os
import signal
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from test_archive import Pipe, entry, foreign

from lab_audio.contracts import SourceFile
from lab_audio.errors import Retryable
from lab_audio.media import archive, reader

GOOD = foreign(
    (entry("a.mp3"), b"a" * 300_000),
    (entry("b/ü.mp3"), b""),
    (entry("link.mp3", tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
    (entry("a.mp3"), b"again"),
    (entry("z\udcff.mp3"), b"z" * 1000),
)


def found_by(read: Callable[..., object], data: bytes) -> tuple[list[object], str | None]:
    """Entries with their bytes, and how it ended."""
    found: list[object] = []
    try:
        for member in read(Pipe(data), len(data)):  # type: ignore[attr-defined]
            found.append((member.name, member.size, member.problem, member.file and member.file.read()))
    except archive.ArchiveBroken as error:
        return found, str(error)
    return found, None


@pytest.mark.parametrize("cut", [0, 100, 600, 200_000, 300_600, len(GOOD) - 1, None])
def test_it_finds_the_same(cut: int | None) -> None:
    data = GOOD[:cut]
    here = found_by(lambda stream, size: archive.read(stream), data)
    assert found_by(reader.read, data) == here


def test_members_that_nobody_reads_are_passed_over() -> None:
    names = [member.name for member in reader.read(Pipe(GOOD), len(GOOD))]
    assert names == [member.name for member in archive.read(Pipe(GOOD))]


def test_sources() -> None:
    with tarfile.open(fileobj=io.BytesIO(GOOD)) as tar:
        expected = [SourceFile.from_tar(info) for info in tar if info.isreg()]
    assert list(reader.sources(Pipe(GOOD), len(GOOD))) == expected


class Slow(Pipe):
    """Gives a part, then does something, then the rest."""

    def __init__(self, data: bytes, then: Callable[[], None]) -> None:
        super().__init__(data, 50_000)
        self.then = then

    def read(self, size: int = -1) -> bytes:
        if self._file.tell() == 200_000:
            self.then()
        return super().read(size)


def away() -> bytes:
    raise Retryable("the store is away")


def test_what_the_stream_raises_passes_through() -> None:
    with pytest.raises(Retryable, match="the store is away"):
        for member in reader.read(Slow(GOOD, away), len(GOOD)):
            assert member.file is not None
            member.file.read()


def children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_a_parser_that_dies_is_the_archives_failure() -> None:
    def crash() -> None:
        for child in children():
            os.kill(child, signal.SIGSEGV)

    with pytest.raises(archive.ArchiveBroken, match=r"its reader died over it \(SIGSEGV\)"):
        for member in reader.read(Slow(GOOD, crash), len(GOOD)):
            assert member.file is not None
            member.file.read()
    assert children() == set()


def test_a_recording_is_whole_before_the_next_header_is_looked_at() -> None:
    """What dies over that one is not to take this one with it."""
    data, had = foreign((entry("a.mp3"), b"a" * 199_168), (entry("b.mp3"), b"b" * 300_000)), threading.Event()

    def crash() -> None:
        had.wait(20)
        for child in children():
            os.kill(child, signal.SIGSEGV)

    with pytest.raises(reader.Died):
        for member in reader.read(Slow(data, crash), len(data)):
            assert member.file is not None
            assert len(member.file.read()) == 199_168
            had.set()
    assert had.is_set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_parser_that_somebody_ends_is_nobodys_failure(number: signal.Signals) -> None:
    def end() -> None:
        for child in children():
            os.kill(child, number)

    with pytest.raises(reader.Killed, match=number.name):
        for member in reader.read(Slow(GOOD, end), len(GOOD)):
            assert member.file is not None
            member.file.read()
    assert children() == set()


def test_what_the_stream_raises_at_its_very_end_passes_through() -> None:
    class Torn(Pipe):
        def read(self, size: int = -1) -> bytes:
            return super().read(size) or away()

    with pytest.raises(Retryable, match="the store is away"):
        list(reader.sources(Torn(GOOD), len(GOOD)))


def test_memory_that_does_not_do_is_told() -> None:
    """An xz header that claims a dictionary of 4 GiB."""
    packed = lzma.compress(GOOD, lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}])
    header = bytearray(packed[12:24])
    header[header.index(b"\x21\x01") + 2] = 40
    header[8:12] = zlib.crc32(header[:8]).to_bytes(4, "little")
    with pytest.raises(archive.ArchiveBroken, match="it needs more than 1024 MiB of memory"):
        list(reader.read(Pipe(packed[:12] + bytes(header) + packed[24:]), len(packed), compressed=True))


def test_nothing_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resource.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert len(list(reader.sources(Pipe(GOOD), len(GOOD)))) > 0
    assert not (tmp_path / "mark").exists()


def test_a_parser_that_is_kept_at_work_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CPU_SECONDS", 1)
    flood = foreign(*((entry(f"{n}.mp3"), b"") for n in range(5_000)))[: 5_000 * 512]
    with pytest.raises(archive.ArchiveBroken, match="kept its reader at work"):
        for _member in reader.read(Pipe(flood * 30), 0):
            pass


def test_one_who_has_read_enough_leaves_nothing_behind() -> None:
    members = reader.read(Pipe(GOOD), len(GOOD))
    assert next(members).name == "a.mp3"
    members.close()  # type: ignore[attr-defined]
    assert children() == set()
    assert [thread.name for thread in threading.enumerate() if thread.name == "archive"] == []


def test_it_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_SECRET_KEY", "xyzzy")
    seen: list[bytes] = []

    def look() -> None:
        seen.extend(Path(f"/proc/{child}/environ").read_bytes() for child in children())

    for _member in reader.read(Slow(GOOD, look), len(GOOD)):
        pass
    assert seen
    assert b"xyzzy" not in b"".join(seen)
