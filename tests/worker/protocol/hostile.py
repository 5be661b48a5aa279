"""Archives that somebody made to hurt, stall or fool us: each with what is to become of it, and why.

Every case carries a good recording before what is bad, and where a reader can come so far, one behind it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from lab_audio.media import canary

MP3 = canary.MP3.read_bytes()
OPUS = canary.OPUS.read_bytes()
BLOCK = 512
END = bytes(2 * BLOCK)
FIRST, LAST = "a good one.mp3", "z good one.mp3"
NOT_MP3 = "is not an .mp3 file"


@dataclass(frozen=True)
class Case:
    """`dead`: what is set aside, with a part of the reason. `good`: what is processed beside FIRST and LAST.

    `flag`: a part of what the batch is flagged with; None: nothing. `lenient`: versions of Python read it differently;
    then something is flagged or set aside, or all is processed.
    """

    name: str
    data: bytes
    dead: dict[str, str] = field(default_factory=dict)
    good: frozenset[str] = frozenset()
    last: bool = True
    first: bool = True
    flag: str | None = None
    lenient: bool = False

    @property
    def processed(self) -> set[str]:
        return {*self.good, *([FIRST] if self.first else []), *([LAST] if self.last else [])}


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def header(
    name: bytes,
    size: int = 0,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    size_field: bytes | None = None,
    mtime: bytes | None = None,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    block = b"".join(
        [
            name[:100].ljust(100, b"\0"),
            octal(0o644, 8) + octal(0, 8) + octal(0, 8),
            (octal(size, 12) if size_field is None else size_field).ljust(12, b"\0")[:12],
            (octal(0, 12) if mtime is None else mtime).ljust(12, b"\0")[:12],
            b" " * 8,
            kind,
            link[:100].ljust(100, b"\0"),
            magic,
            bytes(32 + 32) + octal(0, 8) + octal(0, 8),
            prefix[:155].ljust(155, b"\0"),
            bytes(12),
        ]
    )
    assert len(block) == BLOCK
    return block[:148] + (b"%06o\0 " % sum(block) if checksum is None else checksum) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes | str, data: bytes = MP3, kind: bytes = b"0", **more: object) -> bytes:
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return header(raw, len(data), kind, **more) + padded(data)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%s" % (length, rest)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    text = b"".join(records)
    return header(b"././@PaxHeader", len(text), kind) + padded(text)


def longname(name: bytes, kind: bytes = b"L") -> bytes:
    return header(b"././@LongLink", len(name) + 1, kind) + padded(name + b"\0")


def around(*middle: bytes, end: bytes = END) -> bytes:
    return member(FIRST) + b"".join(middle) + member(LAST) + end


def huge(value: int) -> bytes:
    """A number in base 256, as GNU tar writes what octal digits do not do for; negative ones too."""
    return b"\x80" + value.to_bytes(11, "big") if value >= 0 else b"\xff" + (value + (1 << 88)).to_bytes(11, "big")


def cases() -> Iterator[Case]:
    for make in (names, doubles, kinds, tricks, headers, paxes, cuts, tails, packed, floods, media):
        yield from make()


def names() -> Iterator[Case]:
    plain = {
        "absolute": "/etc/cron.d/x.mp3",
        "climbing": "../../../../etc/x.mp3",
        "climbing in the middle": "a/../../x.mp3",
        "dot": "./x.mp3",
        "double slash": "a//b.mp3",
        "an option": "-rf.mp3",
        "an option of tar": "--checkpoint-action=exec=touch x.mp3",
        "shell": "$(touch x)`touch x`;&|.mp3",
        "quotes": "'\".mp3",
        "newline": "a\nb.mp3",
        "carriage return": "a\rb.mp3",
        "tab": "a\tb.mp3",
        "escape": "\x1b[2J\x1b]0;x\x07.mp3",
        "backspaces": "x\b\b\b.mp3",
        "right to left": "a\u202e3pm.mp3",
        "zero width": "a\u200b.mp3",
        "byte order mark": "\ufeffa.mp3",
        "emoji": "\U0001f600.mp3",
        "private use": "\ue000.mp3",
        "replacement": "\ufffd.mp3",
        "drive": "C:\\windows\\x.mp3",
        "device of Windows": "CON.mp3",
        "a stream": "x.mp3:evil.mp3",
        "upper case": "X.MP3",
        "mixed case": "x.Mp3",
        "blank before the dot": "x .mp3",
        "only the extension": ".mp3",
        "hidden": ".x.mp3",
        "as ours": "20260101-000000-000001/0123456789abcdef.opus.mp3",
        "our identity": ".id.mp3",
        "percent": "%s%n%x.mp3",
        "SQL": "'; DROP TABLE batches; --.mp3",
        "JSON": '{"batch_id": 1}.mp3',
        "URL": "http://127.0.0.1/x.mp3",
        "protocol of ffmpeg": "concat:x|y.mp3",
        "deep": "d/" * 40 + "x.mp3",
    }
    for what, name in plain.items():
        long = len(name.encode()) > 100
        middle = pax(record(b"path", name.encode())) + member("x.mp3") if long else member(name)
        yield Case(f"name: {what}", around(middle), good=frozenset([name]))
    for what, length in {"255 bytes": 251, "256 bytes": 252, "2000 bytes": 1996}.items():
        name = "n" * length + ".mp3"
        yield Case(
            f"name: {what}", around(pax(record(b"path", name.encode())), member("x.mp3")), good=frozenset([name])
        )
    for what, length in {"2001 bytes": 1997, "70 kB": 70_000}.items():
        name = b"n" * length + b".mp3"
        yield Case(f"name: {what}", around(pax(record(b"path", name)), member("x.mp3")), {"nnnn": "longer than 2000"})
    for what, name in {"latin-1": b"\xe9.mp3", "half a letter": b"\xc3.mp3", "surrogate": b"\xed\xb3\xbf.mp3"}.items():
        shown = name.decode("utf-8", "backslashreplace")
        yield Case(f"name: {what}", around(member(name)), good=frozenset([shown]))
    yield Case(
        "name: NUL in pax", around(pax(record(b"path", b"a\0b.mp3")), member("x.mp3")), good=frozenset(["a\\x00b.mp3"])
    )
    yield Case("name: empty", around(member("")), {"(no name)": NOT_MP3})
    yield Case("name: a dot", around(member(".")), {".": NOT_MP3})
    yield Case("name: two dots", around(member("..")), {"..": NOT_MP3})
    yield Case("name: another extension behind", around(member("x.mp3.exe")), {"x.mp3.exe": NOT_MP3})
    yield Case("name: none", around(member("x")), {"x": NOT_MP3})
    yield Case("name: blank behind", around(member("x.mp3 ")), {"x.mp3 ": NOT_MP3})
    yield Case("name: newline behind", around(member("x.mp3\n")), {"x.mp3\n": NOT_MP3})
    yield Case(
        "name: of GNU", around(longname(b"l" * 300 + b".mp3"), member("x.mp3")), good=frozenset(["l" * 300 + ".mp3"])
    )
    yield Case("name: with a prefix", around(member("x.mp3", prefix=b"../../etc")), good=frozenset(["../../etc/x.mp3"]))


def doubles() -> Iterator[Case]:
    twice = "name occurs twice"
    yield Case("twice: the same", around(member("x.mp3"), member("x.mp3")), {"x.mp3 (2)": twice}, frozenset(["x.mp3"]))
    yield Case(
        "twice: three times",
        around(*[member("x.mp3")] * 3),
        {"x.mp3 (2)": twice, "x.mp3 (3)": twice},
        frozenset(["x.mp3"]),
    )
    yield Case("twice: that of a good one", around(member(FIRST)), {f"{FIRST} (2)": twice})
    yield Case("twice: one stem", around(member("x.mp3"), member("x.MP3")), good=frozenset(["x.mp3", "x.MP3"]))
    yield Case(
        "twice: one stem, two directories",
        around(member("a/x.mp3"), member("b/x.mp3")),
        good=frozenset(["a/x.mp3", "b/x.mp3"]),
    )
    composed, combined = "\u00e9.mp3", "e\u0301.mp3"
    yield Case("twice: to the eye", around(member(composed), member(combined)), good=frozenset([composed, combined]))
    yield Case(
        "twice: as our own counting",
        around(member("x.mp3"), member("x.mp3 (1)"), member("x.mp3")),
        {"x.mp3 (1)": NOT_MP3, "x.mp3 (2)": twice},
        frozenset(["x.mp3"]),
    )


def kinds() -> Iterator[Case]:
    said = {
        b"1": ("hard link", "is a hard link"),
        b"2": ("symbolic link", "is a symbolic link"),
        b"3": ("character device", "is a device"),
        b"4": ("block device", "is a device"),
        b"6": ("named pipe", "is a named pipe"),
        b"Z": ("unknown", "is of type"),
        b"M": ("continued volume", "is of type"),
        b"V": ("volume label", "is of type"),
        b"D": ("dump", "is of type"),
    }
    for kind, (what, reason) in said.items():
        yield Case(f"kind: {what}", around(header(b"x.mp3", 0, kind, link=b"/etc/passwd")), {"x.mp3": reason})
    for what, target in {"up": b"../../etc/passwd", "to itself": b"x.mp3", "to a good one": FIRST.encode()}.items():
        yield Case(f"kind: symbolic link {what}", around(header(b"x.mp3", 0, b"2", link=target)), {"x.mp3": "symbolic"})
        yield Case(f"kind: hard link {what}", around(header(b"x.mp3", 0, b"1", link=target)), {"x.mp3": "hard link"})
    yield Case("kind: directory", around(header(b"x.mp3/", 0, b"5")))
    yield Case("kind: a directory by its slash", around(header(b"x.mp3/", 0, b"\0", magic=b"\0" * 8)))
    yield Case("kind: contiguous", around(member("x.mp3", kind=b"7")), good=frozenset(["x.mp3"]))
    yield Case(
        "kind: older than POSIX", around(member("x.mp3", kind=b"\0", magic=b"\0" * 8)), good=frozenset(["x.mp3"])
    )
    yield Case("kind: GNU's magic", around(member("x.mp3", magic=b"ustar  \0")), good=frozenset(["x.mp3"]))


def tricks() -> Iterator[Case]:
    """What has broken extracting readers."""
    link = header(b"d", 0, b"2", link=b"/etc")
    yield Case(
        "trick: through a link (CVE-2007-4559)",
        around(link, member("d/x.mp3")),
        {"d": "symbolic"},
        frozenset(["d/x.mp3"]),
    )
    chain = header(b"a", 0, b"2", link=b"." + b"/a" * 40) + header(b"a/b", 0, b"2", link=b"../../etc")
    yield Case(
        "trick: a chain of links (CVE-2025-4517)",
        around(chain, member("a/b/x.mp3")),
        {"a": "symbolic", "a/b": "symbolic"},
        frozenset(["a/b/x.mp3"]),
    )
    hard = header(b"h", 0, b"1", link=b"d") + header(b"h/x", 0, b"2", link=b"/etc/passwd")
    yield Case(
        "trick: a hard link to a link (CVE-2025-4330)",
        around(link, hard, member("h/x.mp3")),
        {"d": "symbolic", "h": "hard", "h/x": "symbolic"},
        frozenset(["h/x.mp3"]),
    )
    replaced = header(b"x.mp3", 0, b"2", link=b"/etc/passwd") + member("x.mp3")
    yield Case(
        "trick: a file in a link's place (CVE-2025-4138)",
        around(replaced),
        {"x.mp3": "symbolic", "x.mp3 (2)": "twice"},
    )
    yield Case(
        "trick: mode and owner of a directory outside (CVE-2024-12718)",
        around(header(b"../../etc/", 0, b"5"), header(b"/", 0, b"5")),
    )
    yield Case(
        "trick: a negative size that goes back (CVE-2025-8194)",
        member(FIRST) + header(b"x.mp3", size_field=huge(-1024)) + member(LAST) + END,
        last=False,
        flag="archive: ",
    )
    yield Case(
        "trick: a pax header without end (CVE-2019-20907)",
        around(pax(b"0 x=y\n"), member("x.mp3")),
        last=False,
        flag="archive: ",
    )


def headers() -> Iterator[Case]:
    def broken(what: str, bad: bytes) -> Case:
        return Case(f"header: {what}", member(FIRST) + bad + member(LAST) + END, last=False, flag="archive: ")

    yield broken("wrong checksum", header(b"x.mp3", checksum=b"000001\0 "))
    yield broken("no checksum", header(b"x.mp3", checksum=bytes(8)))
    yield broken("garbage", bytes(range(256)) * 2)
    yield broken("all ones", b"\xff" * BLOCK)
    yield broken("text", b"<html>not found</html>".ljust(BLOCK, b" "))
    yield broken("size is no number", header(b"x.mp3", size_field=b"zzzzzzzzzzz\0"))
    yield broken("size negative in octal", header(b"x.mp3", size_field=b"-0000000100\0"))
    yield broken("size of 8 exabytes", header(b"x.mp3", size_field=huge(2**63)))
    yield broken("size of 2^80", header(b"x.mp3", size_field=huge(2**80)))
    for what, size in {"a terabyte": 2**40, "8 exabytes less one": 2**63 - 1}.items():
        yield Case(
            f"header: a size of {what} that does not come",
            member(FIRST) + header(b"x.mp3", size_field=huge(size)) + MP3,
            {"x.mp3": "is larger than 4 GiB"},
            last=False,
            flag="archive: archive is truncated",
        )
    yield Case(
        "header: a size of 4 GiB that does not come",
        member(FIRST) + header(b"x.mp3", size_field=huge(4 << 30)) + MP3,
        {"x.mp3": "is cut off"},
        last=False,
        flag="archive: archive is truncated",
    )
    yield broken("time is no number", header(b"x.mp3", mtime=b"zzzzzzzzzzz\0"))
    for what, mtime in {"negative": huge(-1), "far": huge(2**80)}.items():
        yield Case(f"header: time {what}", around(member("x.mp3", mtime=mtime)), good=frozenset(["x.mp3"]))


def paxes() -> Iterator[Case]:
    def broken(what: str, bad: bytes, *, lenient: bool = False) -> Case:
        return Case(f"pax: {what}", around(bad, member("x.mp3")), last=False, flag="archive: ", lenient=lenient)

    yield broken("a length beyond the header", pax(b"999 path=x\n"), lenient=True)
    yield broken("a length of letters", pax(b"xx path=x\n"), lenient=True)
    yield broken("a length of 10,000 digits", pax(b"1" * 10_000 + b" path=x\n"))
    yield broken("a record without newline", pax(b"12 path=abcdef"), lenient=True)
    yield broken("a record without =", pax(b"11 pathxxx\n"), lenient=True)
    yield broken("a size that is no number", pax(record(b"size", b"many")), lenient=True)
    yield broken("a negative size", pax(record(b"size", b"-1024")), lenient=True)
    yield broken("a size of 2^70", pax(record(b"size", b"%d" % 2**70)), lenient=True)
    yield broken("a header of 2 MiB", pax(record(b"comment", b"x" * (2 << 20))))
    yield broken("a header of gigabytes", header(b"././@PaxHeader", size_field=huge(2**33), kind=b"x"))
    yield broken("headers without end", pax(record(b"comment", b"x")) * 3000)
    yield broken("a long name of 2 MiB", longname(b"x" * (2 << 20)))
    yield broken("a long link of 2 MiB", longname(b"x" * (2 << 20), b"K"))
    good = frozenset(["x.mp3"])
    yield Case(
        "pax: a size that is larger",
        member(FIRST) + pax(record(b"size", b"99999999")) + member("x.mp3") + END,
        {"x.mp3": "is cut off"},
        last=False,
        flag="truncated",
    )
    yield Case(
        "pax: a size of nothing",
        around(pax(record(b"size", b"0")), member("x.mp3")),
        {"x.mp3": ""},
        last=False,
        flag="archive: ",
    )
    yield Case(
        "pax: 10,000 records",
        around(pax(*[record(b"k%d" % n, b"v") for n in range(10_000)]), member("x.mp3")),
        good=good,
    )
    yield Case("pax: time is not a number", around(pax(record(b"mtime", b"nan")), member("x.mp3")), good=good)
    yield Case("pax: time without end", around(pax(record(b"mtime", b"9" * 4000)), member("x.mp3")), good=good)
    yield Case("pax: time infinite", around(pax(record(b"mtime", b"inf")), member("x.mp3")), good=good)
    yield Case("pax: owner is no number", around(pax(record(b"uid", b"root")), member("x.mp3")), good=good)
    yield Case(
        "pax: a character set",
        around(pax(record(b"hdrcharset", b"BINARY"), record(b"path", b"\xff.mp3")), member("x.mp3")),
        good=frozenset(["\\xff.mp3"]),
    )
    yield Case(
        "pax: a path outside",
        around(pax(record(b"path", b"/etc/cron.d/x.mp3")), member("x.mp3")),
        good=frozenset(["/etc/cron.d/x.mp3"]),
    )
    yield Case(
        "pax: a name for all",
        around(pax(record(b"path", b"x.mp3"), kind=b"g"), member("y.mp3")),
        {"x.mp3 (2)": "twice"},
        good,
        last=False,
    )
    yield Case(
        "pax: the same key twice",
        around(pax(record(b"path", b"y.mp3"), record(b"path", b"x.mp3")), member("z.mp3")),
        good=good,
    )
    yield Case("pax: an empty path", around(pax(record(b"path", b"")), member("x.mp3")), {"(no name)": NOT_MP3})
    sparse = "is stored sparse"
    for version in (b"0.0", b"0.1"):
        major, minor = version.split(b".")
        keys = [record(b"GNU.sparse.major", major), record(b"GNU.sparse.minor", minor)]
        keys += [record(b"GNU.sparse.size", b"99999999999"), record(b"GNU.sparse.numblocks", b"1")]
        keys += (
            [record(b"GNU.sparse.map", b"0,1")]
            if version == b"0.1"
            else [record(b"GNU.sparse.offset", b"0"), record(b"GNU.sparse.numbytes", b"1")]
        )
        yield Case(f"pax: sparse {version.decode()}", around(pax(*keys), member("x.mp3")), {"x.mp3": sparse})
    keys = [
        record(b"GNU.sparse.major", b"1"),
        record(b"GNU.sparse.minor", b"0"),
        record(b"GNU.sparse.realsize", b"9" * 15),
    ]
    yield Case(
        "pax: sparse 1.0 without a map", around(pax(*keys), member("x.mp3", bytes(1024))), {}, last=False, flag=""
    )


def cuts() -> Iterator[Case]:
    data = around()
    second = len(member(FIRST))
    for where in (1, 100, 511):
        yield Case(f"cut: {where} bytes", data[:where], first=False, last=False, flag="archive: ")
    yield Case("cut: in the first header", data[:300], first=False, last=False, flag="truncated")
    for what, at in {"in its bytes": 600, "in the middle of it": 6000, "in its padding": second - 10}.items():
        whole = what == "in its padding"
        dead = {} if whole else {FIRST: "is cut off"}
        yield Case(f"cut: {what}", data[:at], dead, first=whole, last=False, flag="truncated")
    yield Case("cut: between two", data[:second], last=False, flag="truncated")
    yield Case("cut: in the second header", data[: second + 200], last=False, flag="truncated")
    yield Case("cut: in the last bytes", data[: 2 * second - 600], {LAST: "is cut off"}, last=False, flag="truncated")
    yield Case("cut: before the end", data[: -2 * BLOCK], flag="truncated")
    yield Case("cut: half the end", data[:-BLOCK], flag="truncated")
    yield Case("cut: nothing at all", b"", first=False, last=False, flag="archive: ")
    yield Case("cut: only the end", END, first=False, last=False)


def tails() -> Iterator[Case]:
    yield Case("tail: zeros", around(end=END + bytes(1 << 20)))
    yield Case("tail: a second archive", around(end=END + around()), flag="data after the end")
    yield Case("tail: garbage", around(end=END + b"\xff" * BLOCK), flag="data after the end")
    yield Case("tail: garbage far behind", around(end=END + bytes(1 << 20) + b"x"), flag="data after the end")
    yield Case("tail: a program", around(end=END + b"#!/bin/sh\nreboot\n"), flag="data after the end")
    yield Case(
        "tail: one block of zeros, then more", around(end=bytes(BLOCK) + member("x.mp3") + END), flag="archive: "
    )


def packed() -> Iterator[Case]:
    data = around()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr(FIRST, MP3)
    for what, content in {
        "gzip": gzip.compress(data),
        "bzip2": bz2.compress(data),
        "xz": lzma.compress(data),
        "zstd": b"\x28\xb5\x2f\xfd" + bytes(600),
        "zip": zipped.getvalue(),
    }.items():
        yield Case(f"packed: {what}", content, first=False, last=False, flag=f"is {what}-compressed")
    bomb = gzip.compress(bytes(50 << 20))
    yield Case("packed: a bomb", bomb, first=False, last=False, flag="is gzip-compressed")
    for what, content in {
        "an MP3": MP3,
        "HTML": b"<!doctype html><title>404</title>" * 50,
        "a program": b"\x7fELF" + bytes(2000),
        "random bytes": random.Random(1).randbytes(4096),
        "cpio": b"070701" + b"0" * 1000,
    }.items():
        yield Case(
            f"packed: {what} in an archive's place", content, first=False, last=False, flag="is not a tar archive"
        )


def unpacked() -> Iterator[Case]:
    """Where compressed archives are taken."""
    big = around(member("x.mp3", bytes(50 << 20)))
    for what, pack in {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}.items():
        yield Case(f"unpacked: {what}", pack(around()))
        yield Case(
            f"unpacked: a bomb of {what}",
            pack(big),
            {"x.mp3": "is cut off"},
            last=False,
            flag="unpacks to more than 100 times its size",
        )
        cut = pack(around(*(member(f"{n}.mp3") for n in range(20))))[:-30]
        first = what != "bzip2"  # it unpacks 900 kB at once, or nothing
        yield Case(f"unpacked: {what}, cut off", cut, first=first, last=False, lenient=first, flag="truncated")
    yield Case("unpacked: not packed", around())


def floods() -> Iterator[Case]:
    many = 3000
    flood = b"".join(header(b"%d.txt" % n) for n in range(many))
    yield Case("flood: members", around(flood), {f"{n}.txt": NOT_MP3 for n in range(many)})
    empty = b"".join(header(b"d%d/" % n, 0, b"5") for n in range(many))
    yield Case("flood: directories", around(empty))
    yield Case(
        "flood: one name",
        around(header(b"x.txt") * 300),
        {"x.txt": NOT_MP3, **{f"x.txt ({n})": "twice" for n in range(2, 301)}},
    )


def media() -> Iterator[Case]:
    def dead(what: str, data: bytes, reason: str = "") -> Case:
        return Case(f"sound: {what}", around(member("x.mp3", data)), {"x.mp3": reason})

    def fine(what: str, data: bytes) -> Case:
        return Case(f"sound: {what}", around(member("x.mp3", data)), good=frozenset(["x.mp3"]))

    yield dead("a playlist", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    yield dead(
        "a playlist of HLS", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n#EXT-X-ENDLIST\n"
    )
    yield dead("a script of concat", b"ffconcat version 1.0\nfile /etc/passwd\n")
    yield dead("a manifest of DASH", b'<?xml version="1.0"?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>')
    yield dead("an SDP", b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n")
    yield dead("a picture", b"\x89PNG\r\n\x1a\n" + bytes(2000))
    yield dead("SVG", b'<svg xmlns:xlink="http://www.w3.org/1999/xlink"><image xlink:href="file:///etc/passwd"/></svg>')
    yield dead("a program", b"\x7fELF" + bytes(5000))
    yield dead("text", b"hello world\n" * 500)
    yield dead("nothing", b"")
    yield dead("one byte", b"\xff")
    yield dead("zeros", bytes(100_000))
    yield dead("all ones", b"\xff" * 100_000)
    yield dead("random bytes", random.Random(2).randbytes(3_000))
    yield dead("Ogg Opus", OPUS)
    yield dead(
        "WAV",
        b"RIFF"
        + struct.pack("<I", 36 + 3200)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
        + b"data"
        + struct.pack("<I", 3200)
        + bytes(3200),
    )
    yield dead("only a tag", b"ID3\x04\0\0" + bytes([0, 0, 7, 0x68]) + bytes(1000))
    yield dead("a tag of 256 MB that does not come", b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + b"TIT2")
    cover = b"APIC" + (20 << 20).to_bytes(4, "big") + b"\0\0" + b"\0image/png\0\x03\0" + bytes((20 << 20) - 13)
    size = len(cover)
    synchsafe = bytes([(size >> 21) & 127, (size >> 14) & 127, (size >> 7) & 127, size & 127])
    yield fine("a cover of 20 MB", b"ID3\x03\0\0" + synchsafe + cover + MP3)
    yield fine("a tag of no version", b"ID3\xff\xff\0" + bytes(4) + MP3)
    yield fine("silence", b"\xff\xe3\x18\xc4".ljust(72, b"\0") * 100)  # MPEG-2.5 at 8 kb/s: frames that hold nothing
    yield fine("garbage before", b"garbage" * 20 + MP3)
    yield fine("garbage in the middle", MP3[:5000] + random.Random(3).randbytes(1500) + MP3[5000:])
    yield fine("cut off", MP3[:7000])
    yield fine("twice", MP3 + MP3)
    yield fine("a tag behind", MP3 + b"TAG" + bytes(125))
