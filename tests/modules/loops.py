"""Loop devices of tests' own, on sparse files. Needs root."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNS = 0x00020000
MIB = 1 << 20


def do(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def own_mounts() -> None:
    """What this process and its children mount from now on, nobody else sees; /dev/disk is their own."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise RuntimeError(f"no mount namespace here: {os.strerror(ctypes.get_errno())}")
    do("mount", "--make-rprivate", "/")
    Path("/dev/disk").mkdir(exist_ok=True)
    do("mount", "-t", "tmpfs", "tmpfs", "/dev/disk")


@contextmanager
def instead_of(directory: Path) -> Iterator[Path]:
    """An empty directory in place of one, for this process and its children."""
    do("mount", "-t", "tmpfs", "tmpfs", directory)
    try:
        yield directory
    finally:
        do("umount", directory)


class Loop:
    """A disk of `size` bytes. `image`: its content."""

    def __init__(self, image: Path, size: int) -> None:
        self.image, self.size = image, size
        with image.open("wb") as file:
            file.truncate(size)
        self.node = do("losetup", "-f", "--show", image).strip()

    def detach(self) -> None:
        do("losetup", "-d", self.node)

    def sha256(self) -> str:
        """Of what is on the disk, all of it."""
        do("sync", "-f", self.image)
        do("blockdev", "--flushbufs", self.node)
        digest = hashlib.sha256()
        with self.image.open("rb") as file:
            while block := file.read(4 * MIB):
                digest.update(block)
        return digest.hexdigest()

    def put(self, at: int, data: bytes) -> None:
        with Path(self.node).open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, at)
            os.fsync(file.fileno())

    def get(self, at: int, length: int) -> bytes:
        with Path(self.node).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, at)

    def grow(self, size: int) -> None:
        with self.image.open("r+b") as file:
            file.truncate(size)
        do("losetup", "-c", self.node)
        self.size = size

    def places(self) -> list[str]:
        """Where it is mounted."""
        seen = subprocess.run(["findmnt", "-rn", "-o", "TARGET", "-S", self.node], capture_output=True, text=True)
        return seen.stdout.split()


@contextmanager
def loop(image: Path, size: int) -> Iterator[Loop]:
    disk = Loop(image, size)
    try:
        yield disk
    finally:
        for place in disk.places():
            do("umount", "-l", place)
        disk.detach()
