"""What was set aside is listed, shown, got back, tried again or accepted; after a retry all ends exactly once."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab_audio import ledger, queues, s3_utils
from lab_audio.config import GpuSettings
from lab_audio.contracts import archive_key, processed_key
from lab_audio.errors import Permanent
from lab_audio.jobs import TranscribeJob
from lab_audio.ledger import Settled, recovery
from lab_audio.media import reader, transcode
from lab_audio.operations import dead_letters
from lab_audio.operations.reconcile import Stores
from lab_audio.workers import gpu_worker
from lab_audio.workers.host import open_host, open_inbox
from lab_audio.workers.loop import Stop

import world as lab
from world import MODELS, POISON, Effects, World, eventually, fake_decode, windows

NAMES = ["a.mp3", "b.mp3", "c.mp3"]


def refusing(name: str) -> lab.MUTANT:
    """A mutant whose transcriber finds one recording bad."""

    def mutant() -> None:
        def transcribe(samples: bytes) -> Any:
            if samples == name.encode():
                raise Permanent("the model does not like it")
            return lab.fake_transcribe(samples)

        lab.MODELS = gpu_worker.Models(transcribe, lab.fake_classify)

    return mutant


def dead_batch(world: World, number: int = 1) -> tuple[str, str]:
    """A complete batch of three recordings whose second is dead: its batch_id and the audio_id."""
    batch_id = world.plant_batch(number, NAMES)
    world.finish(mutant=refusing("b.mp3"))
    ((audio_id,),) = world.rows(f"SELECT audio_id FROM audio_files WHERE state = 'dead' AND batch_id = '{batch_id}'")
    return batch_id, str(audio_id)


def listed(world: World, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(world.command("dead", "list", "--json", *options).stdout)
    return found


def truncate_archive(world: World, batch_id: str, size: int = 1400) -> None:
    """Cut an archive off in its second member: before 1536 in its header, then in its bytes."""
    where = {"Bucket": world.bucket.name, "Key": archive_key(batch_id)}
    body = world.bucket.client.get_object(**where)["Body"].read()
    world.bucket.client.put_object(**where, Body=body[:size])


def delete_archive(world: World, batch_id: str) -> None:
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(batch_id))


def forgive_poison(world: World) -> None:
    """What was planted as poison is expected to be done."""
    world.planted |= world.poison
    world.poison = set()


class TestListAndShow:
    def test_nothing_is_dead(self, world: World) -> None:
        world.plant_batch(1, NAMES)
        world.finish()
        assert world.command("dead", "list").stdout == "nothing is dead\n"
        assert listed(world) == []

    def test_a_dead_recording_with_all_that_is_known(self, world: World) -> None:
        batch_id, audio_id = dead_batch(world)
        (letter,) = listed(world)
        assert letter.pop("since").startswith("20")
        assert letter == {
            "kind": "recording",
            "name": audio_id,
            "batch_id": batch_id,
            "member": "b.mp3",
            "reason": "the model does not like it",
            "attempts": 1,
            "host": "h1",
            "dropped_at": None,
        }
        table = world.command("dead", "list").stdout
        for cell in (audio_id, batch_id, "b.mp3", "the model does not like it", "h1"):
            assert cell in table
        shown = json.loads(world.command("dead", "show", audio_id, "--json").stdout)
        assert (shown["state"], shown["original_filename"], shown["seconds"]) == ("dead", "b.mp3", 1.0)
        assert shown["archive"] == archive_key(batch_id)
        assert shown["archive_bytes"] > 0
        assert "the model does not like it" in world.command("dead", "show", audio_id).stdout

    def test_a_failed_batch_and_a_broken_archive(self, world: World) -> None:
        failed, broken = world.plant_batch(1, NAMES), world.plant_batch(2, NAMES)
        delete_archive(world, failed)
        world.sql(
            "INSERT INTO batches (batch_id, state, job) VALUES (:id, 'uploaded', :job)",
            id=failed,
            job=world.job(failed, 3),
        )
        truncate_archive(world, broken)
        world.finish()
        found = {letter["name"]: letter for letter in listed(world)}
        assert set(found) == {failed, broken}
        assert found[failed]["reason"] == "archive missing"
        assert found[broken]["reason"].startswith("archive: ")
        shown = json.loads(world.command("dead", "show", failed, "--json").stdout)
        assert (shown["state"], shown["archive_bytes"]) == ("failed", None)
        assert "archive: " in world.command("dead", "show", broken).stdout

    def test_many_are_cut_short_for_a_person_and_whole_for_a_program(self, world: World) -> None:
        batch_id, _ = dead_batch(world)
        world.sql(
            "INSERT INTO audio_files (batch_id, member, item, state, reason, settled_at)"
            " SELECT :id, n || '.txt', n, 'dead', 'is not an .mp3 file', now() FROM generate_series(1, 2400) AS n",
            id=batch_id,
        )
        assert "... and 2301 more" in world.command("dead", "list").stdout
        names = [letter["name"] for letter in listed(world)]
        assert len(names) == len(set(names)) == 2401

    def test_a_strangers_names_do_not_reach_the_terminal_as_they_are(self, world: World) -> None:
        world.plant_batch(1, ["[/red]\x1b[2J\n.txt"])
        world.client.rpush("dead", b"\xff\x1b[2J")
        world.finish()
        table = world.command("dead", "list").stdout
        assert "\x1b" not in table
        assert r"[/red]\x1b[2J\n.txt" in table
        for letter in listed(world):
            assert "\x1b" not in world.command("dead", "show", letter["name"]).stdout

    def test_nor_do_they_break_the_status(self, world: World) -> None:
        world.plant_batch(1, NAMES)
        world.run("unpack")
        world.sql("UPDATE batches SET flags = ARRAY[:flag]", flag="archive: broken [/red]\x1b[2J")
        assert r"archive: broken [/red]\x1b[2J" in world.command("status", COLUMNS="300").stdout

    def test_what_is_not_dead_is_not_shown(self, world: World) -> None:
        dead_batch(world)
        ((done,),) = world.rows("SELECT audio_id FROM audio_files WHERE member = 'a.mp3'")
        for name, why in (
            (str(done), "it is done, not dead"),
            ("999999", "no recording has this audio_id"),
            ("9" * 30, "not an audio_id"),
            ("20300101-000000-000000", "no batch has this id"),
            ("payload-00000000", "not an audio_id"),
            ("../x", "not an audio_id"),
        ):
            assert why in world.command("dead", "show", name, code=1).stderr


class TestSave:
    def test_the_recording_comes_back(self, world: World, tmp_path: Path) -> None:
        world.plant_batch(1, ["a.mp3", "poison.mp3", "z.mp3"])
        world.finish()
        (letter,) = listed(world)
        file = tmp_path / "got.mp3"
        shown = world.command("dead", "show", letter["name"], "--save", str(file), "--json").stdout
        assert file.read_bytes() == POISON + b"poison.mp3"
        assert json.loads(shown)["saved_bytes"] == len(POISON + b"poison.mp3")

    def test_where_it_cannot_nothing_is_left(self, world: World, tmp_path: Path) -> None:
        batch_id, audio_id = dead_batch(world)
        for file in (tmp_path / "missing" / "x.mp3", Path("/proc/x.mp3")):
            said = world.command("dead", "show", audio_id, "--save", str(file), code=1).stderr
            assert f"{file} cannot be written" in said
        file = tmp_path / "x.mp3"
        assert "fetch-archive" in world.command("dead", "show", batch_id, "--save", str(file), code=1).stderr
        truncate_archive(world, batch_id, 1538)
        assert "truncated" in world.command("dead", "show", audio_id, "--save", str(file), code=1).stderr
        delete_archive(world, batch_id)
        assert "is gone" in world.command("dead", "show", audio_id, "--save", str(file), code=1).stderr
        assert list(tmp_path.glob("*.mp3*")) == []

    def test_a_link_has_nothing_to_save(self, world: World, tmp_path: Path) -> None:
        batch_id = world.plant_batch(1, ["a.mp3"])
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            info = tarfile.TarInfo("link.mp3")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
        world.bucket.client.put_object(Bucket=world.bucket.name, Key=archive_key(batch_id), Body=tar.getvalue())
        world.finish()
        (letter,) = listed(world)
        file = tmp_path / "x.mp3"
        said = world.command("dead", "show", letter["name"], "--save", str(file), code=1).stderr
        assert "is a symbolic link" in said
        assert not file.exists()


class TestRetry:
    @pytest.mark.parametrize("by", ["recording", "batch"])
    def test_a_recording_is_done_in_the_end_and_the_others_are_not_done_again(self, world: World, by: str) -> None:
        batch_id, audio_id = dead_batch(world)
        before = world.rows("SELECT audio_id, created_at FROM transcripts")
        said = world.command("dead", "retry", audio_id if by == "recording" else batch_id).stdout
        assert "is unpacked anew" in said
        assert world.rows("SELECT state, host, reason FROM batches") == [("uploaded", None, None)]
        assert world.rows("SELECT state, attempts, reason FROM audio_files WHERE member = 'b.mp3'") == [
            ("pending", 0, None)
        ]
        assert world.client.lrange("unpack", 0, -1) == [world.job(batch_id, 3)]
        assert listed(world) == []
        world.finish()
        assert world.snags() == []
        assert set(before) < set(world.rows("SELECT audio_id, created_at FROM transcripts"))

    def test_several_of_one_batch_and_some_that_cannot(self, world: World) -> None:
        batch_id = world.plant_batch(1, [*NAMES, "x.txt", "y.txt"])
        world.finish(mutant=refusing("b.mp3"))
        names = [letter["name"] for letter in listed(world)]
        world.command("dead", "retry", names[0])
        assert [letter["name"] for letter in listed(world)] == names[1:]
        result = world.command("dead", "retry", *names, "4711", "junk", code=1)
        assert result.stdout.count(f"batch {batch_id} is unpacked anew") == 3
        assert "4711: no recording has this audio_id" in result.stderr
        assert "2 of 5 refused" in result.stderr
        assert world.client.llen("unpack") == 1
        world.finish()
        assert {(letter["member"], letter["reason"]) for letter in listed(world)} == {
            ("x.txt", "is not an .mp3 file"),
            ("y.txt", "is not an .mp3 file"),
        }
        assert world.rows("SELECT count(*) FROM audio_files WHERE state = 'done'") == [(3,)]

    def test_again_before_it_was_taken(self, world: World) -> None:
        batch_id, audio_id = dead_batch(world)
        world.command("dead", "retry", audio_id)
        world.client.delete("unpack")
        world.command("dead", "retry", audio_id)
        world.command("dead", "retry", batch_id, audio_id)
        assert world.client.lrange("unpack", 0, -1) == [world.job(batch_id, 3)]
        world.finish()
        assert world.snags() == []

    def test_what_was_dropped(self, world: World) -> None:
        _, audio_id = dead_batch(world)
        world.command("dead", "drop", audio_id)
        world.command("dead", "retry", audio_id)
        world.finish(mutant=refusing("b.mp3"))
        assert [letter["name"] for letter in listed(world)] == [audio_id], "dropped is what died before"

    def test_not_while_the_batch_is_at_work(self, world: World) -> None:
        batch_id = world.plant_batch(1, [*NAMES, "x.txt"])
        world.run("unpack")
        ((audio_id,),) = world.rows("SELECT audio_id FROM audio_files WHERE state = 'dead'")
        before = world.rows("SELECT * FROM audio_files ORDER BY audio_id")
        for name in (str(audio_id), batch_id):
            said = world.command("dead", "retry", name, code=1).stderr
            assert "is still at work (ready on h1)" in said
        assert world.rows("SELECT * FROM audio_files ORDER BY audio_id") == before
        assert world.client.llen("unpack") == 0

    def test_not_while_its_host_still_tidies(self, world: World) -> None:
        batch_id, audio_id = dead_batch(world)
        world.sql("UPDATE batches SET host = 'h1'")
        assert "(complete on h1)" in world.command("dead", "retry", audio_id, code=1).stderr
        world.run("unpack")
        world.command("dead", "retry", audio_id)
        world.finish()
        assert world.snags() == []
        assert batch_id

    def test_not_without_its_archive(self, world: World) -> None:
        batch_id, audio_id = dead_batch(world)
        world.sql("UPDATE batches SET archive_gone_at = now()")
        assert "was deleted on 20" in world.command("dead", "retry", audio_id, code=1).stderr
        world.sql("UPDATE batches SET archive_gone_at = NULL")
        delete_archive(world, batch_id)
        for name in (audio_id, batch_id):
            assert "is not in the store" in world.command("dead", "retry", name, code=1).stderr
        assert world.rows("SELECT state FROM batches") == [("complete",)]

    def test_not_where_nothing_is_dead(self, world: World) -> None:
        batch_id = world.plant_batch(1, NAMES)
        world.finish()
        assert f"no recording in batch {batch_id} is dead" in world.command("dead", "retry", batch_id, code=1).stderr
        assert world.rows("SELECT state FROM batches") == [("complete",)]

    @pytest.mark.parametrize("with_job", [True, False])
    def test_a_failed_batch_whose_archive_is_there_again(self, world: World, with_job: bool) -> None:
        batch_id = world.plant_batch(1, NAMES)
        where = {"Bucket": world.bucket.name, "Key": archive_key(batch_id)}
        body = world.bucket.client.get_object(**where)["Body"].read()
        delete_archive(world, batch_id)
        world.sql(
            "INSERT INTO batches (batch_id, state, job, file_count, attempts) VALUES (:id, 'uploaded', :job, 3, 4)",
            id=batch_id,
            job=world.job(batch_id, 3),
        )
        world.finish()
        assert world.rows("SELECT state, reason FROM batches") == [("failed", "archive missing")]
        if not with_job:
            world.sql("UPDATE batches SET job = NULL")
        assert "is not in the store" in world.command("dead", "retry", batch_id, code=1).stderr
        world.bucket.client.put_object(**where, Body=body)
        world.command("dead", "retry", batch_id)
        assert world.rows("SELECT state, reason, attempts, flags FROM batches") == [("uploaded", None, 0, [])]
        world.finish()
        assert world.snags() == []
        assert world.rows("SELECT flags FROM batches") == [([],)]

    def test_a_batch_that_a_restore_found_without_archive(self, world: World) -> None:
        batch_id = world.plant_batch(1, NAMES)
        where = {"Bucket": world.bucket.name, "Key": archive_key(batch_id)}
        body = world.bucket.client.get_object(**where)["Body"].read()
        ledger.adopt(world.engine, batch_id, world.job(batch_id, 3), ledger.Archive(None, len(body), 3))
        delete_archive(world, batch_id)
        recovery.note_archive_gone(world.engine, batch_id, "")
        world.run("unpack")
        assert world.rows("SELECT state, reason FROM batches") == [
            ("failed", "its archive is gone, and nothing of it is kept")
        ]
        assert "is not in the store" in world.command("dead", "retry", batch_id, code=1).stderr
        world.bucket.client.put_object(**where, Body=body)
        world.command("dead", "retry", batch_id)
        world.finish()
        assert world.snags() == []

    def test_a_broken_archive_is_read_again(self, world: World) -> None:
        """It was perhaps not to be read as it was: compressed, or its reader crashed."""
        batch_id = world.plant_batch(1, NAMES)
        where = {"Bucket": world.bucket.name, "Key": archive_key(batch_id)}
        whole = world.bucket.client.get_object(**where)["Body"].read()
        world.bucket.client.put_object(**where, Body=gzip.compress(whole))
        world.sql("UPDATE batches SET sha256 = NULL, size = NULL")
        world.finish()
        ((state, flags),) = world.rows("SELECT state, flags FROM batches")
        assert (state, flags[0]) == ("complete", "archive: is gzip-compressed; only plain tar is taken")
        world.command("dead", "retry", batch_id)

        def allowed() -> None:
            read = reader.read
            reader.read = lambda stream, size, compressed: read(stream, size, compressed=True)

        world.run("unpack", mutant=allowed)
        world.finish()
        assert world.rows("SELECT state, flags FROM batches") == [("complete", [])]
        assert world.rows("SELECT DISTINCT state FROM audio_files") == [("done",)]

    def test_killed_before_each_of_its_effects(self, world: World) -> None:
        place = 0
        while True:
            place += 1
            world.reset()
            dead_batch(world)
            killed, _ = world.run("retry", kill_before=place)
            world.run("retry")
            world.finish()
            assert world.snags() == [], f"killed before effect {place}"
            if not killed:
                break
        assert place > 4


class TestLateDeletion:
    """A worker that is late deletes the object of a dead recording: never that of one that was retried and done."""

    @pytest.fixture(autouse=True)
    def no_media(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transcode, "decode", windows(fake_decode))

    @pytest.fixture
    def slot(self, world: World) -> Iterator[gpu_worker.Slot]:
        """A slot on h1, whose batch another host has finished meanwhile: the recording is dead there."""
        world.plant_batch(1, ["b.mp3"])
        world.run("unpack")
        settings, stop = world.load(GpuSettings), Stop()
        here = open_host(settings, stop)
        held, inbox = open_inbox(here, "gpu")
        yield gpu_worker.Slot(here, inbox, MODELS, settings, stop)
        held.release()

    def retry_and_finish(self, world: World) -> None:
        world.sql("UPDATE batches SET host = NULL")  # h1 was forgotten
        world.command("dead", "retry", "1")
        world.finish(hosts=["h2"])

    def test_that_of_its_own_upload(self, world: World, slot: gpu_worker.Slot, monkeypatch: pytest.MonkeyPatch) -> None:
        finish = ledger.finish

        def finishing(engine: Any, audio_id: int, *rest: Any) -> Settled:
            if not any(key.startswith("processed/") for key in world.objects()):
                pytest.fail("nothing was uploaded")
            ledger.bury(engine, audio_id, "h1", "given up by another process")
            settled = finish(engine, audio_id, *rest)
            monkeypatch.setattr(ledger, "finish", finish)
            self.retry_and_finish(world)
            slot.stop.event.set()
            return settled

        monkeypatch.setattr(ledger, "finish", finishing)
        slot.run()
        world.finish()
        assert world.snags() == []

    def test_that_of_an_earlier_attempt(
        self, world: World, slot: gpu_worker.Slot, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bury = ledger.bury

        def burying(*arguments: Any) -> Settled:
            settled = bury(*arguments)
            self.retry_and_finish(world)
            slot.stop.event.set()
            return settled

        def transcribe(samples: Any) -> Any:
            if samples == b"b.mp3":
                raise Permanent("the model does not like it")
            return lab.fake_transcribe(samples)

        slot.models = gpu_worker.Models(transcribe, lab.fake_classify)
        monkeypatch.setattr(ledger, "bury", burying)
        slot.run()
        monkeypatch.undo()
        world.finish()
        assert world.snags() == []

    def test_while_it_deletes_nobody_retries(self, world: World) -> None:
        _, audio_id = dead_batch(world)
        orphan = processed_key(world.rows("SELECT date::text FROM audio_files")[0][0], int(audio_id))
        world.bucket.client.put_object(Bucket=world.bucket.name, Key=orphan, Body=b"of an attempt that died")
        batch_id = world.rows("SELECT batch_id FROM batches")[0][0]
        answers: list[int] = []
        retrying = threading.Thread(target=lambda: answers.append(ledger.retry(world.engine, batch_id)))
        with ledger.holding_dead(world.engine, int(audio_id)) as dead:
            assert dead
            retrying.start()
            eventually(lambda: waits_for_lock(world))
            assert not answers
            s3_utils.delete_opus(orphan, bucket=world.bucket)
        retrying.join()
        assert answers == [1]
        with ledger.holding_dead(world.engine, int(audio_id)) as dead:
            assert not dead


def waits_for_lock(world: World) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(world.rows(query)[0][0])


class TestPayloads:
    def test_they_are_moved_back_as_they_are(self, world: World) -> None:
        late = world.plant_batch(1, NAMES)
        unpack = world.client.lpop("unpack").replace("{", '{"note":  "café", ')
        opus = f"/data/scratch/{late}/{'0' * 16}.opus"
        transcribe = TranscribeJob(batch_id=late, opus_path=opus, original_filename="a.mp3").payload()
        world.client.rpush("dead", unpack, transcribe, unpack)
        found = {letter["kind"]: letter for letter in listed(world)}
        assert set(found) == {"payload"}
        names = [letter["name"] for letter in listed(world)]
        assert len(names) == 2
        shown = [json.loads(world.command("dead", "show", name, "--json").stdout) for name in names]
        assert [(view["payload"], view["list"]) for view in shown] == [(transcribe, "transcribe"), (unpack, "unpack")]
        world.command("dead", "retry", *names)
        assert world.client.lrange("unpack", 0, -1) == [unpack]
        assert world.client.lrange("transcribe", 0, -1) == [transcribe]
        assert world.client.llen("dead") == 0
        world.client.delete("transcribe")
        world.finish()
        assert world.snags() == []

    def test_what_is_no_job_can_only_be_dropped(self, world: World) -> None:
        world.client.rpush("dead", b"\xff\x00", b'{"opus_path": "/etc/passwd"}')
        names = [letter["name"] for letter in listed(world)]
        assert world.command("dead", "retry", *names, code=1).stderr.count("no job") == 2
        assert world.client.llen("dead") == 2
        assert world.command("dead", "drop", *names).stdout.count("removed") == 2
        assert world.client.llen("dead") == 0
        assert "not an audio_id" in world.command("dead", "drop", names[0], code=1).stderr


class TestDrop:
    def test_a_recording(self, world: World) -> None:
        _, audio_id = dead_batch(world)
        for _ in range(2):
            assert "accepted as dead" in world.command("dead", "drop", audio_id).stdout
        assert listed(world) == []
        (letter,) = listed(world, "--all")
        assert letter["name"] == audio_id
        assert letter["dropped_at"]
        assert "(dropped)" in world.command("dead", "list", "--all").stdout
        assert world.rows("SELECT state, reason FROM audio_files WHERE member = 'b.mp3'") == [
            ("dead", "the model does not like it")
        ]

    def test_a_batch_with_its_recordings(self, world: World) -> None:
        batch_id = world.plant_batch(1, ["x.txt", *NAMES])
        truncate_archive(world, batch_id)
        world.finish()
        assert len(listed(world)) == 2 + len([name for name in NAMES if name in str(listed(world))])
        first = world.command("dead", "drop", batch_id).stdout
        assert "accepted as dead" in first
        assert listed(world) == []
        assert world.command("dead", "drop", batch_id).stdout == first

    def test_what_is_not_dead(self, world: World) -> None:
        batch_id = world.plant_batch(1, NAMES)
        world.finish()
        result = world.command("dead", "drop", "1", batch_id, "77", code=1)
        assert "1: it is done, not dead" in result.stderr
        assert "it is complete, and nothing in it is dead" in result.stderr
        assert "77: no recording has this audio_id" in result.stderr
        assert world.rows("SELECT count(*) FROM audio_files WHERE dropped_at IS NOT NULL") == [(0,)]
        assert world.rows("SELECT dropped_at FROM batches") == [(None,)]


def retry_all(world: World, host: str, effects: Effects) -> None:
    """Retry every dead letter, as `lab-audio dead retry` does."""
    engine = ledger.open_ledger(world.load(GpuSettings))
    client = queues.open_queues(world.load(GpuSettings))
    stores = Stores(engine, client, world.workers_bucket)
    names = [str(row[0]) for row in world.rows("SELECT audio_id FROM audio_files WHERE state IN ('dead', 'pending')")]
    effects.watch(engine, world.workers_bucket, world.directory)
    for _, outcome in dead_letters.retry(stores, names):
        assert isinstance(outcome, str), outcome


lab.ROLES["retry"] = retry_all
