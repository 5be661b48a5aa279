# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model is a tree of files with a manifest. Names in it come from elsewhere, so each is checked before it is used.

Private: it may change with any release.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import typing as t

from ansible_collections.lab.audio.plugins.module_utils._host import Refused

MANIFEST = "manifest.json"
MAX_MANIFEST = 16 << 20
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
RESERVED = re.compile(r"quarantine-.*|found-.*|.*\.partial")
SHA256 = re.compile(r"[0-9a-f]{64}")
MIB = 1 << 20


class File(t.NamedTuple):
    """What a file should be. `mark`: what changes with its content, if its SHA-256 is not told: a time or an ETag."""

    size: int
    sha256: str | None = None
    mark: str | None = None


class Manifest(t.NamedTuple):
    """A revision and its files by path. `published`: the manifest as it lies at the source; empty if there is none."""

    revision: str
    files: dict[str, File]
    published: bytes = b""


def check_revision(revision: t.Any, where: str) -> str:
    if not isinstance(revision, str) or not REVISION.fullmatch(revision) or RESERVED.fullmatch(revision):
        raise Refused(
            f"{where}: revision {revision!r} is not a name such as 2026-06 or v1.2, of at most 100 letters, digits and"
            " ._+-"
        )
    return revision


def check_paths(paths: t.Iterable[str], where: str) -> None:
    """Raise Refused unless each is a plain path below where it will lie, and no file is another's directory."""
    seen: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")
        long = len(path) > 1000 or any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
        if long or not path.isprintable() or any(part in ("", ".", "..") for part in parts):
            raise Refused(f"{where}: {path[:200]!r} is not a path that may be written: rename it at the source")
        if path in seen:
            raise Refused(f"{where}: {path} is there twice")
        seen.add(path)
        folders.update("/".join(parts[:end]) for end in range(1, len(parts)))
    for path in sorted(seen & folders):
        raise Refused(f"{where}: {path} is a file and a directory")
    if not seen:
        raise Refused(f"{where}: there are no files")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises Refused if it is not a whole manifest."""
    try:
        said = json.loads(data)
        files = {}
        check_paths([str(one["path"]) for one in said["files"]], where)
        for one in said["files"]:
            path, size, sha256, mark = one["path"], one["size"], one["sha256"], one.get("mark")
            number = isinstance(size, int) and not isinstance(size, bool) and size >= 0
            if not isinstance(path, str) or not number or not SHA256.fullmatch(sha256) or path == MANIFEST:
                raise ValueError(f"file {path}")
            files[path] = File(size, sha256, mark if isinstance(mark, str) else None)
        return Manifest(check_revision(said["revision"], where), files, data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(
            f"{where} is not a manifest ({type(error).__name__}: {error}): it is JSON such as"
            ' {"revision": "2026-06", "files": [{"path": "a/b", "size": 1, "sha256": "..."}]}'
        ) from error


def manifest_text(revision: str, files: dict[str, File]) -> bytes:
    listed = [
        {name: value for name, value in {"path": path, **file._asdict()}.items() if value is not None}
        for path, file in sorted(files.items())
    ]
    return (json.dumps({"revision": revision, "files": listed}, indent=1, ensure_ascii=False) + "\n").encode()


def digest(files: dict[str, File]) -> str:
    """Twelve digits that are others for other files."""
    lines = [f"{path}\t{file.size}\t{file.sha256}\t{file.mark}\n" for path, file in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def same_file(one: File, other: File) -> bool:
    """Whether both say the same, and enough to tell."""
    if one.sha256 and other.sha256:
        return (one.size, one.sha256) == (other.size, other.sha256)
    return one.mark is not None and (one.size, one.mark) == (other.size, other.mark)


def same_files(one: dict[str, File], other: dict[str, File]) -> bool:
    return one.keys() == other.keys() and all(same_file(file, other[path]) for path, file in one.items())


def time_mark(seconds: float) -> str:
    """A time as `mark`, as rsync lists it."""
    return time.strftime("time:%Y/%m/%d %H:%M:%S", time.gmtime(int(seconds)))


class Entry(t.NamedTuple):
    path: str
    full: str
    status: os.stat_result

    def is_file(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)


def walk(top: str) -> list[Entry]:
    """All below a directory but directories, in the order of their paths; links are not followed."""
    return [entry for entry in walk_all(top) if not stat.S_ISDIR(entry.status.st_mode)]


def walk_all(top: str) -> list[Entry]:
    found: list[Entry] = []
    if not os.path.isdir(top):
        return found
    for folder, folders, names in os.walk(top, onerror=raise_it):
        for name in (*folders, *names):
            full = os.path.join(folder, name)
            found.append(Entry(os.path.relpath(full, top), full, os.lstat(full)))
    return sorted(found)


def raise_it(error: OSError) -> t.NoReturn:
    raise error


def occupied(path: str) -> int:
    """Bytes that removing this frees at most."""
    entries = walk_all(path) if os.path.isdir(path) and not os.path.islink(path) else [Entry("", path, os.lstat(path))]
    return sum(entry.status.st_blocks * 512 for entry in entries if entry.status.st_nlink == 1)


class Hashes:
    """SHA-256 of files, remembered by inode, size and time of the last change, so that nothing is read twice.

    That these tell content holds as no file here keeps the time that it has at its source.
    """

    def __init__(self, home: str) -> None:
        self.home, self.path = home, os.path.join(home, ".hashes.json")
        self.known: dict[str, list[t.Any]] = {}
        self.new = False
        with contextlib.suppress(OSError, ValueError), open(self.path, "rb") as file:
            known = json.load(file)
            self.known = known if isinstance(known, dict) else {}

    def of(self, path: str) -> str:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            key, state = str(status.st_ino), [status.st_size, status.st_mtime_ns]
            known = self.known.get(key)
            if isinstance(known, list) and known[:2] == state and len(known) == 3:
                return str(known[2])
            whole = hashlib.sha256()
            for block in iter(lambda: file.read(MIB), b""):
                whole.update(block)
        self.known[key] = [*state, whole.hexdigest()]
        self.new = True
        return whole.hexdigest()

    def save(self) -> None:
        """Write down what is new, of files that are still here."""
        if not self.new:
            return
        here = {str(entry.status.st_ino) for entry in walk(self.home)}
        text = json.dumps({key: value for key, value in sorted(self.known.items()) if key in here})
        write(self.path, text.encode(), 0o600)
        self.new = False


def write(path: str, data: bytes, mode: int) -> None:
    """Replace a file, whole or not at all."""
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def wrong(top: str, path: str, file: File, hashes: Hashes | None) -> str:
    """What is wrong with a file of a tree; empty if nothing is. Its content is looked at only with `hashes`."""
    full = os.path.join(top, path)
    try:
        status = os.lstat(full)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    if status.st_size != file.size:
        return f"has {status.st_size} bytes, not {file.size}"
    if hashes and file.sha256:
        sha256 = hashes.of(full)
        if sha256 != file.sha256:
            return f"has the SHA-256 {sha256}, not {file.sha256}"
    return ""


def link_to(target: str, path: str, new: str) -> None:
    """Make `path` a symbolic link, or have it point elsewhere, in one step; `new` is a name to use meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    os.symlink(target, new)
    os.replace(new, path)


def exchange(one: str, other: str) -> None:
    """Let two names change places in one step. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), other)
    at_cwd, rename_exchange = -100, 2
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), other)


def sync_tree(top: str) -> None:
    """Have all of a tree on the disk."""
    for entry in walk_all(top):
        if entry.is_file() or stat.S_ISDIR(entry.status.st_mode):
            sync(entry.full)
    sync(top)


def sync(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def discard(path: str) -> None:
    """Remove whatever is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


class Access(t.NamedTuple):
    """Owner and group by number (-1: as they are), and the mode of directories; files have it without its x."""

    owner: int
    group: int
    mode: int

    def differs(self, entry: Entry) -> bool:
        status = entry.status
        return (
            stat.S_IMODE(status.st_mode) != self.mode_of(status)
            or self.owner not in (-1, status.st_uid)
            or self.group not in (-1, status.st_gid)
        )

    def mode_of(self, status: os.stat_result) -> int:
        return self.mode if stat.S_ISDIR(status.st_mode) else self.mode & 0o666

    def give(self, entry: Entry) -> None:
        file = os.open(entry.full, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fchown(file, self.owner, self.group)
            os.fchmod(file, self.mode_of(entry.status))
        finally:
            os.close(file)


def all_of(top: str) -> list[Entry]:
    """A directory and all directories and files below it."""
    return [
        entry
        for entry in [Entry("", top, os.lstat(top)), *walk_all(top)]
        if entry.is_file() or stat.S_ISDIR(entry.status.st_mode)
    ]
