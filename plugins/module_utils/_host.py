# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What modules that change a host have in common: refusals, locks, owners, modes. Private: it may change any time."""

from __future__ import annotations

import fcntl
import grp
import pwd
import re
import time

LAST_NUMBER = 2**32 - 2  # the one after it says "let it be" to chown


class Refused(Exception):
    """It cannot be done; the message says what, where, and what to do."""


def hold(handle: int, seconds: float, otherwise: str) -> None:
    """Lock an open file or directory, for this process and what it starts. Raises Refused after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise Refused(otherwise) from None
            time.sleep(0.1)  # flock that waits knows no deadline


def number_of(kind: str, name: str | None) -> int:
    """The number of an `owner` or a `group`; -1, which lets it be, without a name. Raises Refused."""
    if name is None:
        return -1
    if re.fullmatch("[0-9]+", name):
        if int(name) > LAST_NUMBER:
            raise Refused(f"{kind} {name} is a number that no {kind} has; the last is {LAST_NUMBER}")
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if kind == "owner" else grp.getgrnam(name).gr_gid
    except KeyError:
        raise Refused(f"{kind} {name} does not exist on this host; create it first") from None


def bits_of(mode: str, where: str = "") -> int:
    """A mode as a number. Raises Refused unless it is octal as YAML leaves it in quotes."""
    if not re.fullmatch(r"0[0-7]{3,4}", mode):
        raise Refused(f"mode {mode}{where} is not octal in quotes, as '0750'")
    return int(mode, 8)
