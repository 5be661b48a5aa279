"""Host loss, an emptied Redis, archives that nobody knows, rows and objects that do not fit."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from datetime import datetime, timezone
from typing import Any

import pytest

from lab_audio import ledger, queues
from lab_audio.config import UnpackSettings
from lab_audio.contracts import archive_key
from lab_audio.errors import Retryable
from lab_audio.operations.reconcile import Report, Stores, reconcile
from lab_audio.workers.host import lose_host, open_host
from lab_audio.workers.loop import Stop

from world import World

NAMES = ["a.mp3", "b.mp3", "c.mp3"]
GRACE = 600


def stores(world: World) -> Stores:
    return Stores(world.engine, world.client, world.bucket)


def silence(world: World, host: str, minutes: float) -> None:
    world.sql(
        "UPDATE hosts SET seen_at = now() - make_interval(mins => :m),"
        " doubted_at = doubted_at - make_interval(mins => :m) WHERE host = :host",
        m=minutes,
        host=host,
    )


def nothing(report: Report) -> bool:
    return not any(vars(report).values())


def states(world: World) -> dict[str, tuple[str, str | None]]:
    return {row.batch_id: (row.state, row.host) for row in world.rows("SELECT batch_id, state, host FROM batches")}


def test_a_silent_host_is_doubted_then_lost_and_another_redoes_only_what_was_pending(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    jobs = [world.client.rpop("transcribe:h1") for _ in range(2)]
    world.run("gpu", "h1")
    world.client.rpush("transcribe:h1", *jobs)
    done = world.rows("SELECT audio_id, attempts, settled_at FROM audio_files WHERE state = 'done'")
    assert len(done) == 1

    assert nothing(reconcile(stores(world), GRACE))
    silence(world, "h1", 11)
    first = reconcile(stores(world), GRACE)
    assert (first.doubted_hosts, first.lost_hosts) == (["h1"], [])
    assert states(world)[batch_id] == ("ready", "h1")
    silence(world, "h1", 11)
    second = reconcile(stores(world), GRACE)
    assert (second.lost_hosts, second.returned_batches, second.pushed_jobs) == (["h1"], [batch_id], [batch_id])
    assert not list(world.client.scan_iter("*h1*"))
    shutil.rmtree(world.scratch("h1"))

    world.finish(hosts=["h2"])
    assert world.snags() == []
    kept = world.rows("SELECT audio_id, attempts, settled_at FROM audio_files WHERE state = 'done'")
    assert set(done) <= set(kept)


def test_a_host_that_beats_again_is_not_lost(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    silence(world, "h1", 11)
    assert reconcile(stores(world), GRACE).doubted_hosts == ["h1"]
    ledger.beat(world.engine, "h1", gpu=True)
    silence(world, "h1", 11)  # as if PostgreSQL had been away again
    assert reconcile(stores(world), GRACE).lost_hosts == []
    assert states(world)[batch_id] == ("ready", "h1")


def test_two_reconciles_at_once_do_not_lose_a_host_at_first_sight(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    silence(world, "h1", 11)
    reports = [reconcile(stores(world), GRACE) for _ in range(3)]
    assert all(report.lost_hosts == [] for report in reports)


def test_a_host_that_comes_back_late_throws_its_work_away(world: World) -> None:
    """h1 unpacked and died; h2 took over and is half through; h1 starts again with its scratch and its old jobs."""
    world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    stale = world.client.lrange("transcribe:h1", 0, -1)
    lose_host(world.engine, world.client, "h1")
    reconcile(stores(world), GRACE)
    world.run("unpack", "h2")
    world.client.rpush("transcribe:h1", *stale)
    world.run("gpu", "h1")
    world.run("unpack", "h1")
    assert world.rows("SELECT DISTINCT host FROM batches") == [("h2",)]
    assert world.rows("SELECT sum(attempts) FROM audio_files") == [(0,)]
    world.finish(hosts=["h2", "h1"])
    assert world.snags() == []


def test_a_host_forgotten_in_the_middle_of_unpacking_seals_nothing(world: World) -> None:
    world.plant_batch(1, NAMES)
    effects = world.run("unpack", "h1")[1]
    world.reset()
    batch_id = world.plant_batch(1, NAMES)
    seal = next(place for place, effect in enumerate(effects, 1) if effect.startswith("sql INSERT INTO audio_files"))
    world.run("unpack", "h1", kill_before=seal - 2)
    lose_host(world.engine, world.client, "h1")
    assert ledger.seal(world.engine, batch_id, "h1", [], ledger.Archive("0" * 64, 1, 0), []) is None
    reconcile(stores(world), GRACE)
    world.finish(hosts=["h2", "h1"])
    assert world.snags() == []


def test_a_job_that_a_lost_host_had_only_claimed_goes_back(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.client.lmove("unpack", "processing:h1:unpack:0", "LEFT", "RIGHT")
    lose_host(world.engine, world.client, "h1")
    assert world.client.lrange("unpack", 0, -1) == [world.job(batch_id, 3)]


@pytest.mark.parametrize("stage", ["uploaded", "unpacking", "ready", "half done", "complete"])
def test_redis_is_whole_again_after_flushall(world: World, stage: str) -> None:
    batch_id = world.plant_batch(1, NAMES)
    ends = {"uploaded": 0, "unpacking": None, "ready": 0}
    if stage == "uploaded":
        ledger.adopt(world.engine, batch_id, world.job(batch_id, 3), ledger.Archive(None, None, 3))
    elif stage == "unpacking":
        effects = world.run("unpack")[1]
        world.reset()
        world.plant_batch(1, NAMES)
        place = next(n for n, effect in enumerate(effects, 1) if effect.startswith("sql INSERT INTO audio_files"))
        world.run("unpack", kill_before=place)
    else:
        world.run("unpack")
        if stage == "half done":
            world.run("gpu", kill_before=25)
        if stage == "complete":
            world.sql("UPDATE audio_files SET state = 'dead', reason = 'x', settled_at = now()")
            world.sql("UPDATE batches SET state = 'complete', complete_at = now()")
            world.poison, world.planted = world.planted, set()
    assert stage in ends or stage in ("half done", "complete")
    world.client.flushdb()
    reconcile(stores(world), GRACE)
    if stage == "ready":
        assert world.client.llen("transcribe:h1") == 3
        assert world.client.get(f"batch:{batch_id}:total") == "3"
    assert nothing(reconcile(stores(world), GRACE)) or stage == "complete"
    world.finish()
    assert world.snags() == []


def test_a_batch_that_lacks_one_job_gets_that_one(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack")
    gone = world.client.rpop("transcribe:h1")
    assert reconcile(stores(world), GRACE, dry_run=True).published_batches
    assert world.client.llen("transcribe:h1") == 2
    reconcile(stores(world), GRACE)
    assert world.client.lrange("transcribe:h1", 0, -1).count(gone) == 1
    assert world.client.llen("transcribe:h1") == 3


def test_an_archive_that_nobody_knows_is_entered(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.client.flushdb()
    world.bucket.client.put_object(Bucket=world.bucket.name, Key="archives/notes.txt", Body=b"x")
    report = reconcile(stores(world), GRACE)
    assert (report.adopted_archives, report.pushed_jobs) == ([batch_id], [batch_id])
    world.finish()
    assert world.rows("SELECT state, flags FROM batches") == [("complete", [])]
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key="archives/notes.txt")
    assert world.snags() == []


def test_keys_of_a_batch_that_has_ended_are_deleted(world: World) -> None:
    """A Redis that crashed may have forgotten the DEL."""
    batch_id = world.plant_batch(1, NAMES)
    world.finish()
    world.client.set(f"batch:{batch_id}:total", 3)
    assert reconcile(stores(world), GRACE).forgotten_keys == [batch_id]
    assert world.snags() == []


def test_objects_and_rows_are_compared(world: World) -> None:
    world.plant_batch(1, ["a.mp3", "b.mp3", "c.mp3", "d.mp3"])
    world.finish()
    a, b, c, _ = world.rows("SELECT audio_id, s3_opus_path FROM audio_files ORDER BY member")
    today = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    died = "UPDATE audio_files SET state = 'dead', s3_opus_path = NULL, settled_at = now() WHERE audio_id = :id"
    world.sql(died, id=a[0])
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=b[1])
    stray = f"processed/{today}/999999.opus"
    for key in (stray, "processed/1999-12-31/7.opus"):
        world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=b"x")

    assert nothing(reconcile(stores(world), GRACE, audit=False))
    dry = reconcile(stores(world), GRACE, dry_run=True)
    assert dry.deleted_objects == [a[1]]
    assert a[1] in world.objects()
    report = reconcile(stores(world), GRACE)
    assert report.deleted_objects == [a[1]]
    assert report.rows_without_objects == [b[1]]
    assert report.objects_without_rows == ["processed/1999-12-31/7.opus", stray]
    assert a[1] not in world.objects()
    assert c[1] in world.objects()
    again = reconcile(stores(world), GRACE)
    assert (again.deleted_objects, again.rows_without_objects) == ([], [b[1]])


def test_the_commands(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    world.client.flushdb()
    dry = world.command("reconcile", "--dry-run", "--json")
    assert json.loads(dry.stdout)["published_batches"] == [batch_id]
    assert world.client.keys() == []
    assert f"1 published batches: {batch_id}" in world.command("reconcile").stdout
    assert "all is well" in world.command("reconcile", "--quick").stdout

    assert "no host is called h9; known: h1" in world.command("hosts", "forget", "h9", code=78).output
    assert batch_id in world.command("hosts", "forget", "h1").stdout
    assert world.client.keys() == ["unpack"]
    assert ledger.seen_hosts(world.engine) == []

    world.bucket.client.put_object(Bucket=world.bucket.name, Key="processed/1999-12-31/7.opus", Body=b"x")
    assert "processed/1999-12-31/7.opus" in world.command("reconcile", code=1).stdout


def test_a_replaced_disk_gives_the_old_ones_batches_back(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    shutil.rmtree(world.scratch("h1"))
    silence(world, "h1", 3)
    world.run("gpu", "h1")  # starts on the new disk
    assert states(world)[batch_id] == ("uploaded", None)
    assert queues.is_queued(world.client, "unpack", world.job(batch_id, 3))
    world.finish()
    assert world.snags() == []


def test_reconcile_may_be_killed_anywhere(world: World) -> None:
    """Before each of its changes, then it runs again."""

    def plant() -> None:
        world.reset()
        world.plant_batch(1, NAMES)
        world.run("unpack", "h1")
        world.client.flushdb()
        world.plant_batch(2, ["d.mp3"])
        world.client.delete("unpack")
        silence(world, "h1", 11)
        world.sql("UPDATE hosts SET doubted_at = now() - interval '1 hour'")

    plant()
    effects = world.run("reconcile")[1]
    changes = [
        place
        for place, (before, effect) in enumerate(zip(["", *effects], effects, strict=False), 1)
        if effect != before and not effect.startswith(("sql SELECT", "redis SCAN", "s3 GET", "s3 HEAD"))
    ]
    assert len(changes) > 8
    for place in changes:
        plant()
        world.run("reconcile", kill_before=place)
        silence(world, "h1", 11)
        world.sql("UPDATE hosts SET doubted_at = now() - interval '1 hour' WHERE doubted_at IS NOT NULL")
        reconcile(stores(world), GRACE)
        world.finish(hosts=["h2"])
        world.run("unpack", "h1")
        assert world.snags() == [], f"killed before {effects[place - 1]}, effect {place}"


def test_a_host_may_be_forgotten_again(world: World) -> None:
    """`hosts forget` that was cut short is run once more."""
    world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    lose_host(world.engine, world.client, "h1")
    assert "h1 forgotten" in world.command("hosts", "forget", "h1").stdout
    assert world.client.llen("unpack") == 1


def test_a_host_that_was_forgotten_buries_nothing(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack", "h1")
    lose_host(world.engine, world.client, "h1")
    reconcile(stores(world), GRACE)
    world.run("unpack", "h2")
    (audio_id,) = world.rows("SELECT min(audio_id) FROM audio_files")[0]
    assert ledger.bury(world.engine, audio_id, "h1", "its own disk is broken").state == "pending"
    assert ledger.bury(world.engine, audio_id, "h2", "x").state == "dead"


def test_an_archive_of_a_transfer_worker_is_entered_with_its_source_files(world: World) -> None:
    """The ledger can only have forgotten it: it came back from a dump, and nobody said so."""
    world.plant_files(["a.mp3", "b/b.mp3"])
    world.run("transfer")
    world.finish()
    world.sql("TRUNCATE classifications, transcripts, source_files, audio_files, batches")
    for key in world.objects():
        if key.startswith("processed/"):
            world.bucket.client.delete_object(Bucket=world.bucket.name, Key=key)
    assert len(reconcile(stores(world), GRACE).adopted_archives) == 1
    world.run("transfer")
    world.finish()
    assert world.snags() == []


def test_a_batch_of_which_nothing_is_left_is_failed(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    ledger.adopt(world.engine, batch_id, world.job(batch_id, 3), ledger.Archive(None, None, 3))
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=f"archives/{batch_id}.tar")
    world.sql("UPDATE batches SET archive_gone_at = now()")
    world.run("unpack")
    assert world.rows("SELECT state, reason FROM batches") == [
        ("failed", "its archive is gone, and nothing of it is kept")
    ]


def test_a_replaced_disk_leaves_nothing_in_redis(world: World) -> None:
    """A batch that had ended on the old disk, and was not tidied yet, keeps no keys."""
    batch_id = world.plant_batch(1, NAMES)
    world.finish()
    world.sql("UPDATE batches SET host = 'h1'")
    world.client.mset({f"batch:{batch_id}:{key}": 1 for key in ("total", "processed", "s3_key")})
    world.client.rpush("processing:h1:gpu:1", "{}")
    silence(world, "h1", 5)
    shutil.rmtree(world.scratch("h1"))
    world.run("unpack")
    assert world.snags() == []


def test_a_dry_run_says_of_a_lost_host_what_the_run_does(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack")
    world.plant_batch(2, NAMES)
    world.client.delete("unpack")
    world.plant_batch(3, NAMES)
    world.sql("UPDATE hosts SET seen_at = now() - interval '1 day', doubted_at = now() - interval '1 hour'")
    dry, done = (reconcile(stores(world), GRACE, dry_run=dry) for dry in (True, False))
    assert dry == done
    assert (done.returned_batches, done.adopted_archives) == ([world.BATCH(1)], [world.BATCH(2), world.BATCH(3)])
    assert done.pushed_jobs == [world.BATCH(n) for n in (1, 2, 3)]


def test_the_last_copy_of_a_dead_recording_is_reported(world: World) -> None:
    world.plant_batch(1, ["a.mp3"])
    world.finish()
    world.sql("UPDATE audio_files SET state = 'dead', reason = 'x', s3_opus_path = NULL, dropped_at = now()")
    world.sql("UPDATE batches SET archive_gone_at = now()")
    (key,) = {key for key in world.objects() if key.startswith("processed/")}
    for dry in (True, False):
        assert reconcile(stores(world), GRACE, dry_run=dry).objects_without_rows == [key]
    assert key in world.objects()


def test_an_object_of_a_failed_batch_is_reported(world: World) -> None:
    """A host died between PUT and FINISH, and the batch could not be unpacked again."""
    batch_id = world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    ((audio_id, date),) = world.rows("SELECT audio_id, date::text FROM audio_files")
    key = f"processed/{date}/{audio_id}.opus"
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=b"x")
    assert reconcile(stores(world), GRACE).objects_without_rows == []
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(batch_id))
    world.command("hosts", "forget", "h1")
    world.run("unpack", "h2")
    assert states(world) == {batch_id: ("failed", None)}
    assert reconcile(stores(world), GRACE).objects_without_rows == [key]


@pytest.mark.parametrize("key", ["processed/2025-02-30/7.opus", "processed/0000-01-01/7.opus", "processed/x/7.opus"])
def test_folders_of_no_date_are_passed_over(world: World, key: str) -> None:
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=b"x")
    assert nothing(reconcile(stores(world), GRACE))


@pytest.mark.parametrize(
    "metadata",
    [
        {"source": "%00"},
        {"source": "%FF"},
        {"source": "/s", "source-path": "%00", "source-mtime-ns": "1"},
        {"source": "/s", "source-path": "a.tar", "source-mtime-ns": "9999999999999999999"},
        {"file-count": "99999999999"},
    ],
)
def test_an_archive_with_odd_metadata_is_entered(world: World, metadata: dict[str, str]) -> None:
    batch_id = world.plant_batch(1, NAMES)
    where = {"Bucket": world.bucket.name, "Key": archive_key(batch_id)}
    body = world.bucket.client.get_object(**where)["Body"].read()
    world.bucket.client.put_object(**where, Body=body, Metadata=metadata)
    world.client.delete("unpack")
    assert reconcile(stores(world), GRACE).adopted_archives == [batch_id]
    assert states(world)[batch_id][0] == ("failed" if metadata.get("source") == "/s" else "uploaded")


@pytest.mark.parametrize(
    "arguments",
    [
        ("pause", "\udcff"),
        ("resume", "\udcff"),
        ("hosts", "forget", "\udcff"),
        ("fetch-archive", "20260101-000000-000001", "."),
    ],
)
def test_names_that_cannot_be_are_refused(world: World, arguments: tuple[str, ...]) -> None:
    refused = world.command(*arguments, code=2)
    assert "not UTF-8" in refused.output or "is a directory" in refused.output


def test_a_replaced_disk_is_told_to_redis_when_it_is_there_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack")
    silence(world, "h1", 5)
    shutil.rmtree(world.scratch("h1"))
    push, away = queues.push, [True]

    def pushing(*arguments: Any) -> None:
        if away:
            away.pop()
            raise Retryable("Redis is away")
        push(*arguments)

    monkeypatch.setattr(queues, "push", pushing)
    open_host(world.load(UnpackSettings), Stop())
    assert world.client.lrange("unpack", 0, -1) == [world.job(batch_id, 3)]


def test_what_a_lost_host_had_in_hand_goes_alone(world: World) -> None:
    """The machine itself may have died of it."""
    world.plant_batch(1, NAMES)
    world.run("unpack")
    world.client.lmove("transcribe:h1", "processing:h1:gpu:0", "LEFT", "RIGHT")
    world.command("hosts", "forget", "h1")
    reasons = [reason for (reason,) in world.rows("SELECT reason FROM audio_files WHERE reason IS NOT NULL")]
    assert reasons == ["its worker died while it was in hand"]


def test_a_list_of_no_host_does_no_harm(world: World) -> None:
    for name in (b"transcribe:\xff", b"processing:\xff:gpu:0", b"transcribe:a\0b"):
        world.client.rpush(name, "{}")
    assert nothing(reconcile(stores(world), GRACE))


@pytest.mark.parametrize("path", ["../a.mp3", "/a.mp3", "x" * 3000 + ".mp3"])
def test_an_archive_that_claims_impossible_source_files_has_failed(world: World, path: str) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(path))
    body, key = tar.getvalue(), archive_key(world.BATCH(1))
    metadata = {"source": str(world.directory / "source"), "sha256": hashlib.sha256(body).hexdigest()}
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=body, Metadata=metadata)
    assert reconcile(stores(world), GRACE).adopted_archives == [world.BATCH(1)]
    assert states(world) == {world.BATCH(1): ("failed", None)}
    assert world.rows("SELECT * FROM source_files") == []
