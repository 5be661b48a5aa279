"""A small lab on real Redis, PostgreSQL and SeaweedFS, in which every worker can be killed before its n-th effect.

An effect is a statement or commit to PostgreSQL, a command to Redis, a request to the object store, or a change of a
scratch directory. Workers run in forked processes and die by SIGKILL. Models and ffmpeg have stand-ins here, and only
here: what is tested is who does what when, not what is said in a recording.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import redis
import structlog
from click.testing import Result
from sqlalchemy import Engine, event, text
from typer.testing import CliRunner

from lab_audio import config, ledger, log, queues, s3_utils, scratch
from lab_audio.cli import app
from lab_audio.contracts import Classification, Transcript, archive_key
from lab_audio.jobs import UnpackJob
from lab_audio.media import canary, sandbox, transcode
from lab_audio.operations import reconcile as reconciling
from lab_audio.operations import restore as restoring
from lab_audio.workers import gpu_worker, transfer_sounds, unpack_worker
from lab_audio.workers import host as host_duties
from lab_audio.workers.host import open_host, open_inbox, return_leftovers, tidy
from lab_audio.workers.loop import Stop

POISON = b"poison"
BATCH = "20260101-000000-{:06x}"
ROOM = 1 << 30  # bytes of scratch
MUTANT = Callable[[], None]


def fake_encode(mp3: BinaryIO, opus: Path, **options: Any) -> transcode.Encoded:
    scratch.write_atomic(opus, mp3.read())
    return transcode.Encoded(seconds=1.0, sha256="0" * 64, size=1)


def fake_decode(opus: Path) -> bytes:
    return b"canary" if opus == canary.OPUS else opus.read_bytes()


def windows(decode: Callable[[Path], bytes]) -> Callable[..., Iterator[bytes]]:
    """A decoder that gives all as one window."""

    def windowed(opus: Path, **options: Any) -> Iterator[bytes]:
        yield decode(opus)

    return windowed


def fake_transcribe(samples: bytes) -> Transcript:
    if samples.startswith(POISON):
        os.kill(os.getpid(), signal.SIGKILL)
    return Transcript(samples.decode(), "en", [{"start": 0.0, "end": 1.0, "text": samples.decode()}], True, "fake")


def fake_classify(texts: Sequence[str]) -> list[list[Classification]]:
    return [[Classification("p", "0" * 64, "complies", 0.25, "fake", "fake", [0.25])] for _ in texts]


MODELS = gpu_worker.Models(fake_transcribe, fake_classify)


class Effects:
    """Counts this process's effects and kills it before the n-th."""

    def __init__(self, kill_before: int | None, report: int) -> None:
        self.count = 0
        self.kill_before = kill_before
        self.report = report
        self.lock = threading.Lock()

    def __call__(self, what: str) -> None:
        with self.lock:
            self.count += 1
            os.write(self.report, f"{what}\n".encode())
            if self.count == self.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, engine: Engine, bucket: s3_utils.Bucket, root: Path) -> None:
        event.listen(engine, "before_cursor_execute", lambda *a: self(f"sql {a[2].split('(')[0][:60]}"))
        event.listen(engine, "commit", lambda connection: self("commit"))
        bucket.client.meta.events.register("before-send.s3", lambda request, **_: self(f"s3 {request.method}"))
        execute = redis.Redis.execute_command

        def counted(client: redis.Redis, *args: Any, **options: Any) -> Any:
            self(f"redis {args[0]}")
            return execute(client, *args, **options)

        redis.Redis.execute_command = counted  # type: ignore[method-assign]

        def audit(name: str, args: tuple[Any, ...]) -> None:
            changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if name in changes and str(root) in os.fsdecode(args[0] if not isinstance(args[0], int) else ""):
                self(name)

        sys.addaudithook(audit)


class Idle(Stop):
    """Asks a GPU slot to stop when no job is left for its host."""

    def __init__(self, client: redis.Redis, host: str) -> None:
        super().__init__()
        self.client, self.host = client, host

    def __call__(self) -> bool:
        if super().__call__():
            return True
        look = self.client.pipeline(transaction=True)  # a job may be moving from one list to the other
        for name in (f"transcribe:{self.host}", *(f"processing:{self.host}:gpu:{slot}" for slot in range(4))):
            look.llen(name)
        return not any(look.execute())


class World:
    """Directories of one test, and what was planted in them."""

    BATCH = staticmethod(BATCH.format)

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory
        self.environment = dict(environment)
        self.planted: set[tuple[str, str]] = set()
        self.poison: set[tuple[str, str]] = set()
        self.engine = ledger.open_ledger(self.load(config.LedgerSettings))
        self.client = queues.open_queues(self.load(config.QueueSettings))
        self.bucket = s3_utils.open_bucket(self.load(config.S3Settings))
        self.workers_bucket = s3_utils.open_bucket(self.load(config.S3Settings))  # never used here, so safe to fork
        ledger.migrate(self.engine)
        sandbox.problem()  # the answer is inherited by all that are forked

    def load(self, kind: type[Any], host: str = "h1", **more: Any) -> Any:
        environment = {
            **self.environment,
            "LAB_HOST": host,
            "SCRATCH_ROOT": str(self.scratch(host)),
            "SOURCE": str(self.directory / "source"),
            "SETTLE_SECONDS": "0",
            "TRANSFER_TMP": str(self.directory / "tmp"),
            "UPLOAD_THREADS": "1",
            "DECODE_THREADS": "1",
            "TRANSCODE_THREADS": "1",
            **more,
        }
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            return config.load(kind)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def scratch(self, host: str) -> Path:
        return self.directory / "scratch" / host

    def reset(self) -> None:
        """An empty lab."""
        self.planted, self.poison = set(), set()
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "TRUNCATE classifications, transcripts, source_files, audio_files, batches, hosts RESTART IDENTITY"
                )
            )
        self.client.flushdb()
        for key in self.objects():
            self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)
        shutil.rmtree(self.directory, ignore_errors=True)
        (self.directory / "source").mkdir(parents=True)

    def objects(self) -> set[str]:
        pages = self.bucket.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket.name)
        return {entry["Key"] for page in pages for entry in page.get("Contents", [])}

    def plant_files(self, names: Sequence[str]) -> None:
        """Recordings at the source."""
        for name in names:
            path = self.directory / "source" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)
            self.planted.add(("", name))

    def plant_batch(self, number: int, names: Sequence[str]) -> str:
        """An archive in the store with its job on `unpack`, as another program would put it. Returns the batch's id."""
        batch_id = BATCH.format(number)
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for name in names:
                content = (POISON if "poison" in name else b"") + name.encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
                (self.poison if "poison" in name else self.planted).add((batch_id, name))
        self.bucket.client.put_object(Bucket=self.bucket.name, Key=archive_key(batch_id), Body=tar.getvalue())
        self.client.rpush("unpack", self.job(batch_id, len(names)))
        return batch_id

    @staticmethod
    def job(batch_id: str, count: int) -> str:
        return UnpackJob(
            batch_id=batch_id, s3_key=archive_key(batch_id), file_count=count, transferred_at="2026-01-01T00:00:00Z"
        ).payload()

    def run(
        self, role: str, host: str = "h1", *, kill_before: int | None = None, mutant: MUTANT | None = None
    ) -> tuple[int | None, list[str]]:
        """Run one worker until nothing is left for it, or until it is killed before an effect.

        Returns the signal that ended it, and its effects. An error in it fails the test with its traceback.
        """
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(read)
            sys.stderr = (self.directory / "worker.log").open("a")
            log.configure()
            code = 1
            try:
                transcode.encode, transcode.decode = fake_encode, windows(fake_decode)
                transcode.duration = lambda opus: 1.0
                host_duties.open_bucket = s3_utils.open_bucket = lambda settings: self.workers_bucket
                if mutant is not None:
                    mutant()
                ROLES[role](self, host, Effects(kill_before, write))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as report:
            effects = report.read().splitlines()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status), effects
        said = (self.directory / "worker.log").read_text()
        assert os.WEXITSTATUS(status) == 0, f"{role} failed:\n{said[-3000:]}"
        return None, effects

    def finish(
        self, *, transfer: bool = False, hosts: Sequence[str] = ("h1",), mutant: MUTANT | None = None, most: int = 12
    ) -> None:
        """Run the workers in turn, again where one was killed. Transfer, which pushes lost jobs, only if asked."""
        for _ in range(most):
            killed = [self.run("transfer", mutant=mutant)[0]] if transfer else []
            for host in hosts:
                killed += [self.run(role, host, mutant=mutant)[0] for role in ("unpack", "gpu")]
            if not any(killed):
                break
        for host in hosts:
            self.run("unpack", host, mutant=mutant)

    def command(self, *arguments: str, code: int = 0, **settings: str) -> Result:
        """Run `lab-audio` in this process, by default on h1, to this exit code. The result has stdout and stderr."""
        where = {"LAB_HOST": "h1", "SCRATCH_ROOT": str(self.scratch("h1")), "RETENTION_DAYS": "7"}
        result = CliRunner().invoke(app, arguments, env={**self.environment, **where, **settings})
        structlog.reset_defaults()  # what the command configured writes to a closed file
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    def sql(self, statement: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def rows(self, query: str) -> list[Any]:
        with self.engine.begin() as connection:
            return list(connection.execute(text(query)).all())

    def snags(self) -> list[str]:
        """What is wrong now that everything should be done: lost, doubled, orphaned, left over."""
        wrong: list[str] = []

        def check(what: str, found: Any, expected: Any) -> None:
            if found != expected:
                wrong.append(f"{what}: {found!r}, expected {expected!r}")

        items = self.rows("SELECT audio_id, batch_id, member, state, s3_opus_path FROM audio_files")
        by_source = {name for batch, name in self.planted if not batch}
        minted = {row.batch_id for row in self.rows("SELECT batch_id FROM batches WHERE source IS NOT NULL")}
        states = Counter((("" if i.batch_id in minted else i.batch_id), i.member, i.state) for i in items)
        expected = Counter((batch, name, "done") for batch, name in self.planted)
        expected += Counter((batch, name, "dead") for batch, name in self.poison)
        check("items", states, expected)
        done = sorted(i.audio_id for i in items if i.state == "done")
        check("transcripts", sorted(r[0] for r in self.rows("SELECT audio_id FROM transcripts")), done)
        check("classifications", sorted(r[0] for r in self.rows("SELECT audio_id FROM classifications")), done)
        processed = {key for key in self.objects() if key.startswith("processed/")}
        check("objects", processed, {i.s3_opus_path for i in items if i.state == "done"})
        batches = self.rows("SELECT batch_id, state, host, archive_gone_at IS NULL FROM batches")
        check("batches", {(state, host) for _, state, host, _ in batches}, {("complete", None)} if batches else set())
        archives = {key for key in self.objects() if key.startswith("archives/")}
        check("archives", archives, {archive_key(batch_id) for batch_id, _, _, kept in batches if kept})
        check("redis", sorted(self.client.keys("*")), [])
        folders = [p.name for p in (self.directory / "scratch").glob("*/*") if not p.name.startswith(".")]
        check("scratch", folders, [])
        check("temporary archives", [str(p) for p in (self.directory / "tmp").rglob("*.tar")], [])
        files = self.rows("SELECT convert_from(path, 'UTF8') FROM source_files WHERE struck IS NULL")
        check("source files", sorted(f[0] for f in files), sorted(by_source))
        return wrong

    def snags_in_redis(self) -> list[str]:
        """What must hold at every moment: a published batch's counter covers each item that has no job any more."""
        wrong = []
        jobs = [job for name in self.client.scan_iter("*transcribe*") for job in self.client.lrange(name, 0, -1)]
        jobs += [job for name in self.client.scan_iter("processing:*:gpu:*") for job in self.client.lrange(name, 0, -1)]
        for key in self.client.scan_iter("batch:*:total"):
            batch_id = key.split(":")[1]
            total, processed = int(self.client.get(key)), int(self.client.get(f"batch:{batch_id}:processed") or 0)
            flying = len({job for job in jobs if batch_id in job})
            if total - processed > flying:
                wrong.append(f"{batch_id}: {processed} of {total} are processed and {flying} jobs are left")
        return wrong


def register(engine: Engine, host: str, disk: str, root: Path = Path("/data/scratch")) -> None:
    """Enter a host in the ledger, without its worker."""
    with ledger.registering(engine, host, disk, root):
        pass


def transfer(world: World, host: str, effects: Effects) -> None:
    settings = world.load(config.TransferSettings, host)
    open_ledger = ledger.open_ledger

    def watched(settings: Any) -> Engine:
        engine = open_ledger(settings)
        effects.watch(engine, world.workers_bucket, world.directory)
        return engine

    ledger.open_ledger = watched
    transfer_sounds.run(settings, Stop(), once=True)


def unpack(world: World, host: str, effects: Effects) -> None:
    settings = world.load(config.UnpackSettings, host)
    stop = Stop()
    here = open_host(settings, stop)
    ledger.beat(here.engine, host, gpu=True)
    effects.watch(here.engine, here.bucket, world.directory)
    _, inbox = open_inbox(here, "unpack")
    return_leftovers(here, "unpack")
    tidy(here)
    while job := inbox.claim(0):
        unpack_worker.handle(here, inbox, job, unpack_worker.Encoding(24_000, 1), stop)


def gpu(world: World, host: str, effects: Effects) -> None:
    settings = world.load(config.GpuSettings, host)
    stop = Idle(world_client(world), host)
    here = open_host(settings, stop)
    effects.watch(here.engine, here.bucket, world.directory)
    _, inbox = open_inbox(here, "gpu")
    return_leftovers(here, "gpu")
    tidy(here)
    gpu_worker.IDLE_SECONDS = 0  # ask whether to stop at once
    gpu_worker.Slot(here, inbox, MODELS, settings, stop).run()
    stop.check()


def restore(world: World, host: str, effects: Effects) -> None:
    reconcile(world, host, effects, restoring.restore)


def reconcile(world: World, host: str, effects: Effects, act: Callable[..., Any] | None = None) -> None:
    engine = ledger.open_ledger(world.load(config.LedgerSettings))
    client = queues.open_queues(world.load(config.QueueSettings))
    effects.watch(engine, world.workers_bucket, world.directory)
    stores = reconciling.Stores(engine, client, world.workers_bucket)
    if act is None:
        reconciling.reconcile(stores, 600)
    else:
        act(stores)


def world_client(world: World) -> redis.Redis:
    """A client whose commands are not effects: made before they are counted, of a class of its own."""
    uncounted = type("Uncounted", (redis.Redis,), {"execute_command": redis.Redis.execute_command})
    return uncounted.from_url(world.environment["REDIS_URL"], decode_responses=True)


ROLES: dict[str, Callable[[World, str, Effects], None]] = {
    "transfer": transfer,
    "unpack": unpack,
    "gpu": gpu,
    "reconcile": reconcile,
    "restore": restore,
}


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Poll until the condition holds; fails at the deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "nothing happened before the deadline"
        time.sleep(0.02)
    return answer
