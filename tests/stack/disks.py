"""A small disk of its own for one host: a loop mount that can be filled, and that can break down. Needs root."""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import suppress
from pathlib import Path

CLONE_NEWNS = 0x00020000
MIB = 1 << 20


class Disk:
    """The disk mounted at `place`. `missing`: why there is none here."""

    def __init__(self, place: Path, size: int = 96 * MIB) -> None:
        self.place, self.size = place, size
        self.image = place.with_name(f"{place.name}.img")
        self.missing = ""
        self.broken = False

    def mount(self) -> None:
        """Mount it in a mount namespace of our own, so that it goes with us however we end."""
        if os.getuid() != 0:
            self.missing = "needs root, for a loop mount"
            return
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
                raise OSError(ctypes.get_errno(), "unshare")
            _do("mount", "--make-rprivate", "/")
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self.place.mkdir(exist_ok=True)
            with self.image.open("wb") as file:
                file.truncate(self.size)
            _do("mkfs.ext4", "-q", "-m", "0", self.image)
            self._attach()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or b""
            self.missing = f"no loop mount here: {error} {said.decode(errors='replace').strip()}"

    def _attach(self) -> None:
        _do("mount", "-o", "loop,errors=continue", self.image, self.place)

    def fill(self) -> None:
        """Leave not a byte."""
        with (self.place / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            for size in (MIB, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"\0" * size)

    def empty(self) -> None:
        if not self.missing and not self.broken:
            (self.place / "ballast").unlink(missing_ok=True)

    def break_down(self) -> None:
        """From now on every write fails, as after an error of the medium."""
        self.broken = True
        with suppress(subprocess.CalledProcessError):
            _do("mount", "-o", "remount,abort", self.place)

    def repair(self) -> None:
        """What an operator does after a reboot. Nothing may have a file open there."""
        _do("umount", self.place)
        subprocess.run(["e2fsck", "-fy", self.image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        self._attach()
        self.broken = False

    def close(self) -> None:
        if not self.missing:
            subprocess.run(["umount", "-l", self.place], stderr=subprocess.DEVNULL, check=False)


def _do(*command: object) -> None:
    subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, check=True)
