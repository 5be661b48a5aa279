"""The real programs on the stack's servers: hosts of a test's own, and the account of what came through."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import redis

import lab_audio

from models import POLICIES
from stack import Stack

PROGRAM = Path(sys.executable).with_name("lab-audio")
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def wait_for(what: str, ready: Callable[[], Any], seconds: float = 120) -> Any:
    """What `ready` gives once it is true. Fails, saying for what it waited, when the time is over."""
    deadline = time.monotonic() + seconds
    while not (answer := ready()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)
    return answer


class Program:
    """A running `lab-audio` command; it logs to a file and dies with the test."""

    def __init__(self, argv: list[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        tie = _libc.prctl
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                argv,
                env=dict(env),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=lambda: tie(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        self.pid = self.process.pid

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it logged under this name."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == name:
                    found.append(event)
        return found

    def check_running(self) -> None:
        assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.tail()}"

    def children(self) -> list[int]:
        """Its child processes, those of `multiprocessing` for bookkeeping left out."""
        return [pid for pid in descendants(self.pid) if "spawn_main" in command_line(pid)]

    def kill(self) -> None:
        """`kill -9` of this process alone; fails unless all that it started end by themselves."""
        family = descendants(self.pid)
        self.process.kill()
        self.process.wait()
        wait_for("the children of a killed process to end", lambda: not any(map(command_line, family)), 20)

    def terminate(self, seconds: float = 60) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end {seconds:.0f} s after SIGTERM:\n{self.tail()}") from None

    def wait(self, seconds: float = 120) -> int:
        return self.process.wait(seconds)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> str:
    """The command line of a process; empty if it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def as_user(uid: int) -> list[str]:
    """Words before a command that make it run as a user without a name, by root only; its pid stays.

    Where Python or this checkout lies in a directory that is closed to others (/root), the command sees in its
    place one that holds nothing but these.
    """
    needed = [Path(sys.base_prefix), Path(sys.prefix), Path(lab_audio.__file__).parents[1], POLICIES]
    script = "set -e; "
    for closed in sorted({shut for path in needed if (shut := _closed_above(path))}):
        top = shlex.quote(str(closed))
        script += f"mount --bind {top} /mnt; mount -t tmpfs -o mode=755 none {top}; "
        for path in needed:
            if path.is_relative_to(closed):
                there = shlex.quote(str(path))
                script += f"mkdir -p {there}; mount --rbind /mnt/{shlex.quote(str(path.relative_to(closed)))} {there}; "
        script += "umount -l /mnt; "
    script += f'exec setpriv --pdeathsig KILL --reuid={uid} --regid={uid} --clear-groups -- "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def _closed_above(path: Path) -> Path | None:
    """The topmost directory above a path that others may not enter."""
    above = [parent for parent in reversed(path.resolve().parents) if not parent.stat().st_mode & 0o001]
    return above[0] if above else None


@dataclass(frozen=True)
class Host:
    """One host: its name, its directory (scratch/, home/, tmp/), and the user of its programs (None: this one)."""

    name: str
    directory: Path
    uid: int | None = None

    @property
    def prefix(self) -> list[str]:
        """What makes a command run as its user."""
        return [] if self.uid is None else as_user(self.uid)

    @property
    def scratch(self) -> Path:
        return self.directory / "scratch"

    def make(self) -> Host:
        for path in (self.directory, self.directory / "home", self.directory / "tmp", self.scratch):
            path.mkdir(mode=0o750)
            if self.uid is not None:
                os.chown(path, self.uid, self.uid)
        return self


class Lab:
    """Settings, programs and stores of one test."""

    def __init__(self, stack: Stack, env: dict[str, str], models: Path, directory: Path) -> None:
        self.env = env
        self.directory = directory
        self.source = directory / "source"
        self.source.mkdir()
        self.bucket = env["S3_BUCKET"]
        self.s3 = stack.s3()
        self.redis = redis.Redis.from_url(env["REDIS_URL"])
        self.connection = psycopg2.connect(env["DATABASE_URL"])
        self.connection.autocommit = True
        self.programs: list[Program] = []
        self.settings = {
            **{key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ},
            **env,
            "SOURCE": str(self.source),
            "SETTLE_SECONDS": "0",
            "SCAN_SECONDS": "1",
            "MODELS_ROOT": str(models),
            "POLICIES_DIR": str(POLICIES),
            "DEVICES": "cpu",
            "OMP_NUM_THREADS": "1",  # processes share two cores, and threads of each would only wait for each other
        }

    def host(self, name: str, uid: int | None = None) -> Host:
        return Host(name, self.directory / name, uid).make()

    def start(self, host: Host, *argv: str, **changes: str) -> Program:
        """Start a command on a host, with these settings changed."""
        env = {
            **self.settings,
            "LAB_HOST": host.name,
            "SCRATCH_ROOT": str(host.scratch),
            "TRANSFER_TMP": str(host.directory / "tmp" / "transfer"),
            "TMPDIR": str(host.directory / "tmp"),
            "HOME": str(host.directory / "home"),
            "USER": host.name,  # users without an entry in passwd have no other name
            **changes,
        }
        log = self.directory / f"{host.name}-{argv[0]}-{len(self.programs)}.log"
        program = Program([*host.prefix, str(PROGRAM), *argv], env, log)
        self.programs.append(program)
        return program

    def run(self, host: Host, *argv: str, **changes: str) -> str:
        """Run a command to its end; what it said. Fails unless it exits with 0."""
        program = self.start(host, *argv, **changes)
        code = program.wait()
        assert code == 0, f"{argv} ended with {code}:\n{program.tail()}"
        return program.log.read_text()

    def wait_ready(self, host: Host, *programs: Program) -> None:
        """Until the GPU worker's models are loaded and the unpack worker serves its list."""

        def ready() -> bool:
            for program in programs:
                program.check_running()
            return all(p.events("unpack worker ready") or p.events("gpu slot ready") for p in programs)

        wait_for(f"the workers of {host.name}", ready)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(query, values)
            found: list[tuple[Any, ...]] = cursor.fetchall()
            return found

    def one(self, query: str, *values: Any) -> Any:
        ((value,),) = self.rows(query, *values)
        return value

    def objects(self, prefix: str = "") -> dict[str, str]:
        """Key to ETag."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {found["Key"]: found["ETag"] for page in pages for found in page.get("Contents", [])}

    def put_archive(self, batch_id: str, files: Mapping[str, bytes], **metadata: str) -> str:
        """Put a plain tar as any S3 client would; its key."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        key = f"archives/{batch_id}.tar"
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=buffer.getvalue(), Metadata=metadata)
        return key

    def wait_ended(self, batches: int, *programs: Program, seconds: float = 240) -> None:
        """Until so many batches are complete or failed and let go by their hosts."""

        def ended() -> bool:
            for program in programs:
                program.check_running()
            open_, count = self.rows(
                "SELECT count(*) FILTER (WHERE state NOT IN ('complete', 'failed') OR host IS NOT NULL), count(*)"
                " FROM batches"
            )[0]
            return bool(open_ == 0 and count >= batches)

        try:
            wait_for(f"{batches} batches to end", ended, seconds)
        except AssertionError as error:
            tails = "\n".join(f"{p.log.name}: {p.tail()[-1500:]}" for p in programs)
            state = self.rows("SELECT batch_id, state, host, reason FROM batches")
            raise AssertionError(f"{error}; batches: {state}\n{tails}") from None

    def redis_is_empty(self) -> None:
        left = {key: self.redis.type(key) for key in self.redis.scan_iter()}
        assert left == {}

    def scratch_is_empty(self, *hosts: Host) -> None:
        for host in hosts:
            assert sorted(path.name for path in host.scratch.iterdir()) == [".id", ".locks"]

    def account(self, files: int, *hosts: Host) -> None:
        """Every file came through exactly once, and nothing of the work is left behind."""
        policies = len(list(POLICIES.glob("*.txt")))
        assert self.rows("SELECT state, count(*) FROM audio_files GROUP BY state") == [("done", files)]
        assert self.one("SELECT count(DISTINCT (batch_id, member)) FROM audio_files") == files
        assert (
            self.rows(
                "SELECT member, transcripts, classifications FROM (SELECT member, speech,"
                " (SELECT count(*) FROM transcripts t WHERE t.audio_id = a.audio_id) AS transcripts,"
                " (SELECT count(DISTINCT policy) FROM classifications c WHERE c.audio_id = a.audio_id) AS policies,"
                " (SELECT count(*) FROM classifications c WHERE c.audio_id = a.audio_id) AS classifications"
                " FROM audio_files a LEFT JOIN transcripts t USING (audio_id)) counts"
                " WHERE transcripts <> 1 OR policies <> classifications"
                " OR classifications <> CASE WHEN speech THEN %s ELSE 0 END",
                policies,
            )
            == []
        )
        keys = [row[0] for row in self.rows("SELECT s3_opus_path FROM audio_files")]
        assert len(set(keys)) == files
        assert set(self.objects("processed/")) == set(keys)
        assert (
            self.rows("SELECT batch_id, state, host FROM batches WHERE state <> 'complete' OR host IS NOT NULL") == []
        )
        archives = {f"archives/{row[0]}.tar" for row in self.rows("SELECT batch_id FROM batches")}
        assert set(self.objects("archives/")) == archives
        self.scratch_is_empty(*hosts)
        self.redis_is_empty()

    def close(self) -> None:
        for program in self.programs:
            if program.process.poll() is None:
                program.kill()
        self.connection.close()
        self.redis.close()


@contextlib.contextmanager
def make_lab(stack: Stack, models: Path, directory: Path, number: int) -> Iterator[Lab]:
    """A lab with tables and nothing else in its database, bucket and Redis database `number`."""
    with stack.fresh_database() as database, stack.fresh_bucket() as bucket:
        url = stack.env["REDIS_URL"].rpartition("/")[0] + f"/{number}"
        env = {**stack.env, "DATABASE_URL": database, "S3_BUCKET": bucket, "REDIS_URL": url}
        lab = Lab(stack, env, models, directory)
        try:
            lab.redis.flushdb()
            lab.run(lab.host("setup"), "migrate")
            yield lab
        finally:
            lab.close()
