"""What a worker tells systemd (Type=notify): that it is ready, that its work goes on, what it is at, that it stops.

Where nobody listens, nothing is said. The protocol: https://www.freedesktop.org/software/systemd/man/sd_notify.html
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import Protocol

TELL_SECONDS = 5.0
PATIENCE_SECONDS = 300.0  # without progress: at the start, and in a process that reports to its parent


class Pulse(Protocol):
    """A number in shared memory: until when a process is sure to report again; 0 until its work begins."""

    value: float


class _Told:
    ready = False
    at = -TELL_SECONDS
    status = ""
    pulse: Pulse | None = None


_aside = threading.local()


def ready(status: str) -> None:
    """The worker can take work. May be said again, as what it is at."""
    if (_Told.ready, _Told.status) != (True, status):
        _Told.ready, _Told.status = True, status
        _tell("READY=1", f"STATUS={_line(status)}")


def status(text: str | None = None) -> None:
    """What the worker is at, for a person; None: what it was at before it waited."""
    _Told.status = _Told.status if text is None else text
    _tell(f"STATUS={_line(_Told.status)}")


def waiting(why: str) -> None:
    """It cannot go on for now; `status` ends this."""
    _tell(f"STATUS=waiting: {_line(why)}")


def stopping() -> None:
    """The worker was asked to stop, and does once its work in hand is done."""
    _tell("STOPPING=1", "STATUS=finishing what is in hand")


def progress(within: float = PATIENCE_SECONDS) -> None:
    """The work went on: feeds the watchdog, or while the worker starts has systemd wait for longer.

    `within`: seconds until the next report, where that may take longer; only for a process with a pulse.
    """
    if getattr(_aside, "here", False):
        return
    now = time.monotonic()
    if _Told.pulse is not None:
        _Told.pulse.value = max(_Told.pulse.value, now + within)
    elif now - _Told.at >= TELL_SECONDS:
        _Told.at = now
        _tell("WATCHDOG=1" if _Told.ready else f"EXTEND_TIMEOUT_USEC={int(PATIENCE_SECONDS * 1e6)}")


def aside() -> None:
    """What this thread does from now on is no sign that the work goes on."""
    _aside.here = True


def report_to(pulse: Pulse) -> None:
    """Have this process report to its parent, which alone speaks with systemd."""
    os.environ.pop("NOTIFY_SOCKET", None)
    _Told.pulse = pulse


def _line(text: str) -> str:
    return " ".join(text.split())


def _tell(*lines: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto("\n".join(lines).encode(), "\0" + address[1:] if address[0] == "@" else address)
