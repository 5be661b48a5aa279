from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time

import pytest
from test_sick_workers import gpu_process, states, unpacked
from typer.testing import CliRunner

from lab_audio import ledger, s3_utils, scratch
from lab_audio.cli import app
from lab_audio.contracts import archive_key
from lab_audio.errors import Fatal
from lab_audio.media import transcode
from lab_audio.operations import reconcile as reconciling
from lab_audio.operations import restore as restoring
from lab_audio.operations import retention
from lab_audio.workers import unpack_worker
from lab_audio.workers.recognition import Models

from world import POISON, World, fake_classify, fake_decode, fake_transcribe

TABLES = "TRUNCATE classifications, transcripts, source_files, audio_files, batches, hosts RESTART IDENTITY"


def stores(world):
    return reconciling.Stores(world.engine, world.client, world.bucket)


def raw(world, *args, **env):
    where = {"LAB_HOST": "h1", "SCRATCH_ROOT": str(world.scratch("h1"))}
    return CliRunner().invoke(app, args, env={**world.environment, **where, **env})


def test_1_restore_takes_an_unverified_archive_and_the_source_is_deleted(world: World):
    world.environment["SOURCE_FATE"] = "delete"
    world.plant_files(["a.mp3"])
    _, effects = world.run("transfer")
    put = [n for n, e in enumerate(effects, 1) if e == "s3 PUT"][0]
    world.reset()
    world.plant_files(["a.mp3"])
    sig, eff = world.run("transfer", kill_before=put + 1)
    print(sig, eff[-3:])
    (key,) = world.objects()
    got = world.bucket.client.get_object(Bucket=world.bucket.name, Key=key)
    body = bytearray(got["Body"].read())
    at = body.rindex(b"a.mp3")
    body[at] ^= 1  # the bytes that the store received were damaged
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=bytes(body), Metadata=got["Metadata"])
    source = world.directory / "source" / "a.mp3"
    assert source.exists()
    world.sql(TABLES)  # the dump is older than the mint
    world.engine.dispose()
    print(world.command("reconcile", "--after-restore", "--json").stdout)
    world.engine.dispose()
    world.run("transfer")
    world.run("unpack")
    print(world.rows("SELECT batch_id, state, reason FROM batches"), "source there:", source.exists())
    assert source.exists(), "the only good copy is deleted"


def test_2_listing_lags(world: World, monkeypatch):
    world.plant_batch(1, ["a.mp3", "b.mp3"])
    world.finish()
    b = dict(world.rows("SELECT member, s3_opus_path FROM audio_files"))["b.mp3"]
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=b)  # b had not been done
    world.sql(TABLES)
    world.client.flushdb()
    world.engine.dispose()
    with monkeypatch.context() as m:
        m.setattr(s3_utils, "archives", lambda bucket: iter(()))  # a container listing that lags
        print(restoring.restore(stores(world)))
    reconciling.reconcile(stores(world), 600)
    world.finish()
    print(world.rows("SELECT batch_id, state, flags, archive_gone_at FROM batches"))
    print(list(retention.archives(stores(world), 7, dry_run=False)))
    print(world.objects(), world.rows("SELECT member, state FROM audio_files"))
    assert archive_key(world.BATCH(1)) in world.objects(), (
        "the archive that holds b is deleted on the day of the restore"
    )


def test_3_decode_kills(world: World):
    unpacked(world, ["a.mp3", "b.mp3", "poison.mp3"])

    def patch():
        def decode(opus, *, timeout=None):
            data = fake_decode(opus)
            if data.startswith(POISON):
                os.kill(os.getpid(), signal.SIGKILL)
            return data

        transcode.decode = decode

    codes = [gpu_process(world, patch=patch, CLASSIFY_BATCH="8") for _ in range(9)]
    print(codes, states(world))
    assert states(world)["poison.mp3"][0] == "dead"


def test_4_odd_key(world: World):
    world.bucket.client.put_object(Bucket=world.bucket.name, Key="processed/2025-02-30/7.opus", Body=b"x")
    r = raw(world, "reconcile")
    print(r.exit_code, repr(r.exception)[:200])
    world.engine.dispose()
    r2 = raw(world, "reconcile", "--after-restore")
    print(r2.exit_code, repr(r2.exception)[:200])
    assert isinstance(r.exception, SystemExit) and isinstance(r2.exception, SystemExit)


def test_5_dry_run(world: World):
    world.plant_batch(1, ["a.mp3"])
    world.finish()
    world.engine.dispose()
    dry = json.loads(world.command("reconcile", "--after-restore", "--dry-run", "--json").stdout)
    world.engine.dispose()
    import gc

    gc.collect()
    time.sleep(0.5)
    wet = json.loads(world.command("reconcile", "--after-restore", "--json").stdout)
    print(dry["adopted_archives"], wet["adopted_archives"])
    assert dry["adopted_archives"] == wet["adopted_archives"]


def test_5b_dry_run_says_no_batches_without_archive(world: World):
    world.plant_batch(1, ["a.mp3"])
    world.finish()
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(world.BATCH(1)))
    world.sql(TABLES)
    world.engine.dispose()
    dry = json.loads(world.command("reconcile", "--after-restore", "--dry-run", "--json").stdout)
    world.engine.dispose()
    import gc

    gc.collect()
    time.sleep(0.5)
    wet = json.loads(world.command("reconcile", "--after-restore", "--json").stdout)
    print(dry["batches_without_archive"], wet["batches_without_archive"])
    assert dry["batches_without_archive"] == wet["batches_without_archive"]


def test_5c_dry_run_of_lost_host(world: World):
    world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    world.sql("UPDATE hosts SET seen_at = now() - interval '1 day', doubted_at = now() - interval '1 hour'")
    dry = json.loads(world.command("reconcile", "--quick", "--dry-run", "--json").stdout)
    wet = json.loads(world.command("reconcile", "--quick", "--json").stdout)
    print({k: (dry[k], wet[k]) for k in wet if dry[k] != wet[k]})
    assert dry == wet


@pytest.mark.parametrize(
    "args",
    [
        ("fetch-archive", "20260101-000000-000001", "."),
        ("pause", "\udcff"),
        ("hosts", "forget", "\udcff"),
        ("dead", "show", "\udcff"),
        ("dead", "retry", "\udcff"),
    ],
)
def test_6_cli(world: World, args):
    world.plant_batch(1, ["a.mp3"])
    r = raw(world, *args)
    print(r.exit_code, repr(r.exception)[:200], r.output[-300:].encode("utf-8", "backslashreplace"))
    assert isinstance(r.exception, SystemExit)


def test_7_full_and_refused(world: World):
    unpacked(world, ["a.mp3", "b.mp3"])

    def patch():
        write = scratch.write_atomic

        def full(path, data):
            if path.suffix == ".json":
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, data)

        scratch.write_atomic = full

        def upload(*a, **k):
            raise Fatal("PutObject: 403 EntityTooLarge; see whether a quota of the store is used up")

        s3_utils.upload_opus = upload

    out = []
    for _ in range(14):
        code = gpu_process(world, patch=patch)
        out.append((code, states(world)))
    for o in out:
        print(o)
    print((world.directory / "gpu.log").read_text()[-1800:])
    print(world.rows("SELECT member, state, reason FROM audio_files"))
    assert all(s == "pending" for s, _ in states(world).values())


def test_8_dead_object_archive_gone(world: World):
    b = world.plant_batch(1, ["a.mp3"])
    world.finish()
    world.sql("UPDATE audio_files SET state='dead', reason='x', s3_opus_path=NULL, dropped_at=now()")
    world.sql("UPDATE batches SET complete_at = now() - interval '8 days'")
    print(world.command("retention").stdout)
    r = raw(world, "reconcile")
    print(r.exit_code, r.output, world.objects())
    assert r.exit_code == 1 or not world.objects()


def test_8b_failed_batch_pending_object(world: World):
    b = world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    _, eff = world.run("gpu") if False else (None, None)
    (id_, date) = world.rows("SELECT audio_id, date::text FROM audio_files")[0]
    key = f"processed/{date}/{id_}.opus"  # PUT, then the host dies before FINISH
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=b"x")
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=archive_key(b))
    world.command("hosts", "forget", "h1")
    world.run("unpack", "h2")
    print(world.rows("SELECT state, reason FROM batches"), world.rows("SELECT state FROM audio_files"))
    print(world.command("dead", "drop", b).stdout)
    r = raw(world, "reconcile")
    print(r.exit_code, r.output, world.objects())
    assert r.exit_code == 1 or not world.objects()


def test_9_stall(tmp_path, monkeypatch):
    from lab_audio.media import canary

    monkeypatch.setattr(unpack_worker, "encode_seconds", lambda mp3: 2.0)
    run, stalled = transcode._run, []

    def once(argv, source, sink, timeout):
        def slow(block):
            if not stalled:
                stalled.append(1)
                time.sleep(3)  # the disk hangs once
            return sink(block)

        return run(argv, source, slow, timeout)

    monkeypatch.setattr(transcode, "_run", once)
    row = unpack_worker.encode(ledger.NewItem("a.mp3", "0" * 16, "a.mp3"), canary.MP3.open("rb"), tmp_path, 24000)
    print(row)
    assert row.reason is None


def test_10_new_disk_leaves_keys(world: World):
    world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    b = world.BATCH(1)
    total = world.client.get(f"batch:{b}:total")
    world.run("gpu")
    world.sql("UPDATE batches SET host='h1'")  # complete, not tidied when the disk died
    world.client.mset({f"batch:{b}:total": 1, f"batch:{b}:processed": 1, f"batch:{b}:s3_key": archive_key(b)})
    shutil.rmtree(world.scratch("h1"))
    world.sql("UPDATE hosts SET seen_at = now() - interval '5 min'")
    world.run("unpack")
    world.run("gpu")
    world.run("unpack")
    print(world.rows("SELECT state, host FROM batches"), world.client.keys("*"))
    assert not world.client.keys("*")


def test_11_missing_opus_counts(world: World):
    world.plant_batch(1, ["a.mp3", "b.mp3"])
    out = []
    for _ in range(7):
        world.run("unpack")
        folder = world.scratch("h1") / world.BATCH(1)

        def classify(texts):
            if texts != ["canary"]:
                shutil.rmtree(folder, ignore_errors=True)  # TIDY, after a false `hosts forget`
            return fake_classify(texts)

        code = gpu_process(world, Models(fake_transcribe, classify))
        out.append((code, states(world)))
    for o in out:
        print(o)
    print((world.directory / "gpu.log").read_text()[-1800:])
    print(world.rows("SELECT member, state, reason FROM audio_files"))
    assert all(s != "dead" for s, _ in states(world).values())


def test_13_archive_gone_is_for_ever(world: World):
    b = world.plant_batch(1, ["a.mp3"])
    key = archive_key(b)
    world.run("reconcile")
    unpack_worker_known = world.sql(
        "INSERT INTO batches (batch_id, state, job, uploaded_at) VALUES (:b,'uploaded',:j,now()) ON CONFLICT DO NOTHING",
        b=b,
        j=world.job(b, 1),
    )
    body = world.bucket.client.get_object(Bucket=world.bucket.name, Key=key)["Body"].read()
    world.bucket.client.delete_object(Bucket=world.bucket.name, Key=key)
    world.engine.dispose()
    print(world.command("reconcile", "--after-restore").stdout)
    world.run("unpack")
    print(world.rows("SELECT state, reason FROM batches"))
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=body)
    r = raw(world, "dead", "retry", b)
    print(r.exit_code, r.output)
    world.engine.dispose()
    raw(world, "reconcile", "--after-restore")
    r = raw(world, "dead", "retry", b)
    print(r.exit_code, r.output)
    assert r.exit_code == 0


def test_12_broken_tar_letter(world: World):
    b = world.plant_batch(1, ["a.mp3"])
    key = archive_key(b)
    body = world.bucket.client.get_object(Bucket=world.bucket.name, Key=key)["Body"].read()
    world.bucket.client.put_object(Bucket=world.bucket.name, Key=key, Body=body[:1024])
    world.finish()
    print(world.command("dead", "list").stdout)
    r = raw(world, "dead", "retry", b)
    print(r.exit_code, r.output)
