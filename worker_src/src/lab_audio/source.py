"""The source room: a directory where recordings arrive, on this machine or behind OpenSSH.

Every question is one POSIX-sh script over GNU find, stat, tar and xargs, run by `sh -c` here or there: the
transport is a prefix of its argument vector. Lists go in on stdin and come back on stdout NUL-separated, so
any name is safe; what comes back is checked, as the source may be anybody's.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shlex
import signal
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Literal, cast

from lab_audio import notify
from lab_audio.contracts import MAX_INTEGER, SourceFile
from lab_audio.errors import ConfigError, Fatal, LabAudioError, NotFound, Permanent, Retryable
from lab_audio.log import get_logger

CHUNK = 1 << 20
MAX_RECORD_BYTES = 1 << 16
MAX_FILES = 10_000_000  # of a listing: 3 GB of memory
MAX_TAIL_BYTES = 1 << 26  # that are still read once enough was said
MAX_PATH_BYTES = 2000  # what PostgreSQL can index
NO_DIRECTORY = 66

_URL = re.compile(
    r"ssh://(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@"
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*))"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<dir>/.*)",
    re.DOTALL,
)
_PLAIN_PATH = re.compile(r"[^\s\"'%$~\\]+")
_RECORD = re.compile(
    rb"([0-9]{1,18}) (-?[0-9]{1,18}\.[0-9]{9})[0-9]* (-?[0-9]{1,18}\.[0-9]{9})[0-9]* \./(.+)", re.DOTALL
)

_CD = f'cd -- "$1" || exit {NO_DIRECTORY}; '
_FORMAT = '-printf "%s %T@ %C@ %p\\0"'

# The clock is read first, so that a file that changes while find walks is not yet settled.
_LIST = (
    _CD + 'date "+%s.%N" | tr "\\n" "\\0"; '
    'find . -mindepth 1 -ignore_readdir_race -name ".*" -prune '
    f'-o -type f "(" -iname "*.mp3" -o -iname "*.tar" ")" '
    f'"(" -readable {_FORMAT} -o -fprintf /dev/stderr "%P cannot be read\\n" ")"'
)
_STAT = _CD + f"xargs -0 -r sh -c 'find \"$@\" -maxdepth 0 -type f {_FORMAT}' sh"
# Without --hard-dereference the second of two hard-linked files would arrive as a link.
_TAR = (
    _CD + "unset TAR_OPTIONS; exec tar --null --verbatim-files-from --no-recursion "
    "--hard-dereference --format=posix -cf - -T -"
)
_CAT = _CD + 'exec cat -- "$2"'
# Takes a number, size, mtime and path at a time and answers with the numbers that are done. Sixteen of the
# longest paths stay below what xargs puts on one command line, so that the four are never parted.
_FATE = _CD + (
    "xargs -0 -r -x -n 64 sh -c '"
    'while [ "$#" -ge 4 ]; do n=$1 want="$2 $3" p=$4; shift 4; '
    'if [ ! -e "$p" ] && [ ! -L "$p" ]; then echo "$n"; continue; fi; '
    '[ "$(stat -c "%s %.9Y" -- "$p")" = "$want" ] || continue; '
    'ACT; [ -e "$p" ] || echo "$n"; '
    "done; exit 0' sh"
)
_DELETE = _FATE.replace("ACT", 'rm -f -- "$p"')
_MOVE = _FATE.replace(
    "ACT",
    't=.transferred/${p#./} i=1; mkdir -p -- "${t%/*}"; '
    'while [ -e "$t" ] || [ -L "$t" ]; do t=.transferred/${p#./}.$i; i=$((i+1)); done; '
    'mv -n -T -- "$p" "$t"',
)


@dataclass(frozen=True)
class Source:
    """A directory, and the arguments that bring a command to its host. `name` and `host` are for messages."""

    name: str
    directory: str
    transport: tuple[str, ...] = ()
    host: str = ""


def parse(source: str, *, ssh_key: Path | None = None, ssh_known_hosts: Path | None = None) -> Source:
    """Make a Source of `ssh://user@host[:port]/dir` or `/dir`. Raises ConfigError naming the setting.

    The user's and the system's ssh_config are not read: what is not set here does not happen.
    """
    if source.startswith("/") and "\0" not in source:
        directory = _directory(source)
        return Source(directory, directory)
    match = _URL.fullmatch(source)
    if not match or "\0" in source or not 0 < int(match["port"] or 22) < 65536:
        raise ConfigError("SOURCE: must be ssh://user@host[:port]/dir or an absolute /dir")
    options = [
        "BatchMode=yes", "StrictHostKeyChecking=yes", "UpdateHostKeys=no", "LogLevel=ERROR",
        "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4", "ClearAllForwardings=yes",
    ]  # fmt: skip
    if ssh_known_hosts:
        known_hosts = _file("SSH_KNOWN_HOSTS", ssh_known_hosts)
        options += [f"UserKnownHostsFile={known_hosts}", "GlobalKnownHostsFile=/dev/null"]
    if ssh_key:
        options += [f"IdentityFile={_file('SSH_KEY', ssh_key)}", "IdentitiesOnly=yes"]
    host, port = match["six"] or match["host"], match["port"] or "22"
    transport = ["ssh", "-F", "/dev/null", "-T", "-x", "-a"]
    transport += [word for option in options for word in ("-o", option)]
    transport += ["-p", port, "-l", match["user"], "--", host]
    directory = _directory(match["dir"])
    written = f"[{host}]" if match["six"] else host
    name = f"ssh://{match['user']}@{written}:{port}{directory}"
    return Source(name, directory, tuple(transport), f"{match['user']}@{host} port {port}")


def _directory(path: str) -> str:
    """A directory spelt one way: `name` is the source's identity in the ledger."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _file(key: str, path: Path) -> str:
    text = str(path.absolute())
    if not _PLAIN_PATH.fullmatch(text):
        raise ConfigError(f"{key}: {text!r} has a character that ssh would interpret; use a plain path")
    if not os.access(text, os.R_OK):
        raise ConfigError(f"{key}: {text} cannot be read")
    return text


def settled(source: Source, settle_seconds: int) -> list[SourceFile]:
    """The *.mp3 and *.tar of a source, sorted, unchanged for `settle_seconds` by the source's clock.

    Hidden files and directories and symbolic links are left out; parts that cannot be read are logged.
    Raises ConfigError, Fatal or Retryable, as everything here does.
    """
    with _run(source, _LIST, accept=(0, 1)) as run:
        records = _records(source, run.out)
        clock = re.fullmatch(rb"([0-9]{1,11})\.([0-9]{9})", next(records, b""))
        if not clock:
            run.finish()
            raise _garbled(source)
        youngest = int(clock[1] + clock[2]) - settle_seconds * 10**9
        files = []
        for record in records:
            file, ctime_ns = _parse(source, record)
            if len(_encode(file.path)) > MAX_PATH_BYTES:
                get_logger().warning("source_path_too_long", source=source.name, path=file.path, most=MAX_PATH_BYTES)
                continue
            if abs(file.mtime_ns) > MAX_INTEGER:
                get_logger().warning("source_time_out_of_range", source=source.name, path=file.path)
                continue
            if settle_seconds == 0 or max(file.mtime_ns, ctime_ns) <= youngest:
                files.append(file)
        complaint = run.finish()
        if run.code or "cannot be read" in complaint:
            get_logger().warning("source_listed_in_part", source=source.name, reason=complaint)
    return sorted(files)


def stat(source: Source, paths: Iterable[str]) -> dict[str, SourceFile]:
    """The present size and mtime of regular files; those that are gone are absent."""
    with _run(source, _STAT, [b"./" + _encode(path) for path in paths], accept=(0, 123)) as run:
        files = [_parse(source, record)[0] for record in _records(source, run.out)]
        run.finish()
    return {file.path: file for file in files}


@contextmanager
def stream(source: Source, files: Iterable[SourceFile]) -> Iterator[Iterator[tuple[SourceFile, BinaryIO]]]:
    """The contents of `files`, in order, over one connection; each can be read until the next is asked for.

    Files that are gone, not readable or not as listed any more are left out. Raises Retryable where the
    connection is lost, and at the end where a yielded file has changed meanwhile: its bytes may be torn.
    """
    asked = list(files)
    if not asked:
        yield iter(())
        return
    with _run(source, _TAR, [_encode(file.path) for file in asked], accept=(0, 1, 2)) as run:
        run.most = MAX_TAIL_BYTES + sum(file.size + 2 * MAX_RECORD_BYTES for file in asked)
        yield _members(source, asked, run)


class _Header(tarfile.TarInfo):
    """A header of what GNU tar sends us; one that tarfile would read into memory without end is none."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        info = super().frombuf(buf, encoding, errors)
        if info.type == tarfile.GNUTYPE_SPARSE or (info.type != tarfile.REGTYPE and info.size > MAX_RECORD_BYTES):
            raise ValueError
        return info


def _members(source: Source, asked: list[SourceFile], run: _Run) -> Iterator[tuple[SourceFile, BinaryIO]]:
    by_path = {file.path: file for file in asked}
    given: list[SourceFile] = []
    try:
        with tarfile.open(
            fileobj=cast(BinaryIO, run), mode="r|", bufsize=CHUNK, encoding="utf-8", tarinfo=_Header
        ) as archive:
            for info in archive:
                archive.members.clear()  # type: ignore[attr-defined]
                file = by_path.pop(info.name, None)
                if file and info.isreg() and SourceFile.from_tar(info) == file:
                    given.append(file)
                    yield file, cast(BinaryIO, archive.extractfile(info))
    except LabAudioError:
        raise
    except Exception:  # tarfile raises nearly anything over what is no tar
        run.finish()
        raise _garbled(source) from None
    complaint = run.finish()
    if run.padded:
        raise Retryable(f"{source.name}: a file cannot be read, mend or remove it: {complaint}")
    if run.code:
        get_logger().warning("source_streamed_in_part", source=source.name, reason=complaint)
    now = stat(source, (file.path for file in given))
    for file in given:
        if now.get(file.path, file) != file:
            raise Retryable(f"{source.name}: {file.path!r} changed while it was read")


def fetch_file(source: Source, file: SourceFile, path: Path) -> tuple[str, int]:
    """Copy one file as it is to `path` (mode 0600); its SHA-256 in hex and its size in bytes.

    Raises NotFound where it is gone, Permanent where it is not as listed any more or cannot be read,
    Retryable where the disk is full. `path` may be left incomplete then.
    """
    digest, size, complaint = hashlib.sha256(), 0, ""
    _encode(file.path)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out, _run(source, _CAT, more=["./" + file.path], accept=(0, 1)) as run:
            os.fchmod(fd, 0o600)
            while data := run.out.read(CHUNK):
                size += len(data)
                if size > file.size:
                    break
                out.write(data)
                digest.update(data)
                notify.progress()
            else:
                complaint = run.finish()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (Retryable if full else Fatal)(f"cannot write {path}: {error.strerror}") from error
    now = stat(source, [file.path]).get(file.path)
    if now is None:
        raise NotFound(f"{source.name}: {file.path!r} is gone")
    if run.code:
        raise Permanent(f"{source.name}: {file.path!r} cannot be read: {complaint}")
    if now != file or size != file.size:
        raise Permanent(f"{source.name}: {file.path!r} is not as it was listed; it is still changing")
    return digest.hexdigest(), size


def apply_fate(source: Source, files: Iterable[SourceFile], fate: Literal["move", "delete"]) -> set[str]:
    """Delete files, or move them into `.transferred/`, where size and mtime are as given; the paths done.

    A file that is already gone is done. One moved never replaces another: it gets a number.
    """
    listed = list(files)
    words = []
    for number, file in enumerate(listed):
        words += [b"%d" % number, b"%d" % file.size, file.mtime.encode(), b"./" + _encode(file.path)]
    with _run(source, {"move": _MOVE, "delete": _DELETE}[fate], words) as run:
        numbers = run.out.read(20 * len(listed) + 1).split()
        complaint = run.finish()
    if not all(len(number) < 19 and number.isdigit() and int(number) < len(listed) for number in numbers):
        raise _garbled(source)
    if complaint and len(numbers) < len(listed):
        get_logger().warning("source_fate_in_part", source=source.name, fate=fate, reason=complaint)
    return {listed[int(number)].path for number in numbers}


def check_path(path: str) -> None:
    """Raises Permanent for a path that no file of a source can have, or that is too long to be taken."""
    if len(_encode(path)) > MAX_PATH_BYTES:
        raise Permanent(f"{path[:100]!r}... is longer than {MAX_PATH_BYTES} bytes")


def _encode(path: str) -> bytes:
    """The bytes of a path that lies inside the source. Raises Permanent for any other."""
    if "\0" in path or {"", ".", ".."} & set(path.split("/")):
        raise Permanent(f"{path!r} is not a path inside a source")
    return path.encode("utf-8", "surrogateescape")


def _records(source: Source, out: BinaryIO) -> Iterator[bytes]:
    rest, number = b"", 0
    while data := out.read(MAX_RECORD_BYTES):
        notify.progress()
        *whole, rest = (rest + data).split(b"\0")
        yield from whole
        number += len(whole)
        if len(rest) > MAX_RECORD_BYTES:
            raise _garbled(source)
        if number > MAX_FILES:
            raise Fatal(f"{source.name}: there are more than {MAX_FILES} files; move what was transferred elsewhere")
    # What lies behind the last NUL belongs to a broken connection, which finish() tells.


def _parse(source: Source, record: bytes) -> tuple[SourceFile, int]:
    """A file and its ctime in nanoseconds, of what find printed."""
    match = _RECORD.fullmatch(record)
    if not match:
        raise _garbled(source)
    size, mtime, ctime, name = match.groups()
    path = name.decode("utf-8", "surrogateescape")
    try:
        _encode(path)
    except Permanent as error:
        raise Fatal(f"{source.name} answers with strange paths: {error}") from None
    return SourceFile(path, int(size), _find_ns(mtime)), _find_ns(ctime)


def _find_ns(seconds: bytes) -> int:
    """find prints a time before 1970 as its floor and the rest, not as a decimal number."""
    whole, rest = seconds.split(b".")
    return int(whole) * 10**9 + int(rest)


def _garbled(source: Source) -> Fatal:
    return Fatal(
        f"{source.name}: what its find, tar or sh prints cannot be understood. It needs GNU findutils,"
        " coreutils and tar, and a login shell that prints nothing of its own (try: ssh HOST true)"
    )


class _Run:
    """A script running at the source; tarfile reads from it too. `code`: its exit code, once finished."""

    def __init__(self, source: Source, process: subprocess.Popen[bytes], accept: tuple[int, ...]) -> None:
        self.out = cast(BinaryIO, process.stdout)
        self.code = 0
        self.most = math.inf
        self._source, self._process, self._accept = source, process, accept
        self._errors = b""
        self.padded = False
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        while data := cast(IO[bytes], self._process.stderr).read1(4096):  # type: ignore[attr-defined]
            self._errors = (self._errors + data)[-16384:]

    def read(self, size: int) -> bytes:
        """For tarfile, which reads no further than the end of an archive: less is a lost connection.

        `most`: bytes that can have been asked for.
        """
        data = self.out.read(size)
        self.most -= len(data)
        if self.most < 0:
            raise Retryable(f"{self._source.name}: more comes than was asked for; does a file grow?")
        if not data:
            complaint = self.finish()
            raise Retryable(f"{self._source.name}: its tar ended too early: {complaint}")
        return data

    def finish(self) -> str:
        """Read to the end and wait; what the script complained of. Raises what its failure means."""
        left = MAX_TAIL_BYTES
        while left and (data := self.out.read(min(left, CHUNK))):
            left -= len(data)
        if not left:
            raise _garbled(self._source)
        self.code = self._process.wait()
        self._reader.join()
        said = self._errors.decode(errors="replace")
        said = " ".join("".join(c if c.isprintable() else " " for c in said).split())
        # GNU tar goes on with zeros where it cannot read a file; also where one shrank, which shows in its size.
        self.padded = "Read error" in said
        if self.code not in self._accept:
            raise _failure(self._source, self.code, said)
        return said[-500:]

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self.out.close()
        cast(IO[bytes], self._process.stderr).close()


@contextmanager
def _run(
    source: Source,
    script: str,
    words: Iterable[bytes] = (),
    *,
    more: Iterable[str] = (),
    accept: tuple[int, ...] = (0,),
) -> Iterator[_Run]:
    """Run a script at the source: `$1` its directory, then `more`; `words` come NUL-ended on stdin."""
    command = ["sh", "-c", script, "sh", source.directory, *more]
    if source.transport:
        command = [*source.transport, shlex.join(["env", "LC_ALL=C", *command])]
    # A group of its own, as Ctrl-C is the worker's to handle; and none of the worker's secrets go along.
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "SSH_AUTH_SOCK") if key in os.environ}
    with tempfile.TemporaryFile() as stdin:
        stdin.writelines(word + b"\0" for word in words)
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                [word.encode("utf-8", "surrogateescape") for word in command],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env={**kept, "LC_ALL": "C"},
            )
        except FileNotFoundError:
            raise Fatal(f"program {command[0]} is not installed here; SOURCE needs it") from None
    run = _Run(source, process, accept)
    try:
        yield run
    finally:
        run.close()


def _failure(source: Source, code: int, said: str) -> LabAudioError:
    """What an exit code and stderr mean, and what to do."""
    detail = f": {said[-500:]}" if said else ""
    if code == NO_DIRECTORY:
        return ConfigError(f"SOURCE: directory {source.directory} cannot be entered{detail}")
    if code in (126, 127):
        return Fatal(f"{source.name}: a program is missing; needs GNU find, stat, tar and xargs there{detail}")
    if not source.transport or code != 255:
        return Retryable(f"{source.name}: a command there ended with status {code}{detail}")
    if "HOST IDENTIFICATION HAS CHANGED" in said:
        return Fatal(
            f"{source.name}: the host key of {source.host} is not the pinned one. If the host was made anew,"
            f" put its new key into SSH_KNOWN_HOSTS; if not, somebody else answers{detail}"
        )
    if "Host key verification failed" in said:
        return Fatal(
            f"{source.name}: the host key of {source.host} is not known. Check it on the host, then pin it in"
            f" SSH_KNOWN_HOSTS (ssh-keyscan prints it){detail}"
        )
    if "Permission denied (" in said:
        return Fatal(
            f"{source.name}: {source.host} does not let us in. Put the public key that belongs to SSH_KEY"
            f" into its authorized_keys{detail}"
        )
    return Retryable(f"{source.name}: no connection to {source.host}{detail}")
