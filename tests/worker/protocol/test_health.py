"""`lab-audio check-health`: what is broken is named in one line, with what mends it, and nothing else is blamed."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from sqlalchemy import Engine

from lab_audio import ledger, s3_utils, scratch
from lab_audio.contracts import archive_key
from lab_audio.operations import health
from lab_audio.release import release

from models import POLICIES
from world import World, eventually, register

ROOT = Path(__file__).parents[3]


class Host:
    """h1, with models on its disk; what `check-health` says there."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.models = directory / "models"
        for path in ("whisperx/model.bin", "gemma/base/config.json", "gemma/base/model.safetensors"):
            file = self.models / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(path)
        (self.models / "gemma" / "cope").mkdir()
        (self.models / "gemma" / "cope" / "adapter_config.json").write_text("{}")
        world.run("unpack")
        ledger.note_run(world.engine, "reconcile")
        self.root = world.scratch("h1")

    def check(self, *options: str, code: int, **settings: str) -> Result:
        here = {"MODELS_ROOT": str(self.models), "POLICIES_DIR": str(POLICIES), "DEVICES": "cpu"}
        return self.world.command("check-health", *options, code=code, **{**here, **settings})

    def wrong(self, *, code: int, **settings: str) -> dict[str, tuple[str, str, str]]:
        """What is not good: check to state, what and mend."""
        said = json.loads(self.check("--json", code=code, **settings).stdout)
        assert said["state"] == ["good", "warning", "failing"][code]
        found = [one for one in said["checks"] if one["state"] != "good"]
        assert len({one["check"] for one in found}) == len(found), found
        return {one["check"]: (one["state"], one["what"], one["mend"]) for one in found}


@pytest.fixture
def host(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(health, "DEADLINE_SECONDS", 60.0)  # this machine may be busy
    return Host(world, tmp_path)


def test_all_is_good(host: Host) -> None:
    assert host.wrong(code=0) == {}
    lines = host.check(code=0).stdout.splitlines()
    absent = ("workers", "models loaded")  # systemd starts none here, and no GPU worker has run
    names = [check.name for check in health.CHECKS if check.name not in absent]
    assert [line.split("  ")[0].strip() for line in lines[1:]] == names


def test_a_host_without_scratch_is_asked_for_no_part_of_one(host: Host, tmp_path: Path) -> None:
    said = json.loads(host.check("--json", code=0, LAB_HOST="transfer", SCRATCH_ROOT=str(tmp_path / "none")).stdout)
    assert {one["check"] for one in said["checks"]} == {check.name for check in health.CHECKS[:9]}


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("PostgreSQL", "DATABASE_URL", "postgresql://lab:secret@127.0.0.1:1/lab"),
        ("Redis", "REDIS_URL", "redis://default:secret@127.0.0.1:1/0"),
        ("object store", "S3_ENDPOINT", "http://127.0.0.1:1"),
        ("object store", "S3_SECRET_KEY", "secret"),
        ("object store", "S3_BUCKET", "not-there"),
    ],
)
def test_a_store_that_is_away_is_one_failing_line(host: Host, name: str, setting: str, value: str) -> None:
    wrong = host.wrong(code=2, **{setting: value})
    assert [check for check, (state, *_) in wrong.items() if state == "failing"] == [name]
    others = [what for check, (_, what, _) in wrong.items() if check != name]
    assert all(what.startswith("not looked at, for want of") and name in what for what in others)
    assert "secret" not in str(wrong)


@pytest.fixture
def deaf() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_store_that_does_not_answer_is_not_waited_for(host: Host, deaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "DEADLINE_SECONDS", 2.0)
    said = host.check("--json", code=2, REDIS_URL=f"redis://default:secret@127.0.0.1:{deaf}/0").stdout
    wrong = {one["check"]: (one["state"], one["what"]) for one in json.loads(said)["checks"]}
    assert wrong["Redis"] == ("failing", "no answer in 2 s")
    began = time.monotonic()
    told = host.world.command("metrics", S3_ENDPOINT=f"http://127.0.0.1:{deaf}").stdout
    assert 'lab_audio_store_up{store="object store"} 0.0' in told and time.monotonic() - began < 30


def test_settings_that_are_wrong_are_said_as_such(host: Host) -> None:
    assert "REDIS_URL: must be a URL" in host.wrong(code=2, REDIS_URL="nonsense")["settings"][1]
    assert "REDIS_URL: must be a URL" in host.check(code=2, REDIS_URL="nonsense").stdout


def test_tables_of_another_release(host: Host) -> None:
    host.world.sql("UPDATE alembic_version SET version_num = '0005'")
    wrong = host.wrong(code=2)
    host.world.sql("UPDATE alembic_version SET version_num = '0006'")
    assert "run `lab-audio migrate`" in wrong["PostgreSQL"][1]


def test_redis_that_forgets_or_evicts(host: Host) -> None:
    client = host.world.client
    before = {name: client.config_get(name)[name] for name in ("appendonly", "maxmemory-policy", "maxmemory")}
    try:
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert "allkeys-lru" in host.wrong(code=2)["Redis"][1]
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "no")
        assert "forgets everything" in host.wrong(code=1)["Redis"][1]
        client.config_set("appendonly", "yes")
        client.config_set("maxmemory", str(client.info()["used_memory"] * 11 // 10))
        assert host.wrong(code=1)["Redis"][2].startswith("raise maxmemory")
    finally:
        for name, value in before.items():
            client.config_set(name, value)


def test_redis_that_refuses_jobs_is_looked_at_all_the_same(host: Host) -> None:
    client = host.world.client
    client.rpush("dead", "nonsense")
    in_the_way = Path(client.config_get("dir")["dir"]) / client.config_get("dbfilename")["dbfilename"]
    in_the_way.mkdir()
    try:
        client.config_set("save", "3600 1")
        client.bgsave()
        eventually(lambda: client.info()["rdb_last_bgsave_status"] == "err", 30)
        wrong = host.wrong(code=2)
        assert "takes no jobs: MISCONF" in wrong["Redis"][1]
        assert wrong["dead letters"][1] == "set aside: payload 1"
        client.config_set("save", "")
        assert set(host.wrong(code=1)) == {"dead letters"}
        client.replicaof("127.0.0.1", "1")
        assert "takes no jobs: You can't write against" in host.wrong(code=2)["Redis"][1]
    finally:
        client.replicaof("NO", "ONE")
        client.config_set("save", "")
        in_the_way.rmdir()


def test_a_key_that_no_host_has_made_is_no_list(host: Host) -> None:
    for name in (b"transcribe:\xff", "transcribe:[/]", "transcribe:h1:x"):
        host.world.client.rpush(name, "job")
    host.world.client.set("transcribe:h2", "no list")
    assert host.wrong(code=0) == {}
    assert "transcribe:" not in host.world.command("status").stdout
    told = re.findall(r'list_jobs{list="(transcribe:.*)"} (.+)', host.world.command("metrics").stdout)
    assert told == [("transcribe:h1", "0.0")]  # a host's list that is empty, and so not in Redis, is told


def test_redis_that_tells_nothing_of_itself(host: Host) -> None:
    client = host.world.client
    port = client.connection_pool.connection_kwargs["port"]
    client.execute_command("ACL SETUSER worker on >word ~* -@all +@connection +@read +@write -@dangerous")
    try:
        wrong = host.wrong(code=1, REDIS_URL=f"redis://worker:word@127.0.0.1:{port}/0")
        assert wrong["Redis"][2] == "let its user ask for INFO: ACL SETUSER NAME +info"
        client.execute_command("ACL SETUSER worker +info")
        assert host.wrong(code=0, REDIS_URL=f"redis://worker:word@127.0.0.1:{port}/0") == {}
    finally:
        client.execute_command("ACL DELUSER worker")


def test_a_host_that_is_silent_and_one_whose_models_are_not_ready(host: Host) -> None:
    host.world.sql("UPDATE hosts SET seen_at = now() - interval '10 minutes'")
    state, what, mend = host.wrong(code=2)["hosts"]
    assert (state, what) == ("failing", "h1 was last seen 10 min ago")
    assert mend.endswith("docs/runbooks/WorkerSilent.md")
    host.world.sql("UPDATE hosts SET seen_at = now(), gpu_seen_at = NULL")
    assert host.wrong(code=2)["hosts"][1] == "h1: its models were never ready"
    host.world.sql("UPDATE hosts SET gpu_seen_at = now() - interval '10 minutes'")
    assert host.wrong(code=2)["hosts"][1] == "h1: its models were last ready 10 min ago"
    ledger.beat(host.world.engine, "h1", gpu=True)
    assert host.wrong(code=0) == {}


def test_a_lost_host_is_told_until_it_is_forgotten(host: Host) -> None:
    world = host.world
    world.sql("UPDATE hosts SET seen_at = now() - interval '20 minutes', doubted_at = now() - interval '1 minute'")
    world.command("reconcile", "--quick")
    state, what, mend = host.wrong(code=2)["hosts"]
    assert (state, what) == ("failing", "h1 was last seen 20 min ago, and is lost: others do its batches")
    assert "lab-audio hosts forget h1" in mend and mend.endswith("docs/runbooks/WorkerSilent.md")
    silent = re.search(r'host_silent_seconds\{host="h1",what="workers"\} ([0-9.]+)', world.command("metrics").stdout)
    assert silent and float(silent[1]) >= 1200
    assert [one["lost"] for one in json.loads(world.command("status", "--json").stdout)["hosts"]] == [True]
    world.command("hosts", "forget", "h1")
    assert host.wrong(code=1)["hosts"][1] == "no GPU host takes part"
    ledger.beat(world.engine, "h1", gpu=True)
    assert host.wrong(code=0) == {}


def test_what_it_says_of_a_paused_host_mends_it(host: Host) -> None:
    host.world.command("pause", "h1")
    state, what, mend = host.wrong(code=1)["hosts"]
    assert (state, what) == ("warning", "h1 is paused")
    host.world.command(*mend.split()[1:])
    assert host.wrong(code=0) == {}


def test_releases_and_models_that_differ(host: Host) -> None:
    engine = host.world.engine
    with ledger.registering(engine, "h2", "disk", Path("/data/scratch"), kind="gpu", release="0.0.9+old"):
        pass
    ledger.beat(engine, "h2", gpu=True)
    assert "h2 0.0.9+old" in host.wrong(code=1)["hosts"][1]
    with ledger.registering(engine, "h2", "disk", Path("/data/scratch"), kind="gpu", release=release()):
        pass
    installed = health.installed_models(host.models)
    ledger.note_models(engine, "h1", installed)
    ledger.note_models(engine, "h2", {**installed, "whisper": "small"})
    state, what, mend = host.wrong(code=2)["hosts"]
    assert (state, mend) == ("failing", "docs/runbooks/ModelRevisionSkew.md")
    assert "h2: adapter" in what and "whisper small" in what
    ledger.note_models(engine, "h2", installed)
    assert host.wrong(code=0) == {}
    (host.models / "whisperx" / "model.bin").write_text("another one")
    assert host.wrong(code=1)["models loaded"][2] == "systemctl restart gpu-worker"


def test_a_transfer_host_of_another_release(host: Host, tmp_path: Path) -> None:
    engine = host.world.engine
    disk = ledger.disk_of(engine, "h1")
    assert disk is not None
    with ledger.registering(engine, "h1", disk, host.root, kind="unpack", release="0.0.9+old"):
        pass
    found = host.wrong(code=1, LAB_HOST="transfer", SCRATCH_ROOT=str(tmp_path / "none"))
    what = f"releases differ: h1 0.0.9+old, transfer {release()}"
    assert found == {"hosts": ("warning", what, "docs/runbooks/ReleaseSkew.md")}


def test_batches_are_stuck_by_either_rule_with_the_reason(host: Host) -> None:
    world = host.world
    batch_id = world.plant_batch(1, ["a.mp3", "b.mp3"])
    world.run("unpack")
    world.sql("UPDATE batches SET uploaded_at = now() - interval '3 hours', ready_at = now() - interval '1 hour'")
    state, what, mend = host.wrong(code=1)["batches"]
    assert (state, mend.split("; ")[0]) == ("warning", f"lab-audio batch {batch_id}")
    assert what.startswith(f"{batch_id}: not complete after 108")
    assert "it is ready and waits for the GPU worker on h1" in what
    world.sql("UPDATE batches SET ready_at = now() - interval '3 hours'")
    wrong = host.wrong(code=2)
    assert wrong["batches"][1].startswith(f"{batch_id}: no progress for 108")
    assert wrong["lists"][:2] == ("warning", "the oldest job on transcribe:h1 has waited for 3 h")
    world.sql("UPDATE audio_files SET settled_at = now(), state = 'dead', dropped_at = now() WHERE member = 'b.mp3'")
    assert set(host.wrong(code=1)) == {"batches"}
    world.sql("UPDATE audio_files SET settled_at = NULL, state = 'pending', dropped_at = NULL")
    world.finish()
    assert host.wrong(code=0) == {}


def test_a_batch_that_was_given_back_has_waited_since_it_was_last_taken(host: Host) -> None:
    world = host.world
    world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    world.sql("UPDATE batches SET uploaded_at = now() - interval '3 hours'")
    world.command("hosts", "forget", "h1")
    ledger.beat(world.engine, "h1", gpu=True)
    wrong = host.wrong(code=1)
    assert "lists" not in wrong and "not complete after 108" in wrong["batches"][1]
    world.sql("UPDATE batches SET unpacking_at = now() - interval '3 hours'")
    wrong = host.wrong(code=2)
    assert wrong["lists"][1] == "the oldest job on unpack has waited for 3 h"
    assert "no progress for 108" in wrong["batches"][1]


def test_a_batch_that_is_tried_again_waits_since_then(host: Host) -> None:
    world = host.world
    world.plant_batch(1, ["a.mp3", "poison.mp3"])
    world.finish()
    world.sql("UPDATE batches SET minted_at = now() - interval '1 day', unpacking_at = now() - interval '1 day'")
    (letter,) = json.loads(world.command("dead", "list", "--json").stdout)
    world.command("dead", "retry", letter["name"])
    assert host.wrong(code=0) == {}


def test_what_was_set_aside_until_it_is_dropped(host: Host) -> None:
    world = host.world
    world.plant_batch(1, ["a.mp3", "poison.mp3"])
    world.finish()
    world.client.rpush("dead", "nonsense", "nonsense")
    assert host.wrong(code=1)["dead letters"][1] == "set aside: payload 2, recording 1"
    for letter in json.loads(world.command("dead", "list", "--json").stdout):
        world.command("dead", "drop", letter["name"])
    assert host.wrong(code=0) == {}


def test_archives_that_are_needed_for_longer_and_such_as_should_be_gone(host: Host) -> None:
    world = host.world
    batch_id = world.plant_batch(1, ["a.mp3", "poison.mp3"])
    world.finish()
    world.sql("UPDATE batches SET uploaded_at = now() - interval '7 days', complete_at = now() - interval '10 days'")
    assert host.wrong(code=1)["archives"][1].endswith(f"still needed: {batch_id}")
    for letter in json.loads(world.command("dead", "list", "--json").stdout):
        world.command("dead", "drop", letter["name"])
    assert host.wrong(code=2)["archives"] == ("failing", "1 should be gone for two days", "lab-audio retention")
    world.command("retention")
    assert host.wrong(code=0) == {}


def test_an_archive_that_somebody_else_deleted(host: Host) -> None:
    world = host.world
    batch_id = world.plant_batch(1, ["a.mp3"])
    world.finish()
    world.sql("UPDATE batches SET complete_at = now() - interval '10 days'")
    s3_utils.delete_archive(archive_key(batch_id), bucket=world.bucket)
    assert host.wrong(code=2)["archives"][1] == "1 should be gone for two days"
    world.command("retention", "--dry-run")
    assert "archives" in host.wrong(code=2)
    assert "the archive was gone already" in world.command("retention").stderr
    assert host.wrong(code=0) == {}


@pytest.mark.parametrize(
    ("job", "said", "unit", "alert"),
    [
        ("dump", "dump was last done 3 d ago", "lab-audio-dump", "BackupStale"),
        ("source /srv", "the source /srv was last looked at 3 d ago", "transfer-worker", "WorkerSilent"),
    ],
)
def test_what_is_late(host: Host, job: str, said: str, unit: str, alert: str) -> None:
    host.world.sql("DELETE FROM runs WHERE job = 'dump' OR job LIKE 'source %'")
    ledger.note_run(host.world.engine, "source /other")  # that one source answers says nothing of another
    ledger.note_run(host.world.engine, job)
    assert host.wrong(code=0) == {}
    host.world.sql("UPDATE runs SET ended_at = now() - interval '3 days' WHERE job = :job", job=job)
    state, what, mend = host.wrong(code=2)["timers"]
    told = re.search(rf'run_age_seconds{{job="{job.split()[0]}"}} ([0-9.]+)', host.world.command("metrics").stdout)
    assert told and float(told[1]) >= 3 * 86400
    host.world.sql("DELETE FROM runs WHERE job = 'dump' OR job LIKE 'source %'")
    assert (state, what) == ("failing", said)
    assert unit in mend and alert in mend


def test_a_lab_whose_monitoring_was_removed(host: Host) -> None:
    ledger.note_run(host.world.engine, "metrics")
    host.world.sql("UPDATE runs SET ended_at = now() - interval '3 days' WHERE job = 'metrics'")
    assert host.wrong(code=0) == {}


def test_a_lab_without_reconcile(host: Host) -> None:
    host.world.sql("DELETE FROM runs")
    state, what, mend = host.wrong(code=1)["timers"]
    assert (state, what) == ("warning", "reconcile was never done: nobody notices a lost host")
    host.world.command(*mend.split(",")[0].split()[1:])
    assert host.wrong(code=0) == {}


@pytest.mark.parametrize(("free", "code"), [(20, 0), (8, 1), (6, 2)])
def test_scratch_that_others_fill(host: Host, monkeypatch: pytest.MonkeyPatch, free: int, code: int) -> None:
    """5 % of so small a disk are kept free of batches."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=100, f_bavail=free, f_frsize=1 << 20))
    assert set(host.wrong(code=code)) == ({"scratch"} if code else set())
    batch_id = host.world.plant_batch(1, ["a.mp3"])
    host.world.run("unpack")
    with (host.root / batch_id / "large.opus").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 20 << 20)
    assert host.wrong(code=0) == {}


def test_a_batch_that_comes_or_goes_meanwhile_is_no_stray(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    world, held_batches = host.world, ledger.held_batches
    going, coming = world.plant_batch(1, ["a.mp3"]), world.BATCH(2)
    world.run("unpack")

    def moving(engine: Engine, name: str) -> set[str]:
        """As the ledger is asked, one batch has just been given back; then another is taken."""
        scratch.cleanup_scratch(going, root=host.root)
        ledger.give_back(engine, going, name)
        held = held_batches(engine, name)
        world.sql(
            "INSERT INTO batches (batch_id, state, job, host, uploaded_at, unpacking_at)"
            " VALUES (:id, 'unpacking', '', 'h1', now(), now())",
            id=coming,
        )
        scratch.fresh_dir(host.root, coming)
        return held

    monkeypatch.setattr(ledger, "held_batches", moving)
    assert host.wrong(code=0) == {}


def test_scratch_says_whose_each_folder_is(host: Host) -> None:
    world = host.world
    mine = world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    stray = world.plant_batch(2, ["b.mp3"])
    register(world.engine, "h2", "disk")
    world.sql(
        "INSERT INTO batches (batch_id, state, job, host, ready_at, uploaded_at)"
        " VALUES (:id, 'ready', '', 'h2', now(), now())",
        id=stray,
    )
    ledger.beat(world.engine, "h2", gpu=True)
    (host.root / stray).mkdir()
    said = json.loads(host.check("--json", code=1).stdout)["checks"]
    told = [(one["state"], one["what"]) for one in said if one["check"] == "scratch folders"]
    assert told == [("good", f"1 of batches: {mine} (ready)"), ("warning", f"strays: {stray} (ready on h2)")]
    (host.root / stray).rmdir()
    (host.root / "notes").mkdir()
    assert host.wrong(code=1)["scratch folders"][1] == "of nobody: notes"


def test_scratch_that_is_not_mounted(host: Host) -> None:
    (host.root / ".id").rename(host.root / "id")
    state, what, mend = host.wrong(code=2)["scratch folders"]
    assert state == "failing" and "is it mounted?" in what and mend.startswith("findmnt")


def test_models_that_are_not_as_their_manifest_says(host: Host) -> None:
    model = host.models / "whisperx" / "model.bin"
    manifest = {"revision": "r1", "files": [{"path": "model.bin", "size": model.stat().st_size, "sha256": "0" * 64}]}
    (host.models / "whisperx" / "manifest.json").write_text(json.dumps(manifest))
    assert "whisper r1" in host.check(code=0).stdout
    model.write_text("cut")
    assert host.wrong(code=2)["models"][1].endswith("is not as its manifest says: model.bin")
    model.unlink()
    assert "MODELS_ROOT" in host.wrong(code=2)["models"][1]


def test_a_gpu_that_is_not_there(host: Host, tmp_path: Path) -> None:
    assert host.wrong(code=2, DEVICES="cuda:0", PATH=str(tmp_path))["GPU"][1] == "nvidia-smi is missing"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA A10, 512, 23028'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    assert "cuda:0 NVIDIA A10, 512 of 23028 MiB used" in host.check(code=0, DEVICES="cuda:0", PATH=path).stdout
    assert "cuda:1 is not there" in host.check(code=2, DEVICES="cuda:0,cuda:1", PATH=path).stdout


@pytest.mark.parametrize(
    ("active", "sub", "seconds", "wrong"),
    [
        ("active", "running", 3600, {}),
        ("inactive", "dead", 0, {"failing": "unpack-worker is inactive"}),
        ("failed", "failed", 0, {"failing": "unpack-worker is failed"}),
        ("activating", "start", 10, {}),
        ("activating", "start", 180, {"warning": "unpack-worker has been starting for 3 min"}),
        ("activating", "auto-restart", 10, {"failing": "unpack-worker has ended, and is started again"}),
    ],
)
def test_a_worker_that_does_not_run_here(
    host: Host, tmp_path: Path, active: str, sub: str, seconds: int, wrong: dict[str, str]
) -> None:
    began = int((time.monotonic() - seconds) * 1e6)
    fake_systemctl(
        tmp_path,
        ("transfer-worker.service", "", "inactive", "dead", 0),
        ("unpack-worker.service", "enabled", active, sub, began),
        ("gpu-worker.service", "enabled", "active", "running", began),
        ("lab-audio-metrics.timer", "enabled", "active", "waiting", began),
    )
    code = 2 if "failing" in wrong else len(wrong)
    found = host.wrong(code=code, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert {state: what for state, what, _mend in found.values()} == wrong
    assert set(found) <= {"workers"}
    assert all("unpack-worker" in mend and "docs/runbooks/Worker" in mend for _, _, mend in found.values())


def test_a_timer_that_does_not_run_here(host: Host, tmp_path: Path) -> None:
    fake_systemctl(
        tmp_path,
        ("gpu-worker.service", "enabled", "active", "running", 1),
        ("lab-audio-metrics.timer", "enabled", "inactive", "dead", 0),
        ("lab-audio-audit.timer", "disabled", "inactive", "dead", 0),
    )
    found = host.wrong(code=2, PATH=f"{tmp_path}:/usr/bin:/bin")
    mend = "systemctl start lab-audio-metrics.timer; docs/runbooks/TextfileStale.md"
    assert found == {"workers": ("failing", "lab-audio-metrics.timer is inactive", mend)}


def test_a_job_of_a_timer_that_fails_here(host: Host, tmp_path: Path) -> None:
    fake_systemctl(
        tmp_path,
        ("lab-audio-audit.timer", "enabled", "active", "waiting", 1),
        ("lab-audio-audit.service", "static", "failed", "failed", 1),
        ("lab-audio-retention.timer", "enabled", "active", "waiting", 1),
        ("lab-audio-retention.service", "static", "activating", "start", 1),
        ("lab-audio-reconcile.timer", "disabled", "inactive", "dead", 1),
        ("lab-audio-reconcile.service", "static", "failed", "failed", 1),
    )
    found = host.wrong(code=1, PATH=f"{tmp_path}:/usr/bin:/bin")["workers"]
    mend = "journalctl -u lab-audio-audit -n 50; docs/operations.md#messages"
    assert found == ("warning", "lab-audio-audit has failed", mend)


def test_a_worker_that_serves_fewer_devices_than_it_should(host: Host, tmp_path: Path) -> None:
    for serves, code in (("cuda:0, cuda:1, 2 of 2", 0), ("cuda:0, 1 of 2", 1)):
        unit = ("gpu-worker.service", "enabled", "active", "running", 1, f"serves {serves} devices")
        fake_systemctl(tmp_path, unit)
        wrong = host.wrong(code=code, PATH=f"{tmp_path}:/usr/bin:/bin")
    state, what, mend = wrong["workers"]
    assert (state, what) == ("warning", "gpu-worker serves cuda:0, 1 of 2 devices")
    assert mend.endswith("docs/runbooks/WorkerSick.md")


def fake_systemctl(directory: Path, *units: tuple[str | int, ...]) -> None:
    asked = ["Id", "UnitFileState", "ActiveState", "SubState", "InactiveExitTimestampMonotonic", "StatusText"]
    said = "\n\n".join("\n".join(f"{name}={value}" for name, value in zip(asked, unit, strict=False)) for unit in units)
    systemctl = directory / "systemctl"
    systemctl.write_text(f"#!/bin/sh\necho '{said}'\n")
    systemctl.chmod(0o755)


def test_ffmpeg_that_does_not_work(host: Host, tmp_path: Path) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    wrong = host.wrong(code=2, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert "ffmpeg is broken on this host" in wrong["sandbox"][1]
