# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a model comes from: a directory of this host or another, by rsync, or a prefix of the object store.

Both list their files, read a small one, and fetch files into a directory. Private: it may change with any release.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lab.audio.plugins.module_utils import _s3
from ansible_collections.lab.audio.plugins.module_utils._host import Refused
from ansible_collections.lab.audio.plugins.module_utils._tree import File, check_paths

REMOTE = re.compile(
    r"(?P<host>(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])):(?P<path>/.*)"
)
# Neither rsync, ssh nor the shell at the other end makes anything else of these.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9_.,+@/-]*")
LISTED = re.compile(r"(?P<type>.)\S{9,10} +(?P<size>\d+) (?P<time>\d+/\d+/\d+ [\d:]+) (?P<path>.+)", re.DOTALL)
ESCAPED = re.compile(r"\\#[0-7]{3}")
SSH_OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "LogLevel=ERROR",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ClearAllForwardings=yes",
)


class Source(t.Protocol):
    """Where files come from. Its methods raise Refused or StoreError."""

    @property
    def name(self) -> str:
        """As it was given."""

    def files(self) -> dict[str, File]:
        """What there is, by path, without the SHA-256 of any."""

    def marked(self, files: dict[str, File]) -> dict[str, File]:
        """The same, each with what changes when it changes."""

    def read(self, path: str) -> bytes:
        """A small file."""

    def fetch(self, paths: list[str], into: str, spare: str, lock: int) -> None:
        """Bring files into a directory, each whole or not at all.

        `spare`: a directory for what is not whole yet. `lock`: to be held by every program that writes.
        """


class Rsync(t.NamedTuple):
    """`place`: as rsync wants it. `shell`: what brings rsync to the other host; empty for this one."""

    name: str
    place: str
    program: str
    shell: str
    scratch: str

    def files(self) -> dict[str, File]:
        listing = self.call(["--recursive", "--list-only", "--8-bit-output", "--no-human-readable", self.place])
        found = {}
        for line in listing.decode("utf-8", "surrogateescape").split("\n"):
            entry = LISTED.fullmatch(line)
            if not entry or entry["type"] == "d":
                if line and not entry:
                    raise Refused(f"{self.name}: rsync lists {line[:200]!r}, which is not understood")
                continue
            if entry["type"] != "-":
                raise Refused(
                    f"{self.name}: {entry['path'][:200]!r} is neither a file nor a directory. Publish the files"
                    " themselves, as cp --dereference or rsync --copy-links make them"
                )
            if ESCAPED.search(entry["path"]):
                raise Refused(f"{self.name}: {entry['path'][:200]!r} has characters that no name should have")
            found[entry["path"]] = File(int(entry["size"]), mark=f"time:{entry['time']}")
        check_paths(found, self.name)
        return found

    def marked(self, files: dict[str, File]) -> dict[str, File]:
        return files

    def read(self, path: str) -> bytes:
        copy = os.path.join(self.scratch, "manifest.copy")
        self.call([f"{self.place}{path}", copy])
        with open(copy, "rb") as file:
            return file.read()

    def fetch(self, paths: list[str], into: str, spare: str, lock: int) -> None:
        os.makedirs(spare, 0o700, exist_ok=True)
        options = [
            *("--files-from=-", "--from0", f"--partial-dir={spare}", "--chmod=D0700,F0600"),
            # Without --times: see Hashes.
            *(self.place, f"{into}/"),
        ]
        self.call(options, "\0".join(paths).encode(), lock)

    def call(self, options: list[str], given: bytes = b"", lock: int | None = None) -> bytes:
        """Run rsync, and let it end with this process. `lock`: what it holds as long as it runs."""
        libc, ours = ctypes.CDLL(None), os.getpid()

        def end_with_us() -> None:
            libc.prctl(1, signal.SIGTERM)
            if os.getppid() != ours:
                os._exit(1)

        command = [self.program, "--timeout=300", *(["--rsh", self.shell] if self.shell else []), *options]
        # run_command leaves rsync behind when it is killed.
        done = subprocess.run(  # pylint: disable=ansible-bad-function
            command,
            input=given,
            capture_output=True,
            check=False,
            env={**os.environ, "LC_ALL": "C", "TZ": "UTC"},
            pass_fds=[] if lock is None else [lock],
            preexec_fn=end_with_us,
        )
        if done.returncode:
            raise Refused(f"{self.name}: {explained(done.returncode, done.stderr.decode('utf-8', 'replace'))}")
        return done.stdout


ADVICE = (
    (
        "HOST IDENTIFICATION HAS CHANGED",
        "the host's key is not the pinned one: if the host was made anew, put its new key into known_hosts; if not,"
        " somebody else answers",
    ),
    (
        "Host key verification failed",
        "the host's key is not known: check it on that host, then pin it in known_hosts (ssh-keyscan prints it)",
    ),
    ("Permission denied (publickey", "put the public key that belongs to ssh_key into authorized_keys there"),
    ("rsync: command not found", "install rsync there"),
    ("rsync: not found", "install rsync there"),
    ("No such file or directory", "correct src, or publish what is missing"),
    ("No space left on device", "make room"),
    ("Permission denied", "let the account there read it"),
)


def explained(code: int, said: str) -> str:
    """What rsync and ssh said, with what to do. What rsync says of the end of ssh is left out, as it varies."""
    lines = [line.strip() for line in said.splitlines() if line.strip(" @")]
    own = ("rsync error: ", "rsync: connection unexpectedly closed")
    seen = "; ".join(line for line in lines if not line.startswith(own))[:1000] or f"rsync ended with {code}"
    advice = next((advice for words, advice in ADVICE if words in said), "can this host reach it? Try again")
    return f"{advice} ({seen})"


class Prefix(t.NamedTuple):
    """Objects of the store below a key."""

    name: str
    store: _s3.Store
    prefix: str

    def files(self) -> dict[str, File]:
        found = {
            key[len(self.prefix) :]: File(size)
            for key, size in _s3.keys(self.store, self.prefix)
            if not (key.endswith("/") and size == 0)  # how some clients show a directory
        }
        if not found:
            raise Refused(f"{self.name}: {self.store.place(self.prefix)} has no objects: correct src, or publish it")
        check_paths(found, self.name)
        return found

    def marked(self, files: dict[str, File]) -> dict[str, File]:
        found = {}
        for path in files:
            head = self.head(path)
            found[path] = File(head.size, head.sha256, f"etag:{head.etag}")
        return found

    def head(self, path: str) -> _s3.Head:
        head = _s3.head(self.store, self.prefix + path)
        if head is None:
            raise Refused(f"{self.name}: {path} is gone since it was listed: try again")
        return head

    def read(self, path: str) -> bytes:
        data: bytes = b"".join(_s3.blocks(self.store, self.prefix + path, self.head(path)))
        return data

    def fetch(self, paths: list[str], into: str, spare: str, lock: int) -> None:
        os.makedirs(spare, 0o700, exist_ok=True)
        for path in paths:
            target, copy = os.path.join(into, path), os.path.join(spare, "object")
            os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
            _s3.download(self.store, self.prefix + path, self.head(path), copy)
            os.replace(copy, target)


def open_source(module: AnsibleModule) -> Source:
    """The source that `src` names. Raises Refused."""
    src = module.params["src"]
    if src.startswith("s3://"):
        bucket, _slash, prefix = src[len("s3://") :].partition("/")
        prefix = prefix.strip("/")
        if not bucket or not prefix or not prefix.isprintable():
            raise Refused(f"src {src!r} is not s3://bucket/prefix")
        return Prefix(f"s3://{bucket}/{prefix}", _s3.open_store(module)._replace(bucket=bucket), f"{prefix}/")
    remote = REMOTE.fullmatch(src)
    path = remote["path"] if remote else src
    if not PLAIN_PATH.fullmatch(path):
        raise Refused(
            f"src {src!r} is not host:/path, s3://bucket/prefix or /path, with a path of letters, digits and _.,+@/-"
        )
    program = module.get_bin_path("rsync")
    if not program:
        raise Refused("rsync is not installed on this host: install the package rsync")
    if not remote:
        refuse_within(path, module.params["dest"])
    place = f"{src.rstrip('/')}/"
    return Rsync(src.rstrip("/"), place, program, ssh(module) if remote else "", module.tmpdir)


def refuse_within(src: str, dest: str) -> None:
    """Raise Refused unless a source on this host is a directory apart from `dest`, beside which releases are made."""
    if os.path.exists(src) and not os.path.isdir(src):
        raise Refused(f"src {src} is not a directory")
    source = os.path.realpath(src)
    folder, name = os.path.split(os.path.normpath(dest))
    target = os.path.join(os.path.realpath(folder), name)
    if os.path.commonpath([source, target]) in (source, target):
        raise Refused(f"src {src} and dest {dest} lie within each other: bring it to a directory apart")


def ssh(module: AnsibleModule) -> str:
    """The command by which rsync reaches the other host. What is not set here does not happen."""
    given = module.params
    program = module.get_bin_path("ssh")
    if not program:
        raise Refused("ssh is not installed on this host: install the package openssh-client")
    options = list(SSH_OPTIONS)
    for option in ("ssh_key", "known_hosts"):
        path = given[option]
        if path and not PLAIN_PATH.fullmatch(path):
            raise Refused(f"{option} {path!r} is not a path of letters, digits and _.,+@/-")
        if path and not os.access(path, os.R_OK):
            raise Refused(f"{option} {path} cannot be read on this host")
    if given["known_hosts"]:
        options += [f"UserKnownHostsFile={given['known_hosts']}", "GlobalKnownHostsFile=/dev/null"]
    if given["ssh_key"]:
        options += [f"IdentityFile={given['ssh_key']}", "IdentitiesOnly=yes", "IdentityAgent=none"]
    port = given["ssh_port"]
    if not 0 < port < 65536:
        raise Refused(f"ssh_port {port} is not a port")
    return f"{program} -F none -T -x -a -p {port} {' '.join(f'-o {option}' for option in options)}"
