"""What nobody needs any more goes, and nothing else: archives, scratch, whoever is killed or at work meanwhile."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from lab_audio import ledger, queues, scratch
from lab_audio.config import RetentionSettings
from lab_audio.contracts import archive_key
from lab_audio.operations import retention
from lab_audio.operations.reconcile import Stores

import world as lab
from world import BATCH, Effects, World, eventually

NAMES = ["a.mp3", "b.mp3"]


def complete(world: World, days: float, *numbers: int, names: list[str] = NAMES) -> list[str]:
    """Batches that have been complete for so many days."""
    batch_ids = [world.plant_batch(number, names) for number in numbers]
    world.finish()
    world.sql(
        "UPDATE batches SET complete_at = complete_at - make_interval(secs => :s) WHERE batch_id = ANY(:ids)",
        s=days * 86400,
        ids=batch_ids,
    )
    return batch_ids


def entered(world: World, days: float, number: int) -> str:
    """The same at once, without the workers."""
    batch_id = world.plant_batch(number, NAMES)
    world.client.delete("unpack")
    world.sql(
        "INSERT INTO batches (batch_id, state, complete_at)"
        " VALUES (:id, 'complete', now() - make_interval(secs => :s))",
        id=batch_id,
        s=days * 86400,
    )
    return batch_id


def archives(world: World) -> set[str]:
    return {key.removeprefix("archives/").removesuffix(".tar") for key in world.objects() if key.startswith("arch")}


def gone(world: World) -> set[str]:
    return {row[0] for row in world.rows("SELECT batch_id FROM batches WHERE archive_gone_at IS NOT NULL")}


def swept(world: World, *options: str, **settings: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(world.command("retention", "--json", *options, **settings).stdout)
    return found


def everything(world: World) -> list[Any]:
    """All that retention might change."""
    files = sorted(str(path) for path in (world.directory / "scratch").rglob("*"))
    tables = [world.rows(f"SELECT * FROM {table} ORDER BY 1") for table in ("batches", "audio_files", "hosts")]
    return [sorted(world.objects()), files, *tables]


class TestArchives:
    def test_after_seven_days_of_completeness(self, world: World) -> None:
        (new,), (old,) = complete(world, 6.99, 1), complete(world, 7.01, 2)
        size = len(world.bucket.client.get_object(Bucket=world.bucket.name, Key=archive_key(old))["Body"].read())
        before = everything(world)
        expected = {"kind": "archive", "name": archive_key(old), "bytes": size}
        dry = swept(world, "--dry-run")
        assert (dry["dry_run"], dry["removed"], dry["bytes"]) == (True, [expected], size)
        assert everything(world) == before
        assert swept(world)["removed"] == [expected]
        assert (archives(world), gone(world)) == ({new}, {old})
        assert swept(world)["removed"] == []

    def test_the_days_are_a_setting(self, world: World) -> None:
        (batch_id,) = complete(world, 3, 1)
        assert swept(world, RETENTION_DAYS="4")["removed"] == []
        assert world.command("retention", RETENTION_DAYS="0", code=78)
        said = world.command("retention", RETENTION_DAYS="2").stdout
        assert archive_key(batch_id) in said
        assert "1 deleted" in said

    def test_only_of_complete_batches(self, world: World) -> None:
        ready, failed, unknown = (world.plant_batch(number, NAMES) for number in (1, 2, 3))
        for batch_id in (failed, unknown):
            world.client.lrem("unpack", 0, world.job(batch_id, 2))
        world.sql(
            "INSERT INTO batches (batch_id, state, failed_at, dropped_at) VALUES (:id, 'failed', now(), now())",
            id=failed,
        )
        world.run("unpack")
        world.sql("UPDATE batches SET complete_at = now() - interval '9 days'")
        world.bucket.client.put_object(Bucket=world.bucket.name, Key="archives/notes.txt", Body=b"")
        assert swept(world)["removed"] == []
        assert archives(world) == {ready, failed, unknown, "notes.txt"}

    def test_not_with_a_dead_recording_until_it_is_dropped(self, world: World) -> None:
        (batch_id,) = complete(world, 9, 1, names=["a.mp3", "x.txt", "y.txt"])
        dead = [str(row[0]) for row in world.rows("SELECT audio_id FROM audio_files WHERE state = 'dead'")]
        for name in dead:
            assert swept(world)["removed"] == []
            world.command("dead", "drop", name)
        assert [removal["name"] for removal in swept(world)["removed"]] == [archive_key(batch_id)]

    def test_not_a_broken_one_until_it_is_dropped(self, world: World) -> None:
        batch_id = world.plant_batch(1, NAMES)
        where = {"Bucket": world.bucket.name, "Key": archive_key(batch_id)}
        body = world.bucket.client.get_object(**where)["Body"].read()
        world.bucket.client.put_object(**where, Body=body[: 512 * 4])
        world.finish()
        world.sql("UPDATE batches SET complete_at = now() - interval '9 days'")
        assert swept(world)["removed"] == []
        world.command("dead", "drop", batch_id)
        assert [removal["name"] for removal in swept(world)["removed"]] == [archive_key(batch_id)]

    def test_an_odd_count_keeps_none(self, world: World) -> None:
        world.plant_batch(1, NAMES)
        world.client.rpush("unpack", world.client.lpop("unpack").replace('"file_count": 2', '"file_count": 5'))
        world.finish()
        world.sql("UPDATE batches SET complete_at = now() - interval '9 days'")
        assert "file_count" in str(world.rows("SELECT flags FROM batches"))
        assert len(swept(world)["removed"]) == 1

    def test_killed_before_each_of_its_effects(self, world: World) -> None:
        place = 0
        while True:
            place += 1
            world.reset()
            old, new = [entered(world, 9, number) for number in (1, 2)], entered(world, 1, 3)
            killed, effects = world.run("retention", kill_before=place)
            assert set(old) - archives(world) <= gone(world) <= set(old), f"killed before effect {place}"
            world.run("retention")
            assert (archives(world), gone(world)) == ({new}, set(old)), f"killed before effect {place}"
            if not killed:
                break
        assert effects.count("s3 DELETE") == 2

    def test_a_deletion_that_came_to_nothing_is_made_again(self, world: World) -> None:
        (batch_id,) = complete(world, 0.01, 1)
        world.sql("UPDATE batches SET archive_gone_at = now()")
        assert [removal["name"] for removal in swept(world, "--dry-run")["removed"]] == [archive_key(batch_id)]
        assert archives(world) == {batch_id}
        assert [removal["name"] for removal in swept(world)["removed"]] == [archive_key(batch_id)]
        assert archives(world) == set()

    def test_two_at_once(self, world: World) -> None:
        old = [entered(world, 9, number) for number in range(1, 9)]
        threads = [threading.Thread(target=lambda: list(retention.sweep(stores(world), None, 7))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (archives(world), gone(world)) == (set(), set(old))


class TestRetryAtTheSameTime:
    """Either the archive goes, or its batch is unpacked anew: never both."""

    def dead_batch(self, world: World) -> str:
        (batch_id,) = complete(world, 9, 1, names=["a.mp3", "x.txt"])
        world.command("dead", "drop", batch_id)
        return batch_id

    def meanwhile(self, world: World, statement: str, act: Any) -> tuple[Any, threading.Thread]:
        """An engine: when it comes to the statement, `act` begins in a thread, and waits for the row or is through."""
        engine = ledger.open_ledger(world.load(RetentionSettings))
        thread = threading.Thread(target=act)

        def before(_c: Any, _k: Any, sql: str, *_: Any) -> None:
            if sql.startswith(statement) and thread.ident is None:
                thread.start()
                eventually(lambda: waits_for_lock(world) or not thread.is_alive())

        event.listen(engine, "before_cursor_execute", before)
        return engine, thread

    def test_retention_is_first(self, world: World) -> None:
        batch_id = self.dead_batch(world)
        refused: list[str] = []
        engine, thread = self.meanwhile(
            world,
            "UPDATE batches SET archive_gone_at",
            lambda: refused.append(world.command("dead", "retry", batch_id, code=1).stderr),
        )
        list(retention.archives(Stores(engine, world.client, world.bucket), 7, dry_run=False))
        thread.join()
        assert "was deleted" in refused[0]
        assert archives(world) == set()
        assert world.rows("SELECT state FROM batches") == [("complete",)]

    def test_retry_is_first(self, world: World) -> None:
        batch_id = self.dead_batch(world)
        removed: list[Any] = []
        engine, thread = self.meanwhile(
            world,
            "UPDATE batches SET state = 'uploaded'",
            lambda: removed.extend(retention.archives(stores(world), 7, dry_run=False)),
        )
        assert ledger.retry(engine, batch_id) == 1
        thread.join()
        assert removed == []
        assert archives(world) == {batch_id}
        assert gone(world) == set()


class TestScratch:
    def stray(self, world: World, number: int = 9) -> Path:
        """A folder of a batch that the ledger does not know."""
        folder = world.scratch("h1") / BATCH.format(number)
        folder.mkdir()
        (folder / "0123456789abcdef.opus").write_bytes(b"12345")
        return folder

    def test_folders_that_the_ledger_does_not_give_this_host(self, world: World) -> None:
        batch_id = world.plant_batch(1, NAMES)
        world.run("unpack")
        folder = self.stray(world)
        expected = {"kind": "scratch", "name": str(folder), "bytes": 5}
        before = everything(world)
        dry = swept(world, "--dry-run")
        assert (dry["scratch_here"], dry["removed"]) == (True, [expected])
        assert everything(world) == before
        assert swept(world)["removed"] == [expected]
        assert [path.name for path in world.scratch("h1").glob("[0-9]*")] == [batch_id]
        world.finish()
        assert world.snags() == []

    def test_one_that_a_worker_has_in_hand_stays(self, world: World) -> None:
        complete(world, 1, 1)
        folder = self.stray(world)
        with scratch.batch_lock(world.scratch("h1"), folder.name) as locked:
            assert locked
            assert swept(world)["removed"] == []
        assert folder.exists()

    @pytest.mark.parametrize("settings", [{"LAB_HOST": "h2"}, {"SCRATCH_ROOT": "/nonexistent/scratch"}])
    def test_nothing_under_another_hosts_name_or_without_scratch(self, world: World, settings: dict[str, str]) -> None:
        world.plant_batch(1, NAMES)
        world.run("unpack")
        world.run("unpack", "h2")
        before = everything(world)
        found = swept(world, **settings)
        assert (found["scratch_here"], found["removed"]) == (False, [])
        assert everything(world) == before
        assert "0 deleted" in world.command("retention", **settings).stdout


def waits_for_lock(world: World) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(world.rows(query)[0][0])


def stores(world: World) -> Stores:
    return Stores(ledger.open_ledger(world.load(RetentionSettings)), world.client, world.bucket)


def sweep(world: World, host: str, effects: Effects) -> None:
    """What `lab-audio retention` does."""
    settings = world.load(RetentionSettings, host)
    engine = ledger.open_ledger(settings)
    here = Stores(engine, queues.open_queues(settings), world.workers_bucket)
    effects.watch(engine, world.workers_bucket, world.directory)
    list(retention.sweep(here, retention.host_here(here, settings), settings.retention_days))


lab.ROLES["retention"] = sweep
