"""Where programs read strangers' bytes: no network, no files but their own libraries, no secrets, bounded resources.

bubblewrap (https://github.com/containers/bubblewrap) makes the room from namespaces and needs no privilege. What goes
in and out are the three pipes.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from lab_audio.errors import Fatal

# What a program from Debian or Ubuntu needs to start. Nothing of a host's own is in there.
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache", "/etc/alternatives")
USUAL = ("/lib", "/lib32", "/lib64")  # links into /usr
SYSTEM = "/usr/bin:/bin:/usr/local/bin"  # where its own tools are, whatever PATH says
MEMORY = 2 << 30  # bytes of address space
PROCESSES = 64  # ffmpeg's threads count
FILES = 64
PROBE_SECONDS = 20
NOBODY = "65534"


def enclosed(argv: Sequence[str], cpu_seconds: int) -> list[str]:
    """The command line by which a program runs in the sandbox, `argv[0]` being its path; with limits alone where none
    works.

    A worker asks `problem` first, and does not start where there is one, unless it is allowed to.
    """
    if problem() is None:
        return _in_bubblewrap(argv, cpu_seconds)
    return [*_limited(cpu_seconds), *argv] if shutil.which("prlimit", path=SYSTEM) else list(argv)


@cache
def problem() -> str | None:
    """Why no sandbox works on this host; None if one does. Asked once in a process. Raises Fatal if it hangs."""
    for program, package in (("bwrap", "bubblewrap"), ("prlimit", "util-linux")):
        if shutil.which(program, path=SYSTEM) is None:
            return f"{program} is missing: apt install {package}"
    try:
        done = subprocess.run(
            _in_bubblewrap([_path("prlimit"), "--version"], PROBE_SECONDS),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
            env={},
        )
    except subprocess.TimeoutExpired:
        raise Fatal(f"bwrap did not answer in {PROBE_SECONDS} seconds; is this host overloaded?") from None
    except OSError as error:
        return f"bwrap cannot be run: {error.strerror}"
    if done.returncode:
        return (
            f"bwrap: {done.stderr.strip()[:300] or f'exit code {done.returncode}'}; are user namespaces allowed here?"
        )
    return None


def ended_by(code: int) -> signal.Signals | None:
    """The signal that ended a program, by the exit code that is seen outside; None if it ended by itself."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    return signal.Signals(number) if number in set(signal.Signals) else None


def _in_bubblewrap(argv: Sequence[str], cpu_seconds: int) -> list[str]:
    room = ["--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"]
    room += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    room += ["--dev-bind", "/dev/null", "/dev/null"]
    for path in LIBRARIES:
        room += ["--ro-bind-try", path, path]
    for usual in map(Path, USUAL):
        if usual.is_symlink():
            room += ["--symlink", str(usual.readlink()), str(usual)]
        elif usual.is_dir():
            room += ["--ro-bind", str(usual), str(usual)]
    for program in (_path("prlimit"), argv[0]):
        room += ["--ro-bind", str(Path(program).resolve()), program]
    # Outside of a process space of its own, all of this user's processes would count.
    limited = _limited(cpu_seconds, f"--nproc={PROCESSES}")
    return [_path("bwrap"), *room, "--remount-ro", "/", "--", *limited, *argv]


def _limited(cpu_seconds: int, *more: str) -> list[str]:
    # The soft limit says why; the hard one is for what does not listen.
    limits = [f"--as={MEMORY}", f"--cpu={cpu_seconds}:{cpu_seconds + 5}", f"--nofile={FILES}", "--fsize=0", "--core=0"]
    return [_path("prlimit"), *limits, *more, "--"]


def _path(program: str) -> str:
    return shutil.which(program, path=SYSTEM) or program
