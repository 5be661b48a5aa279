"""Interleavings and mishaps in which a careless step would lose a job, blame a recording, or never end."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lab_audio import ledger, queues, scratch
from lab_audio.config import GpuSettings, TransferSettings, UnpackSettings
from lab_audio.contracts import Transcript, archive_key
from lab_audio.errors import Fatal, Retryable
from lab_audio.media import transcode
from lab_audio.workers import gpu_worker, transfer_sounds, unpack_worker
from lab_audio.workers.host import Host, open_host, open_inbox, return_batch, return_leftovers
from lab_audio.workers.loop import Stop

from world import (
    BATCH,
    MODELS,
    World,
    eventually,
    fake_classify,
    fake_decode,
    fake_encode,
    fake_transcribe,
    register,
    windows,
)

NAMES = ["a.mp3", "b.mp3", "c.mp3"]
ENCODING = unpack_worker.Encoding(24_000, 1)


@pytest.fixture(autouse=True)
def no_media(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcode, "decode", windows(fake_decode))
    monkeypatch.setattr(transcode, "encode", fake_encode)


def gpu_slot(world: World, models: gpu_worker.Models = MODELS) -> tuple[gpu_worker.Slot, scratch.Slot]:
    settings, stop = world.load(GpuSettings), Stop()
    here = open_host(settings, stop)
    held, inbox = open_inbox(here, "gpu")
    return gpu_worker.Slot(here, inbox, models, settings, stop), held


def unpacker(world: World) -> tuple[Host, queues.Inbox, scratch.Slot]:
    here = open_host(world.load(UnpackSettings), Stop())
    ledger.beat(here.engine, "h1", gpu=True)
    held, inbox = open_inbox(here, "unpack")
    return here, inbox, held


def attempts(world: World) -> dict[str, int]:
    return dict(world.rows("SELECT member, attempts FROM audio_files"))


def test_a_job_of_a_batch_in_hand_stays_on_the_list(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    here, inbox, held = unpacker(world)
    with scratch.batch_lock(here.scratch, batch_id) as locked:
        assert locked
        job = inbox.claim(0)
        assert job is not None
        assert unpack_worker.handle(here, inbox, job, ENCODING, Stop())
    held.release()
    assert world.client.lrange("unpack", 0, -1) == [job]


def test_a_batch_is_returned_with_its_job_also_if_redis_was_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack")
    here, _, held = unpacker(world)
    held.release()
    push = queues.push
    monkeypatch.setattr(queues, "push", lambda *_: (_ for _ in ()).throw(Retryable("Redis is away")))
    with pytest.raises(Retryable):
        return_batch(here, batch_id)
    monkeypatch.setattr(queues, "push", push)
    return_batch(here, batch_id)
    return_batch(here, batch_id)
    assert world.client.lrange("unpack", 0, -1) == [world.job(batch_id, 3)]


def test_a_stale_job_is_not_dropped_after_publish_saw_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is returned, and unpacked again just when a slot finds that an old job of it is of no use."""
    batch_id = world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    slot, held = gpu_slot(world)
    job = slot.inbox.claim(0)
    assert job is not None
    shutil.rmtree(world.scratch("h1") / batch_id)
    return_batch(slot.host, batch_id)
    here, inbox, unpack_held = unpacker(world)
    drop, threads = queues.Inbox.drop, []

    def dropping(self: queues.Inbox, stale: str) -> None:
        def unpack() -> None:
            claimed = inbox.claim(0)
            assert claimed is not None
            unpack_worker.handle(here, inbox, claimed, ENCODING, Stop())

        threads.append(threading.Thread(target=unpack))
        threads[0].start()
        eventually(lambda: waits_for_lock(world) or not threads[0].is_alive())
        drop(self, stale)

    with monkeypatch.context() as patch:
        patch.setattr(slot.inbox, "drop", lambda stale: dropping(slot.inbox, stale))
        assert slot._prepare(job) is None
    threads[0].join()
    held.release()
    unpack_held.release()
    world.finish()
    assert world.snags() == []


def waits_for_lock(world: World) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(world.rows(query)[0][0])


def test_another_hosts_batch_keeps_its_job(world: World) -> None:
    """A dead slot's job comes back to the common list while its batch is still that host's."""
    world.plant_batch(1, NAMES)
    _, effects = world.run("unpack")
    world.reset()
    world.plant_batch(1, NAMES)
    sealing = next(n for n, effect in enumerate(effects, 1) if effect.startswith("sql INSERT INTO audio_files"))
    world.run("unpack", kill_before=sealing)
    return_leftovers(open_host(world.load(UnpackSettings), Stop()), "unpack")
    here = open_host(world.load(UnpackSettings, "h2"), Stop())
    ledger.beat(here.engine, "h2", gpu=True)
    held, inbox = open_inbox(here, "unpack")
    job = inbox.claim(0)
    assert job is not None
    assert unpack_worker.handle(here, inbox, job, ENCODING, Stop())
    held.release()
    assert world.client.lrange("unpack", 0, -1) == [job]
    world.finish()
    assert world.snags() == []


def test_a_broken_scratch_blames_no_recording(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack")

    def broken() -> None:
        def write(path: Path, data: bytes) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        gpu_worker.scratch.write_atomic = write

    for _ in range(2):
        with pytest.raises(AssertionError, match="Read-only file system"):
            world.run("gpu", mutant=broken)
        assert set(attempts(world).values()) == {0}
    world.finish()
    assert world.snags() == []


def test_a_result_that_cannot_be_entered_is_tried_again_and_counted(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack")

    def with_nul() -> None:
        import world as this

        def transcribe(samples: bytes) -> Transcript:
            whole = fake_transcribe(samples)
            return Transcript("a\0", "en", [], True, "fake") if samples == b"a.mp3" else whole

        this.MODELS = gpu_worker.Models(transcribe, fake_classify)

    world.finish(mutant=with_nul)
    states = dict(world.rows("SELECT member, state FROM audio_files"))
    assert states == {"a.mp3": "dead", "b.mp3": "done", "c.mp3": "done"}
    assert world.rows("SELECT state, host FROM batches") == [("complete", None)]


def test_stopping_does_not_wait_for_a_batch_in_hand(world: World) -> None:
    batch_id = world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    slot, held = gpu_slot(world)
    with scratch.batch_lock(slot.host.scratch, batch_id) as locked:
        assert locked
        running = threading.Thread(target=slot.run)
        running.start()
        eventually(lambda: world.rows("SELECT state FROM batches") == [("complete",)])
        slot.stop.event.set()
        running.join(20)
        assert not running.is_alive()
    held.release()
    world.finish()
    assert world.snags() == []


def test_a_job_of_a_batch_that_moved_to_another_host_is_dropped(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack")
    shutil.rmtree(world.scratch("h1") / batch_id)
    here = open_host(world.load(UnpackSettings), Stop())
    return_batch(here, batch_id)
    world.run("unpack", "h2")
    world.finish(hosts=("h1", "h2"))
    assert world.snags() == []
    assert set(attempts(world).values()) == {1}


def test_a_file_that_vanishes_again_and_again_makes_one_batch_a_look(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.plant_files(NAMES)
    mint = ledger.mint

    def minting(*arguments: Any, **limits: int) -> Any:
        (world.directory / "source" / "b.mp3").unlink(missing_ok=True)
        return mint(*arguments, **limits)

    monkeypatch.setattr(ledger, "mint", minting)
    transfer_sounds.run(world.load(TransferSettings), Stop(), once=True)
    assert world.rows("SELECT state, count(*) FROM batches GROUP BY 1") == [("uploaded", 1)]
    assert world.rows("SELECT struck FROM source_files WHERE struck IS NOT NULL") == [("vanished before upload",)]


def test_a_source_is_one_however_it_is_written(world: World) -> None:
    world.plant_files(NAMES)
    for end in ("", "/", "/./"):
        written = str(world.directory / "source") + end
        transfer_sounds.run(world.load(TransferSettings, SOURCE=written), Stop(), once=True)
    assert world.rows("SELECT count(*) FROM source_files") == [(3,)]


def test_a_broken_archive_outlives_its_batch(world: World) -> None:
    world.environment["ARCHIVE_AFTER_BATCH"] = "delete"
    batch_id = world.plant_batch(1, NAMES)
    where = {"Bucket": world.bucket.name, "Key": archive_key(batch_id)}
    body = world.bucket.client.get_object(**where)["Body"].read()
    world.bucket.client.put_object(**where, Body=body[:1400])
    world.finish()
    assert world.rows("SELECT state FROM batches") == [("complete",)]
    assert archive_key(batch_id) in world.objects()


def test_a_name_too_long_for_the_ledger_is_a_dead_recording(world: World) -> None:
    names = ["/".join(f"{n:03}" * 60 for n in range(19)) + ".mp3", "b.mp3"]
    world.plant_batch(1, names)
    world.finish()
    states = sorted(world.rows("SELECT state, reason FROM audio_files"))
    assert states == [("dead", "its name is longer than 2000 bytes"), ("done", None)]


def test_a_job_with_an_absurd_count_is_set_aside(world: World) -> None:
    world.plant_batch(1, NAMES)
    job = world.client.lpop("unpack").replace('"file_count": 3', '"file_count": 3000000000')
    world.client.rpush("unpack", job)
    world.run("unpack")
    assert world.client.lrange("dead", 0, -1) == [job]


def test_an_archive_that_unpack_cannot_handle_fails_after_some_tries(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.plant_batch(1, NAMES)
    here, inbox, held = unpacker(world)
    monkeypatch.setattr(unpack_worker, "read_archive", lambda *_: 1 / 0)
    for _ in range(5):
        job = inbox.claim(0)
        assert job is not None
        unpack_worker.handle(here, inbox, job, ENCODING, Stop())
    held.release()
    assert inbox.claim(0) is None
    assert world.rows("SELECT state, host, reason FROM batches") == [
        ("failed", None, "ZeroDivisionError: division by zero")
    ]
    assert list(world.scratch("h1").glob(BATCH.format(1))) == []


def test_two_disks_that_start_at_once_under_one_name(world: World) -> None:
    register(world.engine, "h1", "disk one")
    with pytest.raises(Fatal, match="LAB_HOST"):
        register(world.engine, "h1", "disk two")


def test_a_disk_is_named_once_and_completely(tmp_path: Path) -> None:
    """Also after one was killed as it named it, and by several at once."""
    root = tmp_path / "scratch"
    root.mkdir()
    (root / ".id.123.part").write_text("half")
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _n: scratch.prepare(root), range(16)))
    assert len(names) == 1
    assert re.fullmatch(r"[0-9a-f]{32}", names.pop())
    assert sorted(path.name for path in root.iterdir()) == [".id", ".locks"]
