"""Scratch is finite: a batch waits until there is room for it, and a full or failing disk blames no recording."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from needed import missing

from lab_audio import ledger, log, queues, scratch
from lab_audio.config import GpuSettings, UnpackSettings
from lab_audio.contracts import archive_key, item_of
from lab_audio.errors import Retryable
from lab_audio.ledger import Archive, NewItem
from lab_audio.media import archive as tar
from lab_audio.media import reader, transcode
from lab_audio.workers import gpu_worker, unpack_worker
from lab_audio.workers import host as host_duties
from lab_audio.workers.host import open_host, open_inbox
from lab_audio.workers.loop import Stop, exit_code

from disks import Disk
from world import BATCH, MODELS, World, eventually, fake_decode, register, windows

MIB = 1 << 20
PR_SET_PDEATHSIG = 1
ENCODING = unpack_worker.Encoding(24_000, 1)
WAITING = "not to be unpacked now"
GIVEN_BACK = "batch given back, for want of room on scratch"
HOOK = Callable[[], None]


def encode_to(share: float) -> Callable[..., transcode.Encoded]:
    """A stand-in of which "Opus" takes this share of the MP3, and begins as that does."""

    def encode(mp3: BinaryIO, opus: Path, **options: Any) -> transcode.Encoded:
        data = mp3.read()
        data = (data * (int(share) + 1))[: max(100, int(share * len(data)))]
        scratch.write_atomic(opus, data)
        return transcode.Encoded(seconds=1.0, sha256="0" * 64, size=len(data))

    return encode


def decode(opus: Path) -> bytes:
    return fake_decode(opus).split(b"\n")[0]


class Workers:
    """Processes of one host, which log to one file; they die with the test."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.log = world.directory / "workers.log"
        self.log.touch()
        self.running: list[int] = []
        self.codes: dict[int, int] = {}
        register(world.engine, "h1", scratch.prepare(world.scratch("h1")), world.scratch("h1"))
        ledger.beat(world.engine, "h1", gpu=True)

    def unpack(self, *, share: float = 1.0, hook: HOOK | None = None) -> int:
        settings = self.world.load(UnpackSettings, TRANSCODE_THREADS="2")

        def act() -> None:
            transcode.encode = encode_to(share)
            unpack_worker.PAUSE_SECONDS = 0.2
            if hook is not None:
                hook()
            unpack_worker.run(settings, Stop().on_signals())

        return self.start(act)

    def gpu(self) -> int:
        settings = self.world.load(GpuSettings, UPLOAD_THREADS="4", DECODE_THREADS="2")

        def act() -> None:
            transcode.decode = windows(decode)
            gpu_worker.work_slot(settings, lambda: MODELS, Stop())

        return self.start(act)

    def start(self, act: Callable[[], None]) -> int:
        self.world.engine.dispose()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self.running.append(pid)
            return pid
        code = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            sys.stderr = self.log.open("a", buffering=1)
            log.configure()
            host_duties.open_bucket = lambda settings: self.world.workers_bucket
            code = exit_code(act)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, pid: int) -> int:
        """The exit code of a worker that ends by itself."""
        eventually(lambda: self.ended(pid), 60)
        return self.codes[pid]

    def ended(self, pid: int) -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            self.running.remove(pid)
            self.codes[pid] = os.waitstatus_to_exitcode(status)
        return bool(found)

    def check_running(self) -> None:
        for pid in [*self.running]:
            assert not self.ended(pid), f"ended with {self.codes[pid]}:\n{self.log.read_text()[-3000:]}"

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [event for line in lines if line.startswith("{") and (event := json.loads(line))["event"] == name]

    def close(self) -> None:
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def disk(world: World) -> Iterator[Disk]:
    """64 MB of scratch for host h1."""
    mounted = Disk(world.scratch("h1"), 64 * MIB)
    mounted.mount()
    if mounted.missing:
        missing(mounted.missing)
    (mounted.place / "lost+found").rmdir()
    yield mounted
    mounted.close()


@pytest.fixture
def workers(world: World, disk: Disk) -> Iterator[Workers]:
    started = Workers(world)
    yield started
    started.close()


def plant(world: World, number: int, count: int, size: int) -> str:
    """An archive of so many recordings of about `size` bytes, with its job."""
    batch_id = BATCH.format(number)
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for name in [f"{n}.mp3" for n in range(count)]:
            content = name.encode() + b"\n" + os.urandom(size)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            world.planted.add((batch_id, name))
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=archive_key(batch_id), Body=body.getvalue())
    world.client.rpush("unpack", world.job(batch_id, count))
    return batch_id


def all_done(world: World, workers: Workers, batches: int) -> None:
    """Until so many batches are complete and let go."""

    def done() -> bool:
        workers.check_running()
        found = world.rows("SELECT count(*) FROM batches WHERE state = 'complete' AND host IS NULL")
        return bool(found == [(batches,)])

    eventually(done, 240)
    eventually(lambda: world.client.keys("*") == [])
    assert world.snags() == []


def test_a_hundred_batches_on_64_mb_with_two_unpack_workers(world: World, workers: Workers) -> None:
    """Nothing is taken from scratch for a while, so that it fills up."""
    for number in range(100):
        plant(world, number, 4, 450_000)
    pids = [workers.unpack(), workers.unpack()]
    eventually(lambda: len(workers.events(WAITING)) == 2, 120)
    assert {"bytes of scratch" in event["why"] for event in workers.events(WAITING)} == {True}
    assert world.rows("SELECT count(*) > 15 FROM batches WHERE state = 'ready'") == [(True,)]
    workers.gpu()
    reserved = []

    def done() -> bool:
        workers.check_running()
        reserved.append(
            world.rows("SELECT coalesce(sum(quota), 0) <= min(scratch_bytes) FROM batches JOIN hosts USING (host)")[0][
                0
            ]
        )
        return bool(world.rows("SELECT count(*) FROM batches WHERE state = 'complete' AND host IS NULL") == [(100,)])

    eventually(done, 240)
    eventually(lambda: world.client.keys("*") == [])
    assert world.snags() == []
    assert set(reserved) - {None} == {True}
    assert world.rows("SELECT state, max(attempts) FROM audio_files GROUP BY 1") == [("done", 1)]
    assert world.rows("SELECT DISTINCT attempts, quota, flags FROM batches") == [(0, None, [])]
    assert workers.events(GIVEN_BACK) == []
    assert len(workers.events(WAITING)) < 10
    said = workers.log.read_text()
    assert "No space left" not in said and "Traceback" not in said
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        assert workers.wait(pid) == 0


def test_a_batch_larger_than_scratch_fails_and_its_neighbour_is_done(world: World, workers: Workers) -> None:
    larger = plant(world, 1, 40, 2 * MIB)
    world.planted.clear()
    plant(world, 2, 4, 100_000)
    workers.unpack()
    workers.gpu()
    eventually(
        lambda: world.rows("SELECT state FROM batches WHERE host IS NULL ORDER BY 1") == [("complete",), ("failed",)],
        120,
    )
    ((reason,),) = world.rows("SELECT reason FROM batches WHERE state = 'failed'")
    assert reason.startswith("larger than scratch: it needs more than")
    assert int(reason.split("more than ")[1].split()[0]) > 40 * MIB
    (failed,) = workers.events("batch failed")
    assert failed["batch_id"] == larger and failed["attempt"] >= 1 and failed["duration"] > 0
    assert world.rows("SELECT state, count(*) FROM audio_files GROUP BY 1") == [("done", 4)]
    eventually(lambda: world.client.keys("*") == [] and scratch.batches(world.scratch("h1")) == [])
    workers.check_running()


def test_an_archive_larger_than_scratch_is_done_if_its_opus_fits(world: World, workers: Workers) -> None:
    plant(world, 1, 40, 2 * MIB)
    workers.unpack(share=0.2)
    workers.gpu()
    all_done(world, workers, 1)
    assert workers.events(GIVEN_BACK) == []


def test_a_batch_that_outgrows_its_quota_gets_a_larger_one(world: World, workers: Workers) -> None:
    """Its Opus is four times as large as its MP3s. It is given back twice."""
    plant(world, 1, 10, 400_000)
    plant(world, 2, 4, 100_000)
    workers.unpack(share=4)
    workers.gpu()
    all_done(world, workers, 2)
    assert {event["batch_id"] for event in workers.events(GIVEN_BACK)} == {BATCH.format(1)}
    assert "set aside for it" in workers.events(GIVEN_BACK)[0]["why"]


@pytest.mark.parametrize("spooled", [False, True])
def test_foreign_data_that_fills_the_disk_is_waited_out(
    world: World, disk: Disk, workers: Workers, spooled: bool
) -> None:
    for number in range(4):
        plant(world, number, 4, 450_000)

    def hook() -> None:
        """Fill the disk when the second batch is half read."""
        entry, seen = unpack_worker.entry, []
        if spooled:
            unpack_worker.SPOOL_BYTES = 1000

        def filling(member: tar.Member) -> NewItem:
            seen.append(member)
            if len(seen) == 6:
                disk.fill()
            return entry(member)

        unpack_worker.entry = filling

    workers.unpack(hook=hook)
    eventually(lambda: workers.events(GIVEN_BACK) and workers.events(WAITING), 60)
    assert "No space left" in workers.events(GIVEN_BACK)[0]["why"]
    eventually(lambda: world.rows("SELECT count(*) FROM batches WHERE state = 'ready'") == [(1,)])
    assert world.rows("SELECT state, host, attempts FROM batches WHERE state <> 'ready'") == [("uploaded", None, 0)]
    assert world.client.llen("unpack") + world.client.llen("processing:h1:unpack:0") == 3
    workers.check_running()
    disk.empty()
    workers.gpu()
    all_done(world, workers, 4)
    assert world.rows("SELECT state, max(attempts) FROM audio_files GROUP BY 1") == [("done", 1)]
    assert "Traceback" not in workers.log.read_text()


def test_a_disk_that_breaks_ends_the_worker_and_blames_nobody(world: World, disk: Disk, workers: Workers) -> None:
    for number in range(3):
        plant(world, number, 4, 450_000)

    def hook() -> None:
        entry, seen = unpack_worker.entry, []

        def breaking(member: tar.Member) -> NewItem:
            seen.append(member)
            if len(seen) == 6:
                disk.break_down()
            return entry(member)

        unpack_worker.entry = breaking

    assert workers.wait(workers.unpack(hook=hook)) == 70
    assert workers.wait(workers.unpack()) == 70  # as long as the disk is broken
    said = workers.log.read_text()
    assert f"lab-audio: SCRATCH_ROOT {world.scratch('h1')}" in said and "Traceback" not in said
    assert workers.events(GIVEN_BACK) == []
    assert world.rows("SELECT state, host FROM batches ORDER BY 1") == [("ready", "h1"), ("unpacking", "h1")]
    disk.repair()
    (disk.place / "lost+found").rmdir()
    workers.unpack()
    workers.gpu()
    all_done(world, workers, 3)
    assert world.rows("SELECT state, max(attempts) FROM audio_files GROUP BY 1") == [("done", 1)]


def test_capacity_counts_what_batches_take_and_not_what_others_do(world: World, disk: Disk) -> None:
    root = world.scratch("h1")
    scratch.prepare(root)
    before = scratch.capacity(root)
    assert 40 * MIB < before < 64 * MIB
    batch = scratch.fresh_dir(root, BATCH.format(1))
    (batch / "a.opus").write_bytes(os.urandom(10 * MIB))
    assert abs(scratch.capacity(root) - before) < MIB // 4
    (root / "foreign").write_bytes(os.urandom(10 * MIB))
    assert abs(scratch.capacity(root) - before + 10 * MIB) < MIB // 4
    disk.fill()
    assert scratch.capacity(root) < 10 * MIB
    (batch / "a.opus").unlink()
    assert scratch.fresh_dir(root, BATCH.format(1)) == batch


def hosts(world: World, **capacities: int) -> None:
    """Hosts with so much scratch, which have looked at a batch that is not there."""
    for host, capacity in capacities.items():
        register(world.engine, host, host)
        ledger.beat(world.engine, host, gpu=True)
        assert isinstance(ledger.take(world.engine, BATCH.format(99), host, capacity), ledger.Refused)


def adopt(world: World, number: int, size: int) -> str:
    batch_id = BATCH.format(number)
    ledger.adopt(world.engine, batch_id, world.job(batch_id, 1), Archive(None, size, 1))
    return batch_id


def test_a_batch_waits_for_room_and_what_is_ready_takes_no_more_than_it_needs(world: World) -> None:
    hosts(world, h1=100 * MIB)
    first, second = adopt(world, 1, 20 * MIB), adopt(world, 2, 30 * MIB)
    assert isinstance(ledger.take(world.engine, first, "h1", 100 * MIB), ledger.Taken)
    refused = ledger.take(world.engine, second, "h1", 60 * MIB)
    assert isinstance(refused, ledger.Refused) and refused.job == "head"
    again = ledger.take(world.engine, first, "h1", 1)  # it has its room already
    assert isinstance(again, ledger.Taken)
    row = NewItem("a.mp3", item_of("a.mp3"), "a.mp3", 1.0, room=MIB)
    assert ledger.seal(world.engine, first, "h1", [row], Archive("0" * 64, 1, 1), []) == "ready"
    assert isinstance(ledger.take(world.engine, second, "h1", 60 * MIB), ledger.Taken)


def test_a_batch_that_fits_another_host_goes_to_the_tail(world: World) -> None:
    hosts(world, h1=10 * MIB, h2=1000 * MIB)
    batch_id = adopt(world, 1, 20 * MIB)
    refused = ledger.take(world.engine, batch_id, "h1", 10 * MIB)
    assert isinstance(refused, ledger.Refused) and refused.job == "tail"
    assert isinstance(ledger.take(world.engine, batch_id, "h2", 1000 * MIB), ledger.Taken)


def test_a_batch_without_room_grows_only_if_the_room_was_its_own(world: World) -> None:
    hosts(world, h1=100 * MIB)
    batch_id = adopt(world, 1, 10 * MIB)

    def take() -> int:
        taken = ledger.take(world.engine, batch_id, "h1", 100 * MIB)
        assert isinstance(taken, ledger.Taken) and taken.attempts == 1
        return taken.quota

    first = take()
    assert ledger.return_full(world.engine, batch_id, "h1", first - 1) is None  # others had filled the disk
    assert take() == first
    assert ledger.return_full(world.engine, batch_id, "h1", 100 * MIB) is None
    assert take() == 2 * first
    for _ in range(10):
        if ledger.return_full(world.engine, batch_id, "h1", 100 * MIB):
            break
        take()
    assert world.rows("SELECT state, host, quota FROM batches") == [("failed", "h1", 90 * MIB)]
    ledger.release(world.engine, batch_id, "h1")
    assert world.rows("SELECT host, quota FROM batches") == [(None, None)]


def test_what_another_took_meanwhile_is_not_given_back(world: World) -> None:
    hosts(world, h1=100 * MIB, h2=100 * MIB)
    batch_id = adopt(world, 1, 10 * MIB)
    assert isinstance(ledger.take(world.engine, batch_id, "h1", 100 * MIB), ledger.Taken)
    ledger.give_back(world.engine, batch_id, "h1")
    assert isinstance(ledger.take(world.engine, batch_id, "h2", 100 * MIB), ledger.Taken)
    assert ledger.return_full(world.engine, batch_id, "h1", 100 * MIB) is None
    assert world.rows("SELECT state, host FROM batches") == [("unpacking", "h2")]


def test_foreign_data_does_not_make_scratch_small(world: World) -> None:
    """What a batch may be given is measured by the most that batches could ever fill, not by what is free today."""
    hosts(world, h1=-MIB)
    first, second = adopt(world, 1, MIB), adopt(world, 2, 10 * MIB)
    assert isinstance(ledger.take(world.engine, first, "h1", 0), ledger.Refused)
    assert isinstance(ledger.take(world.engine, first, "h1", 100 * MIB), ledger.Taken)
    assert isinstance(ledger.take(world.engine, second, "h1", 10 * MIB), ledger.Refused)
    assert world.rows("SELECT scratch_bytes FROM hosts") == [(100 * MIB,)]
    world.sql("UPDATE hosts SET seen_at = NULL")
    register(world.engine, "h1", "another disk")
    assert world.rows("SELECT scratch_bytes FROM hosts") == [(None,)]


def unpacker(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[host_duties.Host, queues.Inbox, scratch.Slot]:
    monkeypatch.setattr(transcode, "encode", encode_to(1.0))
    here = open_host(world.load(UnpackSettings), Stop())
    ledger.beat(here.engine, "h1", gpu=True)
    held, inbox = open_inbox(here, "unpack")
    return here, inbox, held


def test_an_archive_that_was_replaced_while_the_store_was_away_is_read_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = plant(world, 1, 3, 1000)
    here, inbox, held = unpacker(world, monkeypatch)
    read, tries = reader.read, []

    def reading(stream: Any, size: int, *, compressed: bool) -> Iterator[tar.Member]:
        tries.append(stream)
        yield from read(stream, size, compressed=compressed)
        if len(tries) == 1:
            world.client.delete("unpack")
            plant(world, 1, 2, 2000)
            raise Retryable("the store is away")

    monkeypatch.setattr(reader, "read", reading)
    job = inbox.claim(0)
    assert job is not None
    assert unpack_worker.handle(here, inbox, job, ENCODING, Stop()) is None
    held.release()
    assert len(tries) == 2
    assert world.rows("SELECT batch_id, member, state FROM audio_files ORDER BY 2") == [
        (batch_id, "0.mp3", "pending"),
        (batch_id, "1.mp3", "pending"),
    ]
    for n in range(2):
        assert (world.scratch("h1") / batch_id / f"{item_of(f'{n}.mp3')}.opus").stat().st_size > 2000


@pytest.mark.parametrize(
    ("count", "flags"), [(3, []), (None, []), (5, ["file_count: the job says 5, the archive holds 3"])]
)
def test_the_ledgers_count_is_compared_with_the_archive(
    world: World, monkeypatch: pytest.MonkeyPatch, count: int | None, flags: list[str]
) -> None:
    batch_id = plant(world, 1, 3, 1000)
    job = world.job(batch_id, 0)
    world.client.delete("unpack")
    ledger.adopt(world.engine, batch_id, job, Archive(None, None, count))
    world.client.rpush("unpack", job)
    here, inbox, held = unpacker(world, monkeypatch)
    claimed = inbox.claim(0)
    assert claimed is not None
    assert unpack_worker.handle(here, inbox, claimed, ENCODING, Stop()) is None
    held.release()
    assert world.rows("SELECT state, flags FROM batches") == [("ready", flags)]


def test_a_batch_without_archive_is_unpacked_from_its_kept_opus(world: World) -> None:
    """As after a restore: its rows are pending, one object of it is gone and one is damaged."""
    names = ["a.mp3", "b.mp3", "c.mp3", "d.mp3"]
    batch_id = world.plant_batch(1, names)
    world.finish()
    keys = dict(world.rows("SELECT member, s3_opus_path FROM audio_files"))
    before = world.rows("SELECT audio_id, member FROM audio_files WHERE member IN ('a.mp3', 'b.mp3') ORDER BY 1")
    for statement in (
        "DELETE FROM transcripts",
        "DELETE FROM classifications",
        "UPDATE audio_files SET state = 'pending', attempts = 0, s3_opus_path = NULL, seconds = NULL",
        "UPDATE batches SET state = 'uploaded', archive_gone_at = now(), flags = '{odd}', file_count = NULL",
    ):
        world.sql(statement)
    where = {"Bucket": world.bucket.name}
    world.bucket.client.delete_object(**where, Key=archive_key(batch_id))
    world.bucket.client.delete_object(**where, Key=keys["c.mp3"])
    world.bucket.client.put_object(**where, Key=keys["d.mp3"], Body=b"other", Metadata={"sha256": "0" * 64})
    world.client.rpush("unpack", world.job(batch_id, 0))

    def mutant() -> None:
        transcode.duration = lambda opus: 1.5

    world.run("unpack", mutant=mutant)
    assert world.rows("SELECT state, flags, file_count FROM batches") == [("ready", ["odd"], None)]
    world.finish(mutant=mutant)
    found = world.rows("SELECT member, state, seconds FROM audio_files ORDER BY 1")
    assert found == [("a.mp3", "done", 1.5), ("b.mp3", "done", 1.5), ("c.mp3", "dead", None), ("d.mp3", "dead", None)]
    reasons = [reason for (reason,) in world.rows("SELECT reason FROM audio_files WHERE state = 'dead' ORDER BY 1")]
    assert reasons[0] == "its archive and its Opus are gone"
    assert reasons[1].startswith("its archive is gone, and of its Opus: ") and "damaged in the store" in reasons[1]
    assert world.rows("SELECT audio_id, text FROM audio_files JOIN transcripts USING (audio_id) ORDER BY 1") == before
    assert world.rows("SELECT state, host FROM batches") == [("complete", None)]
