"""Server programs for tests and the demo: on free loopback ports, tied to us, nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class NotReady(RuntimeError):
    """A server ended or did not answer; the message ends with its log."""


def free_ports(count: int) -> list[int]:
    """Ports below those of outgoing connections, so that none of these takes one before the server does."""
    held: list[socket.socket] = []
    while len(held) < count:
        candidate = socket.socket()
        try:
            candidate.bind(("127.0.0.1", random.randrange(20000, 32000)))
            held.append(candidate)
        except OSError:
            candidate.close()
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


class Servers:
    """A context manager around server processes with a directory of their own, made in `parent`.

    A subclass starts them in `start`, with `spawn` and `wait`. They are killed when the thread that entered
    ends, however it ends: enter in the main thread.
    """

    def __init__(self, parent: Path | str) -> None:
        self.parent = Path(parent)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        raise NotImplementedError

    def __enter__(self):  # type: ignore[no-untyped-def]  # Self needs Python 3.11
        # Another program may take a port between its choice and its use.
        for last in (False, False, True):
            self.directory = Path(tempfile.mkdtemp(prefix=f"{type(self).__name__.lower()}-", dir=self.parent))
            try:
                self.start()
                return self
            except BaseException as error:
                self.stop()
                if last or not isinstance(error, NotReady):
                    raise
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def spawn(self, name: str, argv: Sequence[object], **env: str) -> None:
        """Start a server, logging to {name}.log: killed when we die, away from ^C in its own session."""
        me = os.getpid()

        def tie() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != me:
                os._exit(1)

        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(a) for a in argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={
                    "PATH": "/usr/bin:/bin:/usr/sbin",
                    "HOME": str(self.directory),
                    "LC_ALL": "C.UTF-8",
                    **env,
                },
                start_new_session=True,
                preexec_fn=tie,
            )

    def wait(self, name: str, answers: Callable[[], bool], seconds: float = 60) -> None:
        """Return when a server answers. Raises NotReady, with its log, if it has ended or time is over."""
        deadline = time.monotonic() + seconds
        while True:
            code = self._processes[name].poll()
            with contextlib.suppress(OSError):
                if code is None and answers():
                    return
            if code is not None or time.monotonic() > deadline:
                what = "does not answer" if code is None else f"ended with {code}"
                raise NotReady(f"{name} {what}:\n{self.last_words(name)}")
            time.sleep(0.02)

    def last_words(self, name: str) -> str:
        """The end of a server's log."""
        return (self.directory / f"{name}.log").read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        shutil.rmtree(self.directory, ignore_errors=True)
