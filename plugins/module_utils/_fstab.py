# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One line of fstab, changed whole or not at all. Private: it may change with any release."""

from __future__ import annotations

import os
import typing as t
from contextlib import contextmanager

from ansible_collections.lab.audio.plugins.module_utils._block import execute, unescape
from ansible_collections.lab.audio.plugins.module_utils._host import Refused, hold

LOCK_SECONDS = 120
ENCODING: dict[str, str] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextmanager
def locked(fstab: str) -> t.Iterator[int]:
    """Hold the directory of fstab, so that runs come one after the other. Gives the lock, for children to keep.

    A child that outlives a killed run, such as mkfs, holds the lock until it ends: the next run waits for it.
    """
    try:
        lock = os.open(os.path.dirname(fstab), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{os.path.dirname(fstab)}, the directory of fstab: {error.strerror}") from error
    try:
        busy = f"another run of gpu_volume holds {os.path.dirname(fstab)} for {LOCK_SECONDS} s; wait until it has ended"
        hold(lock, LOCK_SECONDS, busy)
        yield lock
    finally:
        os.close(lock)


def read(fstab: str) -> str:
    try:
        with open(fstab, **ENCODING) as file:  # type: ignore[call-overload]
            return file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Refused(f"{fstab} cannot be read: {error.strerror}") from error


def escape(field: str) -> str:
    for byte in "\\ \t\n":
        field = field.replace(byte, f"\\{ord(byte):03o}")
    return field


def entry(text: str) -> list[str] | None:
    """The fields of a line, with a comment and an empty one being none."""
    fields = text.split()
    return None if not fields or fields[0].startswith("#") else fields


def edit(text: str, belongs: t.Callable[[str, str], bool], line: str | None) -> str:
    """`line` in the place of the first entry that `belongs(source, mount point)`, and no other such entry.

    The mount point comes without a slash at its end.
    """
    kept = []
    for old in text.splitlines(keepends=True):
        fields = entry(old)
        if fields and len(fields) > 1 and belongs(unescape(fields[0]), os.path.normpath(unescape(fields[1]))):
            if line is None:
                continue
            same = fields == line.split() or fields + ["0"] * (6 - len(fields)) == line.split()
            old, line = (old if same else line + "\n"), None
        kept.append(old)
    if line is not None:
        if kept and not kept[-1].endswith("\n"):
            kept[-1] += "\n"
        kept.append(line + "\n")
    return "".join(kept)


def temporary(fstab: str) -> str:
    return os.path.join(os.path.dirname(fstab), f".{os.path.basename(fstab)}.gpu_volume")


def write(fstab: str, text: str) -> None:
    """Replace fstab, unless findmnt finds an error in the new one that the old one does not have."""
    temp = temporary(fstab)
    try:
        old = os.stat(fstab) if os.path.exists(fstab) else None
        with open(temp, "w", **ENCODING) as file:  # type: ignore[call-overload]
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), old.st_mode & 0o7777 if old else 0o644)
            if old:
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
            os.fsync(file.fileno())
        new = _errors(temp) - (_errors(fstab) if old else set())
        if new:
            raise Refused(f"findmnt --verify refuses the new {fstab}: {'; '.join(sorted(new))}; it is left as it was")
        os.rename(temp, fstab)
        directory = os.open(os.path.dirname(fstab), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise Refused(f"{fstab} cannot be written: {error.strerror}") from error
    finally:
        tidy(fstab)


def tidy(fstab: str) -> None:
    """Remove what a killed run left."""
    if os.path.exists(temporary(fstab)):
        os.unlink(temporary(fstab))


def _errors(fstab: str) -> set[str]:
    code, out = execute("findmnt", "--verify", "--tab-file", fstab, codes=(0, 1))
    place, found = "", set()
    for line in out.splitlines():
        if not line.startswith(" "):
            place = line
        elif "[E]" in line:
            found.add(f"{place}: {line.split('[E]', 1)[1].strip()}")
    if code and not found and "parse error" in out:
        found.add(out.strip())
    return found
