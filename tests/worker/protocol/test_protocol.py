"""What each step does when something is amiss: bad recordings, sick models, lost scratch, foreign and doubled jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest

from lab_audio import ledger, queues, s3_utils, source
from lab_audio.config import GpuSettings, TransferSettings, UnpackSettings
from lab_audio.contracts import item_of, opus_path
from lab_audio.errors import ConfigError, Fatal, Permanent, Retryable
from lab_audio.jobs import TranscribeJob
from lab_audio.media import sandbox, transcode
from lab_audio.workers import gpu_worker, transfer_sounds
from lab_audio.workers.host import open_host, open_inbox
from lab_audio.workers.loop import Stop

from world import (
    MODELS,
    ROOM,
    Idle,
    World,
    fake_classify,
    fake_decode,
    fake_transcribe,
    register,
    windows,
    world_client,
)

NAMES = ["a.mp3", "b.mp3", "c.mp3"]


def failing(error: BaseException, on: str, times: int = 99) -> Callable[[], None]:
    """A mutant whose transcriber raises on one recording."""

    def mutant() -> None:
        left = [times]

        def transcribe(samples: bytes) -> Any:
            if samples.decode() == on and left[0]:
                left[0] -= 1
                raise error
            return fake_transcribe(samples)

        import world

        world.MODELS = gpu_worker.Models(transcribe, fake_classify)

    return mutant


def states(world: World) -> dict[str, tuple[str, int]]:
    return {m: (s, a) for m, s, a in world.rows("SELECT member, state, attempts FROM audio_files")}


def test_poison_is_set_aside_and_its_neighbours_are_done(world: World) -> None:
    world.plant_batch(1, ["a.mp3", "poison.mp3", "z.mp3"])
    world.finish()
    assert world.snags() == []
    found = states(world)
    assert found["poison.mp3"] == ("dead", 5)
    assert max(found["a.mp3"][1], found["z.mp3"][1]) <= 2
    assert "5 attempts" in world.rows("SELECT reason FROM audio_files WHERE state = 'dead'")[0][0]


def test_what_the_models_refuse_is_set_aside_at_once(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.finish(mutant=failing(Permanent("too long"), "b.mp3"))
    assert states(world) == {"a.mp3": ("done", 1), "b.mp3": ("dead", 1), "c.mp3": ("done", 1)}
    assert world.rows("SELECT reason FROM audio_files WHERE state = 'dead'") == [("too long",)]
    assert world.rows("SELECT state, host FROM batches") == [("complete", None)]
    assert batch_id in str(world.rows("SELECT batch_id FROM batches"))


def test_an_unknown_error_sends_the_item_to_the_tail_and_is_kept(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.finish(mutant=failing(ValueError("odd"), "a.mp3", times=2))
    assert world.snags() == []
    assert states(world)["a.mp3"] == ("done", 3)
    world.reset()
    world.plant_batch(1, NAMES)
    world.finish(mutant=failing(ValueError("odd"), "a.mp3"))
    reasons = world.rows("SELECT reason FROM audio_files WHERE state = 'dead'")
    assert reasons == [("given up after 5 attempts: ValueError: odd",)]


def test_a_sick_process_blames_no_recording(world: World) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack")
    with pytest.raises(AssertionError, match="CUDA is gone"):
        world.run("gpu", mutant=failing(Fatal("CUDA is gone"), "a.mp3"))
    assert set(states(world).values()) == {("pending", 0)}
    jobs = [json.loads(job)["original_filename"] for job in world.client.lrange("transcribe:h1", 0, -1)]
    assert jobs == NAMES
    world.finish()
    assert world.snags() == []
    assert set(states(world).values()) == {("done", 1)}


def test_lost_scratch_returns_the_batch_uncounted(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack")
    shutil.rmtree(world.scratch("h1") / batch_id)
    world.run("gpu")
    assert world.rows("SELECT state, host FROM batches") == [("uploaded", None)]
    assert world.client.lrange("unpack", 0, -1) == [world.job(batch_id, 3)]
    assert set(states(world).values()) == {("pending", 0)}
    world.finish()
    assert world.snags() == []


def test_a_result_on_disk_is_not_made_again(world: World) -> None:
    def dying() -> None:
        s3_utils.upload_opus = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)

    world.plant_batch(1, NAMES)
    world.run("unpack")
    world.run("gpu", mutant=dying)
    assert list(world.scratch("h1").glob("*/*.json"))
    world.finish(mutant=failing(Fatal("the models were asked again"), "a.mp3"))
    assert world.snags() == []


def test_doubled_and_foreign_jobs_cost_only_time(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.client.rpush("unpack", world.job(batch_id, 3))
    world.run("unpack")
    for job in world.client.lrange("transcribe:h1", 0, -1):
        world.client.rpush("transcribe:h1", job)
        world.client.rpush("transcribe:h2", job)
    world.run("gpu", "h2")
    assert world.client.llen("transcribe:h2") == 0
    world.finish(hosts=("h1", "h2"))
    assert world.snags() == []
    assert set(states(world).values()) == {("done", 1)}


def test_the_plain_list_is_routed(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack")
    jobs = world.client.lrange("transcribe:h1", 0, -1)
    world.client.delete("transcribe:h1")
    unknown = TranscribeJob(
        batch_id=batch_id, opus_path=str(opus_path(world.scratch("h1"), batch_id, item_of("x"))), original_filename="x"
    ).payload()
    world.client.rpush("transcribe", *jobs, "no json", unknown)
    here = open_host(world.load(GpuSettings, "h2"), Stop())
    inbox = queues.Inbox(world.client, "transcribe", "processing:h2:route:0")
    while job := inbox.claim(0):
        gpu_worker.route_job(here, inbox, job)
    assert world.client.lrange("dead", 0, -1) == ["no json", unknown]
    assert sorted(world.client.lrange("transcribe:h1", 0, -1)) == sorted(jobs)
    world.client.delete("dead")
    world.finish()
    assert world.snags() == []


def test_publishing_again_doubles_nothing(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    world.run("unpack")
    jobs = world.client.lrange("transcribe:h1", 0, -1)
    world.client.lmove("transcribe:h1", "processing:h1:gpu:3", "LEFT", "RIGHT")
    queues.publish(world.client, "h1", batch_id, 3, 0, jobs)
    assert world.client.lrange("transcribe:h1", 0, -1) == jobs[1:]
    world.client.delete("transcribe:h1")
    queues.publish(world.client, "h1", batch_id, 3, 0, jobs)
    assert world.client.lrange("transcribe:h1", 0, -1) == jobs[1:]
    assert world.client.mget([f"batch:{batch_id}:{f}" for f in ("total", "processed", "s3_key")]) == [
        "3",
        "0",
        f"archives/{batch_id}.tar",
    ]


def test_the_counter_never_falls_and_tells_when_all_is_processed(world: World) -> None:
    inbox = queues.Inbox(world.client, "transcribe:h1", "processing:h1:gpu:0")
    batch_id = "20260101-000000-000001"
    assert inbox.ack("x", batch_id, 1) is False
    assert world.client.exists(f"batch:{batch_id}:processed") == 0
    queues.publish(world.client, "h1", batch_id, 2, 0, [])
    assert inbox.ack("x", batch_id, 1) is False
    assert inbox.ack("x", batch_id, 0) is False
    assert world.client.get(f"batch:{batch_id}:processed") == "1"
    assert inbox.ack("x", batch_id, 2) is True


def test_a_job_whose_delivery_was_lost_is_found_again(world: World) -> None:
    world.client.rpush("transcribe:h1", "one", "two")
    inbox = queues.Inbox(world.client, "transcribe:h1", "processing:h1:gpu:0")
    assert inbox.claim(0) == "one"
    other = queues.Inbox(world.client, "transcribe:h1", "processing:h1:gpu:0")
    assert [other.claim(0), other.claim(0), other.claim(0)] == ["one", "two", None]


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_paused_host_takes_nothing_and_finishes_what_it_has(world: World, everywhere: bool) -> None:
    world.plant_batch(1, NAMES)
    world.run("unpack")
    second = world.plant_batch(2, NAMES)
    assert ledger.pause(world.engine, None if everywhere else "h1", paused=True)
    here = open_host(world.load(gpu_worker.GpuSettings), Stop())
    ledger.beat(here.engine, "h1", gpu=True)
    slot, inbox = open_inbox(here, "unpack")
    from lab_audio.workers import unpack_worker

    job = inbox.claim(0)
    assert job is not None
    assert unpack_worker.handle(here, inbox, job, unpack_worker.Encoding(24_000, 1), Stop())
    slot.release()
    assert world.client.lrange("unpack", 0, -1) == [world.job(second, 3)]
    world.run("gpu")
    assert len(world.rows("SELECT 1 FROM audio_files WHERE state = 'done'")) == 3
    assert ledger.pause(world.engine, None, paused=False)
    world.finish()
    assert world.snags() == []
    assert not ledger.pause(world.engine, "nobody", paused=True)


def test_unpack_waits_for_a_gpu_worker(world: World) -> None:
    batch_id = world.plant_batch(1, NAMES)
    register(world.engine, "h1", "disk")
    ledger.adopt(world.engine, batch_id, "{}", ledger.Archive(None, None, None))
    refused = ledger.take(world.engine, batch_id, "h1", ROOM)
    assert isinstance(refused, ledger.Refused)
    assert refused.job == "head"
    ledger.beat(world.engine, "h1", gpu=True)
    assert isinstance(ledger.take(world.engine, batch_id, "h1", ROOM), ledger.Taken)


def test_two_disks_under_one_name(world: World) -> None:
    register(world.engine, "h1", "disk one")
    ledger.beat(world.engine, "h1", gpu=False)
    register(world.engine, "h1", "disk one")
    with pytest.raises(Fatal, match="LAB_HOST"):
        register(world.engine, "h1", "disk two")


def test_a_zombies_upload_of_a_dead_item_goes_again(world: World) -> None:
    world.plant_batch(1, ["a.mp3", "b.mp3"])
    world.run("unpack")

    def buries_meanwhile() -> None:
        upload = gpu_worker.s3_utils.upload_opus

        def upload_opus(path: Any, audio_id: int, date: str, **more: Any) -> str:
            ledger.bury(world.engine, audio_id, "h1", "given up by another process")
            return upload(path, audio_id, date, **more)

        gpu_worker.s3_utils.upload_opus = upload_opus

    world.engine.dispose()
    world.finish(mutant=buries_meanwhile)
    assert {state for state, _ in states(world).values()} == {"dead"}
    assert {key for key in world.objects() if key.startswith("processed/")} == set()


def test_archives_go_with_their_batch_if_told_so_but_not_one_with_a_dead_recording(world: World) -> None:
    world.environment["ARCHIVE_AFTER_BATCH"] = "delete"
    world.plant_batch(1, NAMES)
    kept = world.plant_batch(2, [*NAMES, "notes.txt"])
    world.finish()
    assert {key for key in world.objects() if key.startswith("archives/")} == {f"archives/{kept}.tar"}
    assert world.rows("SELECT archive_gone_at IS NOT NULL FROM batches ORDER BY batch_id") == [(True,), (False,)]


def run_transfer(world: World, **settings: str) -> None:
    transfer_sounds.run(world.load(TransferSettings, **settings), Stop(), once=True)


def listing(world: World) -> list[str]:
    root = world.directory / "source"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("answers", [True, False])
def test_the_ledger_knows_when_the_source_was_last_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    class OneLook(Stop):
        def wait(self, seconds: float) -> bool:
            self.event.set()
            return True

    stop = OneLook()
    job = f"source {world.directory / 'source'}"
    world.sql("DELETE FROM runs WHERE job = :job", job=job)
    run_transfer(world)
    assert job not in ledger.last_runs(world.engine)  # who comes once is not waited for

    def away(*_: object) -> None:
        stop.event.set()
        raise Retryable("the source is away")

    if not answers:
        monkeypatch.setattr(source, "settled", away)
    transfer_sounds.run(world.load(TransferSettings), stop)
    assert (job in ledger.last_runs(world.engine)) == answers


@pytest.mark.parametrize("fate", ["keep", "move", "delete"])
def test_the_fate_of_source_files(world: World, fate: str) -> None:
    world.plant_files(NAMES)
    run_transfer(world, SOURCE_FATE=fate, BATCH_FILES="2")
    assert listing(world) == {"keep": NAMES, "move": [f".transferred/{name}" for name in NAMES], "delete": []}[fate]
    assert world.client.llen("unpack") == 2
    run_transfer(world, SOURCE_FATE=fate)
    assert world.client.llen("unpack") == 2
    world.finish()
    assert world.snags() == []


def test_a_changed_source_file_keeps_its_life(world: World) -> None:
    world.plant_files(NAMES)
    run_transfer(world, SOURCE_FATE="keep")
    assert world.rows("SELECT count(*) FROM source_files WHERE fate_at IS NULL") == [(0,)]
    with world.engine.begin() as connection:
        from sqlalchemy import text

        connection.execute(text("UPDATE source_files SET fate_at = NULL"))
    (world.directory / "source" / "b.mp3").write_text("another recording")
    run_transfer(world, SOURCE_FATE="delete")
    assert listing(world) == []  # the new recording was transferred first, then deleted
    assert world.rows("SELECT count(*) FROM source_files WHERE struck IS NULL") == [(4,)]


def test_files_that_vanish_or_change_before_upload_are_struck(world: World) -> None:
    world.plant_files(NAMES)
    _, effects = world.run("transfer", kill_before=10**6)
    world.reset()
    world.plant_files(NAMES)
    minted = next(n for n, effect in enumerate(effects, 1) if effect.startswith("sql INSERT INTO source_files"))
    world.run("transfer", kill_before=minted + 2)
    assert world.rows("SELECT state FROM batches") == [("minted",)]
    (world.directory / "source" / "a.mp3").unlink()
    (world.directory / "source" / "b.mp3").write_text("something else")
    run_transfer(world)
    struck = dict(world.rows("SELECT convert_from(path, 'UTF8'), struck FROM source_files WHERE struck IS NOT NULL"))
    assert struck == {"a.mp3": "vanished before upload", "b.mp3": "changed before upload"}
    world.finish()
    members = [
        m for (m,) in world.rows("SELECT member FROM audio_files WHERE state = 'done' ORDER BY batch_id, member")
    ]
    assert sorted(members) == ["b.mp3", "c.mp3"]


def test_a_stored_archive_that_was_never_recorded_is_taken_as_it_is(world: World) -> None:
    world.plant_files(NAMES)
    _, effects = world.run("transfer")
    world.reset()
    world.plant_files(NAMES)
    world.run("transfer", kill_before=effects.index("s3 PUT") + 2)
    assert world.rows("SELECT state FROM batches") == [("minted",)]
    assert len(world.objects()) == 1
    (world.directory / "source" / "a.mp3").write_text("something else")
    run_transfer(world)
    world.finish()
    texts = sorted(text for (text,) in world.rows("SELECT text FROM transcripts"))
    assert texts == ["a.mp3", "b.mp3", "c.mp3", "something else"]


def test_a_tar_at_the_source_is_taken_as_it_is(world: World) -> None:
    world.plant_files(NAMES)
    run_transfer(world)
    (key,) = world.objects()
    body = world.bucket.client.get_object(Bucket=world.bucket.name, Key=key)["Body"].read()
    world.reset()
    (world.directory / "source" / "old.tar").write_bytes(body)
    run_transfer(world)
    (key,) = world.objects()
    assert world.bucket.client.get_object(Bucket=world.bucket.name, Key=key)["Body"].read() == body
    world.finish()
    assert {name for (name,) in world.rows("SELECT member FROM audio_files WHERE state = 'done'")} == set(NAMES)


def test_a_slot_serves_until_its_list_is_empty(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More recordings than are held ahead, in groups."""
    world.plant_batch(1, [f"{n:03}.mp3" for n in range(60)])
    world.run("unpack")
    settings = world.load(GpuSettings, UPLOAD_THREADS="4", DECODE_THREADS="2")
    here = open_host(settings, Stop())
    slot, inbox = open_inbox(here, "gpu")
    monkeypatch.setattr(gpu_worker, "IDLE_SECONDS", 0)
    monkeypatch.setattr(transcode, "decode", windows(fake_decode))
    gpu_worker.Slot(here, inbox, MODELS, settings, Idle(world_client(world), "h1")).run()
    slot.release()
    world.run("unpack")
    assert world.snags() == []


def test_without_a_sandbox_a_worker_starts_only_if_it_may_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "problem", lambda: "bwrap is missing: apt install bubblewrap")
    with pytest.raises(ConfigError, match=r"apt install bubblewrap .*ALLOW_UNSANDBOXED"):
        open_host(world.load(GpuSettings), Stop())
    assert world.rows("SELECT host FROM hosts") == []
    open_host(world.load(GpuSettings, ALLOW_UNSANDBOXED="true"), Stop())
    assert json.loads(world.command("status", "--json").stdout)["hosts"][0]["unsandboxed"]
    assert "no sandbox" in world.command("status").stdout
    monkeypatch.undo()
    open_host(world.load(UnpackSettings), Stop())
    assert json.loads(world.command("status", "--json").stdout)["hosts"][0]["unsandboxed"] == ["gpu"]
    open_host(world.load(GpuSettings), Stop())
    assert "no sandbox" not in world.command("status").stdout
