"""The tar room: what is built comes back, twice the same; what is broken is told, never lost in silence."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import random
import resource
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lab_audio.contracts import SourceFile, item_of
from lab_audio.errors import Fatal, Permanent, Retryable
from lab_audio.media import archive

NS = 10**9


class Pipe:
    """A stream without seek or tell that gives a few bytes at a time."""

    def __init__(self, data: bytes, most: int = 1 << 30) -> None:
        self._file, self._most = io.BytesIO(data), most

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, self._most) if size >= 0 else self._most)


def make(path: Path, *members: tuple[SourceFile, bytes]) -> bytes:
    archive.build(((file, io.BytesIO(content)) for file, content in members), path)
    return path.read_bytes()


def foreign(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar that another program made."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def read_all(
    data: bytes, most: int = 1 << 30, *, compressed: bool = False
) -> tuple[list[tuple[str, bytes | None, str | None]], str | None]:
    """What was read, and why it ended early."""
    found: list[tuple[str, bytes | None, str | None]] = []
    try:
        for member in archive.read(Pipe(data, most), compressed=compressed):
            content = member.file.read() if member.file else None
            found.append((member.name, content, member.problem))
    except archive.ArchiveBroken as error:
        return found, str(error)
    return found, None


paths = (
    st.binary(min_size=1, max_size=300)
    .map(lambda b: b.replace(b"\0", b"_").decode("utf-8", "surrogateescape"))
    .map(lambda p: "/".join(part for part in p.split("/") if part not in ("", ".", "..")))
    .filter(bool)
)
files = st.lists(
    st.tuples(paths, st.binary(max_size=1500), st.integers(-(2**40), 2**62)),
    max_size=6,
    unique_by=lambda f: f[0],
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(files, st.integers(1, 2000))
@example([("é" * 60 + ".mp3", b"x" * 512, -1), ("a" * 101, b"", 8**11 * NS), ("-\n'\"\udcff.mp3", b"y", 1)], 1)
def test_a_built_archive_gives_back_its_files_and_their_exact_times(
    tmp_path: Path, content: list[tuple[str, bytes, int]], most: int
) -> None:
    members = [(SourceFile(path, len(data), mtime), data) for path, data, mtime in content]
    data = make(tmp_path / "a.tar", *members)
    assert list(archive.sources(Pipe(data, most))) == [file for file, _ in members]
    found, broken = read_all(data, most)
    assert broken is None
    assert [c for _, c, _ in found] == [c for _, c in members]
    assert len({item_of(name) for name, _, _ in found}) == len(members)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        assert [info.name for info in tar] == [file.path for file, _ in members]
        assert all((i.uid, i.gid, i.uname, i.gname, i.mode) == (0, 0, "", "", 0o644) for i in tar)


def test_the_bytes_of_an_archive_never_change(tmp_path: Path) -> None:
    """An archive may be built again after an upgrade: then its key holds the same bytes already."""
    members = [
        (SourceFile("a b.mp3", 5, 1_750_000_000 * NS + 123_456_789), b"hello"),
        (SourceFile("d\udcffé/" + "x" * 120 + ".mp3", 0, -1), b""),
    ]
    built = archive.build(((f, io.BytesIO(c)) for f, c in members), tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    assert built == archive.Built(hashlib.sha256(data).hexdigest(), len(data), 2)
    assert built.size == 10240
    assert built.sha256 == "0c3ac29fe48a6b0bb484f74fcce49c27025454bd0822d1b9619adc968c1b74a3"


def test_an_archive_is_private_even_over_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 99999)
    path.chmod(0o644)
    make(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == bytes(10240)


@pytest.mark.parametrize("content", [b"four", b"sixsix"])
def test_a_member_of_another_length_than_announced_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Retryable, match=r"'a\.mp3'.*5 bytes"):
        make(tmp_path / "a.tar", (SourceFile("a.mp3", 5, 0), content))


def test_trouble_with_the_disk_is_told_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fchmod", lambda fd, mode: None)  # /dev/full is everybody's
    with pytest.raises(Fatal, match="cannot write the archive"):
        make(tmp_path / "missing" / "a.tar")
    with pytest.raises(Retryable, match="No space left"):
        archive.build([(SourceFile("a.mp3", 3 << 20, 0), io.BytesIO(bytes(3 << 20)))], Path("/dev/full"))


def test_a_member_larger_than_a_tar_header_can_say(tmp_path: Path) -> None:
    file = SourceFile("a.mp3", 8**11 + 1, 0)
    with pytest.raises(Retryable, match="only 0 came"):
        make(tmp_path / "a.tar", (file, b""))
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert SourceFile.from_tar(tar.firstmember) == file  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "mtime_ns"),
    [
        ("1.5", 1_500_000_000),
        ("-1.5", -1_500_000_000),
        ("7", 7 * NS),
        ("1.1234567899", 1_123_456_789),
        ("1e9999999", 0),
        ("inf", 0),
        ("", 0),
    ],
)
def test_times_that_others_wrote(text: str, mtime_ns: int) -> None:
    data = foreign((entry("a.mp3", pax_headers={"mtime": text}), b"abc"), (entry("b.mp3", mtime=5), b""))
    assert list(archive.sources(Pipe(data))) == [SourceFile("a.mp3", 3, mtime_ns), SourceFile("b.mp3", 0, 5 * NS)]


def test_gnu_tar_reads_what_we_build(tmp_path: Path) -> None:
    names = ["-v.mp3", "ü" * 90 + ".mp3", "sub/" + "y" * 200 + ".mp3"]
    members = [(SourceFile(n, 3, 1_750_000_000 * NS + i), b"abc") for i, n in enumerate(names)]
    make(tmp_path / "a.tar", *members)
    (tmp_path / "out").mkdir()
    done = subprocess.run(["tar", "-xf", tmp_path / "a.tar", "-C", tmp_path / "out"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert all((tmp_path / "out" / f.path).stat().st_mtime_ns == f.mtime_ns for f, _ in members)


def test_truncation_at_any_byte_is_told_and_whole_members_are_kept(tmp_path: Path) -> None:
    members = [
        (SourceFile("a.mp3", 700, 1), b"a" * 700),
        (SourceFile("é.mp3", 1024, 2), b"b" * 1024),
        (SourceFile("empty.mp3", 0, 3), b""),
    ]
    data = make(tmp_path / "a.tar", *members)
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    ends = [1024 + 512 + 700, 1024 + 512 + 1024 + 1536 + 1024, end - 1024]
    for cut in range(end):
        found, broken = read_all(data[:cut])
        assert broken and ("truncated" in broken or "broken" in broken), cut
        assert len(found) == sum(cut >= e for e in ends), (cut, found)
        assert [f[1] for f in found] == [c for _, c in members][: len(found)]
        with pytest.raises(archive.ArchiveBroken):  # also where the contents are not looked at
            list(archive.sources(Pipe(data[:cut])))
    for cut in range(end, len(data) + 1, 500):
        assert read_all(data[:cut])[1] is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_raises_only_what_is_promised(data: st.DataObject) -> None:
    good = foreign(
        (entry("a.mp3", pax_headers={"mtime": "1.5", "comment": "x" * 30}), b"a" * 700),
        (entry("n" * 150), b"b" * 10),
        (entry("l", tarfile.SYMTYPE, linkname="a.mp3"), b""),
        form=data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])),
    )
    bad = bytearray(good)
    for at in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=8)):
        bad[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # a damage that the checksum does not show
        for block in range(0, len(bad), 512):
            if bad[block + 257 : block + 262] == b"ustar":
                bad[block + 148 : block + 156] = b"%06o\0 " % (
                    sum(bad[block : block + 148]) + 256 + sum(bad[block + 156 : block + 512])
                )
    found, broken = read_all(bytes(bad))
    assert broken or len(found) >= 1
    for name, _, _ in found:
        name.encode()
        assert "\0" not in name and name


def test_a_garbled_header_between_members_is_broken_not_the_end(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "a.tar", *((SourceFile(n, 3, 0), b"abc") for n in ("a", "b", "c"))))
    for at in (2048, 2048 + 1024):  # the pax header and the member's own
        bad = data[:at] + b"z" * 100 + data[at + 100 :]
        found, broken = read_all(bytes(bad))
        assert [name for name, _, _ in found] == ["a"]
        assert broken and "header" in broken


def test_a_garbled_header_before_the_end_is_not_taken_for_it() -> None:
    data = bytearray(foreign((entry("a"), b"abc"), (entry("b"), b"")))
    data[1024] ^= 1
    found, broken = read_all(bytes(data))
    assert [name for name, _, _ in found] == ["a"]
    assert broken and "header" in broken


def test_a_second_archive_behind_the_end_is_not_lost_in_silence(tmp_path: Path) -> None:
    one = make(tmp_path / "a.tar", (SourceFile("a", 3, 0), b"abc"))
    for data in (one + one, one[: 2048 + 1024] + one):
        found, broken = read_all(data)
        assert len(found) == 1
        assert broken and "data after the end" in broken


def test_an_archive_of_nothing_is_fine_and_no_bytes_are_not() -> None:
    assert read_all(bytes(1024)) == ([], None)
    assert read_all(bytes(10240)) == ([], None)
    for size in (0, 511, 512, 1023):
        assert "truncated" in (read_all(bytes(size))[1] or "")


@pytest.mark.parametrize(("pack", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_compressed_archives_are_named(pack: object, kind: str) -> None:
    for content in (b"x", bytes(range(256)) * 40):
        found, broken = read_all(pack(foreign((entry("a.mp3"), content))))  # type: ignore[operator]
        assert (found, broken) == ([], f"is {kind}-compressed; only plain tar is taken")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archives_are_taken_where_they_are_allowed(pack: Callable[[bytes], bytes]) -> None:
    plain = foreign((entry("a.mp3"), random.Random(1).randbytes(300_000)), (entry("b.mp3"), b""))
    data = pack(plain)
    assert read_all(data, compressed=True) == read_all(plain)
    if pack is not bytes:
        for broken in (data[: len(data) // 2], data[:-9], data[:1000] + bytes(50) + data[1050:]):
            said = read_all(broken, compressed=True)[1]
            assert said and ("truncated" in said or "compression is broken" in said)
    bomb = pack(foreign((entry("a.mp3"), bytes(30 << 20))))
    said = read_all(bomb, compressed=True)[1]
    assert said == (None if pack is bytes else "unpacks to more than 100 times its size")


def test_members_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    data = foreign(*((entry(f"{n}.mp3"), b"x") for n in range(4)))
    found, broken = read_all(data)
    assert (len(found), broken) == (3, "more than 3 members")


def test_a_member_whose_name_looks_compressed_is_taken() -> None:
    for name in ("BZh.mp3", "BZh9 1.mp3"):
        for compressed in (False, True):
            assert read_all(foreign((entry(name), b"x")), compressed=compressed) == ([(name, b"x", None)], None)


def test_what_is_no_tar_is_said_to_be_none() -> None:
    assert read_all(b"ID3" + b"x" * 5000) == ([], "is not a tar archive")


def test_only_plain_files_are_taken_and_the_others_say_why() -> None:
    data = foreign(
        (entry("dir", tarfile.DIRTYPE), b""),
        (entry("dir/a.mp3"), b"abc"),
        (entry("sym", tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
        (entry("hard", tarfile.LNKTYPE, linkname="dir/a.mp3"), b""),
        (entry("chr", tarfile.CHRTYPE), b""),
        (entry("blk", tarfile.BLKTYPE), b""),
        (entry("fifo", tarfile.FIFOTYPE), b""),
        (entry("odd", b"Z"), b"data"),
        (entry("z.mp3"), b"z"),
    )
    found, broken = read_all(data)
    assert broken is None
    assert [(n, c) for n, c, p in found if p is None] == [("dir/a.mp3", b"abc"), ("z.mp3", b"z")]
    assert {n: p for n, _, p in found if p} == {
        "sym": "is a symbolic link, not a file",
        "hard": "is a hard link, not a file",
        "chr": "is a device, not a file",
        "blk": "is a device, not a file",
        "fifo": "is a named pipe, not a file",
        "odd": "is of type b'Z', not a file",
    }


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_refused_and_what_follows_is_read(tmp_path: Path, form: str) -> None:
    with (tmp_path / "holes").open("wb") as file:
        for part in range(40):
            file.seek(part * 100_000)
            file.write(b"x" * 5000)
    (tmp_path / "z").write_bytes(b"z")
    command: list[str | Path] = [
        "tar",
        f"--format={form}",
        "--sparse",
        "-C",
        tmp_path,
        "-cf",
        "-",
        "holes",
        "z",
    ]
    found, broken = read_all(subprocess.run(command, check=True, capture_output=True).stdout)
    assert broken is None
    assert [n for n, _, _ in found] == ["holes", "z"]
    assert "sparse" in (found[0][2] or "") and found[1][1:] == (b"z", None)


def test_a_cut_off_sparse_map_ends() -> None:
    headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a",
        "GNU.sparse.realsize": "9",
    }
    data = foreign((entry("a", pax_headers=headers), b"99999999999\n1\n2\n"))
    assert read_all(data[: data.index(b"99999999999\n") + 512])[1]
    assert read_all(data[: data.index(b"99999999999\n") + 512] + b"1\n" * (4 << 20))[1]


def test_a_header_of_gigabytes_is_not_read_into_memory() -> None:
    head = archive._header(b"x", 5 << 30, 0, b"x")

    class Endless:
        given = 0

        def read(self, size: int = -1) -> bytes:
            data = (head if not self.given else b"") + b"7" * size
            self.given += size
            return data[:size]

    stream = Endless()
    with pytest.raises(archive.ArchiveBroken, match="larger than"):
        list(archive.read(stream))
    assert stream.given <= 4 << 20


def test_names_are_clean_text_and_unique() -> None:
    names = ["a.mp3", "a.mp3", "a.mp3 (2)", "a.mp3", "b\udcff", "b\\xff", "ü\n.mp3"]
    found, broken = read_all(foreign(*((entry(n), b"x") for n in names)))
    assert broken is None
    assert [(n, p) for n, _, p in found] == [
        ("a.mp3", None),
        ("a.mp3 (2)", "name occurs twice"),
        ("a.mp3 (2) (2)", "name occurs twice"),
        ("a.mp3 (3)", "name occurs twice"),
        ("b\\xff", None),
        ("b\\xff (2)", "name occurs twice"),
        ("ü\n.mp3", None),
    ]
    (found, broken) = read_all(foreign((entry("x", pax_headers={"path": "nul\0nul"}), b"x")))
    assert [n for n, _, _ in found] == ["nul\\x00nul"]


@pytest.mark.parametrize(
    "error",
    [
        Retryable("the store is away"),
        OSError(5, "io"),
        tarfile.InvalidHeaderError("odd"),  # type: ignore[attr-defined]
    ],
)
@pytest.mark.parametrize("after", [0, 100, 512, 1024, 1536, 1600, 2300, 3000, 4000, 10240])
@pytest.mark.parametrize("look", [True, False])
def test_errors_of_the_stream_pass_as_they_are(tmp_path: Path, error: Exception, after: int, look: bool) -> None:
    members = [(SourceFile("é.mp3", 700, 0), b"a" * 700), (SourceFile("b.mp3", 70, 0), b"b" * 70)]
    data = io.BytesIO(make(tmp_path / "a.tar", *members)[:after])

    class Failing:
        raised = False

        def read(self, size: int = -1) -> bytes:
            got = data.read(size)
            if got or self.raised:
                return got
            self.raised = True
            raise error

    with pytest.raises(type(error)) as caught:
        for member in archive.read(Failing()):
            if look and member.file:
                member.file.read()
    assert caught.value is error


def test_a_member_cannot_be_read_after_the_next_one(tmp_path: Path) -> None:
    data = make(tmp_path / "a.tar", *((SourceFile(n, 100_000, 0), bytes(100_000)) for n in "ab"))
    members = archive.read(Pipe(data))
    first = next(members).file
    next(members)
    assert first is not None
    with pytest.raises(ValueError, match="after the next"):
        first.read()


def test_a_broken_archive_is_permanent() -> None:
    assert issubclass(archive.ArchiveBroken, Permanent)


def test_memory_stays_small_over_many_members() -> None:
    count = 100_000

    class Many:
        """An archive of `count` empty files, made while it is read."""

        def __init__(self) -> None:
            self._parts = self._make()

        def _make(self) -> Iterator[bytes]:
            for number in range(0, count, 1000):
                yield b"".join(archive._header(b"%d.mp3" % n, 0, 0, b"0") for n in range(number, number + 1000))
            yield bytes(1024)

        def read(self, size: int = -1) -> bytes:
            assert size >= 512_000
            return next(self._parts, b"")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before, most, found = resident(), 0, 0
    for _ in archive.read(Many()):
        found += 1
        if found % 1000 == 0:
            most = max(most, resident())
    assert found == count
    assert most - before < 32 << 20
