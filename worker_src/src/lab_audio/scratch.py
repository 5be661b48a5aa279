"""The scratch directory: one folder a batch, and kernel locks that say who is alive.

SCRATCH_ROOT/.id               this disk's random name
SCRATCH_ROOT/.locks/           lock files; never unlinked: `batches`, `id`, and `{kind}.{number}` for slots
SCRATCH_ROOT/{batch_id}/       {item}.opus, {item}.json
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lab_audio.contracts import BATCH_ID, check_batch_id
from lab_audio.errors import Fatal

MAX_SLOTS = 64
MARGIN_BYTES = 16 << 20
ITEM_BYTES = 16 << 10  # the last blocks of two files, and what of a result does not grow with the recording
RESULT_BYTES_PER_SECOND = 512  # words with their times


def prepare(root: Path) -> str:
    """Make the scratch directory (0750) and return this disk's random id. Raises Fatal where it cannot be written."""
    try:
        root.mkdir(mode=0o750, parents=True, exist_ok=True)
        (root / ".locks").mkdir(mode=0o750, exist_ok=True)
        identity = root / ".id"
        named = _open_lock(root, "id")
        try:
            fcntl.flock(named, fcntl.LOCK_EX)  # of workers that start at once, one names the disk
            for left in root.glob(".id.*"):
                left.unlink()
            if not identity.exists():
                write_atomic(identity, secrets.token_hex(16).encode())
            return identity.read_text()
        finally:
            os.close(named)
    except OSError as error:
        raise Fatal(f"SCRATCH_ROOT {root} cannot be used: {error.strerror}") from None


def batch_dir(root: Path, batch_id: str) -> Path:
    return root / check_batch_id(batch_id)


def batches(root: Path) -> list[str]:
    """Batches that have a folder here."""
    return sorted(entry.name for entry in root.iterdir() if BATCH_ID.fullmatch(entry.name))


def cleanup_scratch(batch_id: str, *, root: Path | None = None) -> None:
    """Remove a batch's folder; one that is not there is fine, one that cannot be removed raises OSError."""
    root = root or Path(os.environ.get("SCRATCH_ROOT", "/data/scratch"))
    folder = batch_dir(root, batch_id)
    tries = 100
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            tries -= 1
            if not tries or error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # something vanished or came meanwhile
                raise


def fresh_dir(root: Path, batch_id: str) -> Path:
    """Make a batch's folder, empty. Raises OSError."""
    cleanup_scratch(batch_id, root=root)
    folder = batch_dir(root, batch_id)
    folder.mkdir(mode=0o750)
    return folder


def is_full(error: OSError) -> bool:
    """Whether there was no room, which passes; other errors of a disk do not."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def capacity(root: Path) -> int:
    """Bytes that batches may fill: what their folders take now, and what is free but for a margin. Raises OSError."""
    free = _free(root)
    used = sum(_allocated(batch_dir(root, batch_id)) for batch_id in batches(root))
    return used + min(free, _free(root))  # what was removed or written meanwhile counts once at most


def disk(root: Path) -> tuple[float, float]:
    """Bytes of the disk, and how many of them are free; NaN where it is gone."""
    try:
        found = os.statvfs(root)
    except OSError:
        return math.nan, math.nan
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def fillable(root: Path) -> float:
    """`capacity`, for the eye; NaN where the disk is gone."""
    try:
        return max(0, capacity(root))
    except OSError:
        return math.nan


def _free(root: Path) -> int:
    disk = os.statvfs(root)
    return disk.f_bavail * disk.f_frsize - min(MARGIN_BYTES, disk.f_blocks * disk.f_frsize // 20)


def _allocated(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.lstat().st_blocks * 512
    return total


def room_of(opus_bytes: int, seconds: float) -> int:
    """Bytes of scratch that a recording takes once it is encoded, with its result."""
    return opus_bytes + ITEM_BYTES + int(seconds * RESULT_BYTES_PER_SECOND)


def estimated_room(archive_bytes: int, recordings: int) -> int:
    """Bytes of scratch that suffice to unpack an archive, of MP3s of 32 kb/s or more: Opus and results are no larger
    than these, and large recordings lie there as they are while they are encoded. How many there are may be a lie.
    """
    return (1 << 20) + 2 * archive_bytes + ITEM_BYTES * min(recordings, archive_bytes // 1024)


def write_atomic(path: Path, data: bytes) -> None:
    """Write all of the file or none of it, also when the machine dies."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _open_lock(root: Path, name: str) -> int:
    try:
        return os.open(root / ".locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise Fatal(f"SCRATCH_ROOT {root} cannot be used: {error.strerror}") from error


@contextmanager
def batch_lock(root: Path, batch_id: str) -> Iterator[bool]:
    """Hold a batch's lock on this host; yields False, at once, if it is held elsewhere.

    Each batch is one byte of one file (an open-file-description lock), so that years of batches leave no files behind.
    """
    digest = hashlib.sha256(check_batch_id(batch_id).encode()).digest()
    byte = int.from_bytes(digest[:8], "big") >> 2
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    fd = _open_lock(root, "batches")
    try:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
            held = True
        except (BlockingIOError, PermissionError):
            held = False
        yield held
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Slot:
    """A place among this host's workers of one kind, held as long as the process lives."""

    kind: str
    number: int
    fd: int

    def release(self) -> None:
        os.close(self.fd)


def take_slot(root: Path, kind: str, number: int | None = None) -> Slot | None:
    """Take the first free slot of a kind, or the one asked for; None if it is held by a living process."""
    for candidate in range(MAX_SLOTS) if number is None else [number]:
        fd = _open_lock(root, f"{kind}.{candidate}")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        return Slot(kind, candidate, fd)
    return None
