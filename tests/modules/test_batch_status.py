"""lab.audio.batch_status on real PostgreSQL and Redis, with rows and lists as the workers make them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
import redis
from needed import needed

from conftest import CHECKOUT, PYTHON, Run, environment
from stack import Stack

MODULE = "batch_status"
NAMES = [f"20260101-00000{n}-abcdef" for n in range(5)]
JOB = '{{"batch_id": "{0}", "s3_key": "archives/{0}.tar", "file_count": 4, "transferred_at": "2026-01-01T00:00:00Z"}}'


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    servers = Stack(tmp_path_factory.mktemp("stack"))
    with needed():
        servers.__enter__()
    try:
        yield servers
    finally:
        servers.stop()


class Lab:
    """A ledger and a Redis of this test's own."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = {name: env[name] for name in ("DATABASE_URL", "REDIS_URL")}
        self.queue = redis.Redis.from_url(env["REDIS_URL"], decode_responses=True)

    def sql(self, *statements: str) -> None:
        with (
            closing(psycopg2.connect(self.env["DATABASE_URL"])) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            for statement in statements:
                cursor.execute(statement)

    def batch(self, number: int, state: str, host: str = "NULL", ago: str = "1 minute", **more: str) -> str:
        """Enter a batch that came into its state so long ago, with every time before that the same."""
        columns = {f"{s}_at": f"now() - interval '{ago}'" for s in ("uploaded", "unpacking", "ready", "complete")}
        reached = {"minted": 0, "uploaded": 1, "unpacking": 2, "ready": 3, "complete": 4, "failed": 1}[state]
        kept = dict(list(columns.items())[:reached]) | {"minted_at": f"now() - interval '{ago}'"} | more
        self.sql(
            f"INSERT INTO batches (batch_id, state, host, {', '.join(kept)})"
            f" VALUES ('{NAMES[number]}', '{state}', {host}, {', '.join(kept.values())})"
        )
        return NAMES[number]

    def items(self, number: int, *states: str, ago: str = "10 seconds") -> None:
        for place, state in enumerate(states):
            at = "NULL" if state == "pending" else f"now() - interval '{ago}'"
            self.sql(
                "INSERT INTO audio_files (batch_id, member, item, state, settled_at) VALUES"
                f" ('{NAMES[number]}', '{place}.mp3', '{place:016x}', '{state}', {at})"
            )

    def host(self, name: str, seen: str = "2 seconds", gpu: str | None = "2 seconds", paused: bool = False) -> None:
        models = f"now() - interval '{gpu}'" if gpu else "NULL"
        self.sql(f"INSERT INTO hosts VALUES ('{name}', now() - interval '{seen}', {models}, {paused})")


@pytest.fixture
def lab(stack: Stack) -> Iterator[Lab]:
    with stack.fresh() as env:
        migrated = {**os.environ, **env}
        program = Path(sys.executable).with_name("lab-audio")
        subprocess.run([program, "migrate"], env=migrated, check=True, capture_output=True)
        yield Lab(env)


def test_nothing_at_all(run: Run, lab: Lab) -> None:
    result = run(MODULE, env=lab.env)
    assert (result["changed"], result["batches"], result["hosts"], result["stuck"]) == (False, [], [], [])
    assert result["totals"] == {"batches": 0, "total": 0, "processed": 0, "dead": 0, "percent": None}
    assert [one["name"] for one in result["lists"]] == ["unpack", "transcribe", "dead"]
    assert run(MODULE, check=True, env=lab.env)["changed"] is False


def test_a_batch_at_work(run: Run, lab: Lab) -> None:
    batch = lab.batch(0, "ready", "'gpu-1'", "110 seconds", file_count="3")
    lab.items(0, "done", "done", "dead", "pending", ago="10 seconds")
    lab.batch(1, "complete")
    lab.items(1, "done")
    lab.host("gpu-1")
    lab.queue.rpush("transcribe:gpu-1", json.dumps({"batch_id": batch, "opus_path": "x", "original_filename": "y"}))
    result = run(MODULE, env=lab.env)
    (found,) = result["batches"]
    assert (found["batch_id"], found["state"], found["host"]) == (batch, "ready", "gpu-1")
    assert (found["total"], found["processed"], found["dead"], found["percent"]) == (4, 3, 1, 75.0)
    assert found["rate"] == pytest.approx(0.03, rel=0.01) and found["eta_seconds"] == pytest.approx(100 / 3, rel=0.01)
    assert 110 <= found["age_seconds"] < 170 and 10 <= found["idle_seconds"] < 70
    assert result["totals"] == {"batches": 1, "total": 4, "processed": 3, "dead": 1, "percent": 75.0}
    assert result["dead_letters"] == {"recordings": 1, "batches": 0, "payloads": 0}
    lists = {one["name"]: one for one in result["lists"]}
    assert lists["transcribe:gpu-1"]["depth"] == 1 and 110 <= lists["transcribe:gpu-1"]["oldest_seconds"] < 170
    assert result["hosts"][0]["host"] == "gpu-1" and result["hosts"][0]["seen_seconds"] < 60


def test_what_the_job_promised_counts_until_the_recordings_are_known(run: Run, lab: Lab) -> None:
    lab.batch(0, "uploaded", file_count="847")
    (found,) = run(MODULE, env=lab.env)["batches"]
    assert (found["total"], found["processed"], found["percent"], found["rate"]) == (847, 0, 0.0, None)


def test_a_batch_that_has_ended_is_shown_if_asked_for(run: Run, lab: Lab) -> None:
    batch = lab.batch(0, "failed", reason="'archive missing'", failed_at="now()")
    assert run(MODULE, env=lab.env)["batches"] == []
    (found,) = run(MODULE, env=lab.env, batch_id=batch)["batches"]
    assert (found["state"], found["reason"]) == ("failed", "archive missing")
    assert NAMES[1] in run(MODULE, env=lab.env, batch_id=NAMES[1])["msg"]
    assert "YYYYMMDD" in run(MODULE, env=lab.env, batch_id="../x")["msg"]


@pytest.mark.parametrize(
    ("state", "host", "who"),
    [
        ("minted", "NULL", "the transfer worker of its source"),
        ("uploaded", "NULL", "an unpack worker with room on its scratch"),
        ("unpacking", "'gpu-1'", "the unpack worker on gpu-1, seen "),
        ("ready", "'gpu-1'", "the GPU worker on gpu-1, seen "),
        ("complete", "'gpu-2'", "gpu-2 to remove its scratch, which was never seen"),
    ],
)
def test_a_batch_without_progress_is_critical_and_tells_whom_it_waits_for(
    run: Run, lab: Lab, state: str, host: str, who: str
) -> None:
    lab.host("gpu-1", seen="300 seconds", gpu="8000 seconds")
    batch = lab.batch(0, state, host, "3 hours")
    lab.batch(1, "uploaded", ago="1 hour")
    result = run(MODULE, env=lab.env, fail_on=["stuck"])
    assert [(one["batch_id"], one["severity"]) for one in result["stuck"]] == [(batch, "critical")]
    assert result["failed"] and f"batch {batch} is stuck (critical): no progress for 108" in result["msg"]
    assert who in result["msg"] and f"it is {state}" in result["msg"]
    assert run(MODULE, env=lab.env, fail_on=["stuck"], stuck_after=4 * 3600).get("failed") is None


def test_a_batch_that_is_slow_but_moves_is_a_warning(run: Run, lab: Lab) -> None:
    lab.host("gpu-1")
    lab.batch(0, "ready", "'gpu-1'", "3 hours")
    lab.items(0, "done", "pending", ago="5 minutes")
    (stuck,) = run(MODULE, env=lab.env)["stuck"]
    assert stuck["severity"] == "warning" and stuck["reason"].startswith("not complete after 10")


def test_it_fails_on_dead_letters_of_each_kind_until_they_are_dealt_with(run: Run, lab: Lab) -> None:
    lab.batch(0, "complete")
    lab.items(0, "dead")
    lab.batch(1, "failed", failed_at="now()")
    lab.queue.rpush("dead", "no job")
    result = run(MODULE, env=lab.env, fail_on=["dead_letters"])
    assert result["msg"].startswith("dead letters: 1 recordings, 1 batches, 1 payloads")
    assert result["dead_letters"] == {"recordings": 1, "batches": 1, "payloads": 1}
    lab.sql("UPDATE audio_files SET dropped_at = now()", "UPDATE batches SET dropped_at = now()")
    lab.queue.delete("dead")
    assert run(MODULE, env=lab.env, fail_on=["dead_letters"]).get("failed") is None


def test_it_fails_if_no_host_works(run: Run, lab: Lab) -> None:
    assert "none takes part" in run(MODULE, env=lab.env, fail_on=["no_workers"])["msg"]
    lab.host("gpu-1", seen="1 second", gpu=None)
    lab.host("gpu-2", paused=True)
    lab.host("gpu-3", seen="10 minutes")
    said = run(MODULE, env=lab.env, fail_on=["no_workers"])["msg"]
    assert re.search("gpu-1 was seen [0-9]+ s ago, with its models ready never", said)
    assert "gpu-2 is paused" in said and re.search("gpu-3 was seen 6[0-9]{2} s ago", said)
    lab.sql("UPDATE hosts SET seen_at = NULL, silent_since = seen_at WHERE host = 'gpu-3'")
    said = run(MODULE, env=lab.env, fail_on=["no_workers"])["msg"]
    assert re.search("gpu-3 is lost, was seen 6[0-9]{2} s ago", said)
    lab.host("gpu-4")
    assert run(MODULE, env=lab.env, fail_on=["no_workers"]).get("failed") is None
    lab.sql("INSERT INTO hosts (host, paused) VALUES ('*', true)")
    assert run(MODULE, env=lab.env, fail_on=["no_workers"])["failed"]


def test_it_waits_until_a_batch_is_complete(run: Run, lab: Lab) -> None:
    batch = lab.batch(0, "ready", "'gpu-1'")
    assert (
        "not complete after 0 s: it is ready"
        in run(MODULE, env=lab.env, wait_for="complete", batch_id=batch, timeout=0)["msg"]
    )
    later = threading.Timer(2, lab.sql, ["UPDATE batches SET state = 'complete', complete_at = now()"])
    later.start()
    result = run(MODULE, env=lab.env, wait_for="complete", batch_id=batch, timeout=60)
    later.join()
    assert result["batches"][0]["state"] == "complete" and result["waited_seconds"] > 0
    lab.sql("UPDATE batches SET state = 'failed', reason = 'archive missing'")
    said = run(MODULE, env=lab.env, wait_for="complete", batch_id=batch, timeout=60)["msg"]
    assert said == f"batch {batch} failed: archive missing"
    assert "does not know" in run(MODULE, env=lab.env, wait_for="complete", batch_id=NAMES[4], timeout=0)["msg"]


def test_it_waits_until_nothing_is_at_work(run: Run, lab: Lab) -> None:
    assert run(MODULE, env=lab.env, wait_for="idle", timeout=0)["waited_seconds"] >= 0
    lab.queue.rpush("processing:gpu-1:unpack:0", JOB.format(NAMES[0]))
    said = run(MODULE, env=lab.env, wait_for="idle", timeout=0)["msg"]
    assert said == "not idle after 0 s: 0 batches are open; jobs: 1 in processing:gpu-1:unpack:0"
    lab.queue.flushall()
    lab.batch(0, "uploaded")
    assert "1 batches are open; jobs: none" in run(MODULE, env=lab.env, wait_for="idle", timeout=0)["msg"]
    lab.queue.rpush("dead", "no job")
    lab.sql("DELETE FROM batches")
    assert run(MODULE, env=lab.env, wait_for="idle", timeout=0).get("failed") is None


def test_redis_alone_tells_total_and_processed(run: Run, lab: Lab) -> None:
    lab.queue.mset({f"batch:{NAMES[0]}:total": 8, f"batch:{NAMES[0]}:processed": 2, f"batch:{NAMES[1]}:total": 2})
    lab.queue.rpush("unpack", JOB.format(NAMES[2]), "\udcff no job".encode("utf-8", "surrogateescape"))
    lab.queue.rpush("transcribe", "no job")
    alone = {"REDIS_URL": lab.env["REDIS_URL"]}
    result = run(MODULE, env=alone)
    assert result["batches"] == [
        {"batch_id": NAMES[0], "total": 8, "processed": 2, "percent": 25.0},
        {"batch_id": NAMES[1], "total": 2, "processed": 0, "percent": 0.0},
    ]
    assert result["totals"] == {"batches": 2, "total": 10, "processed": 2, "dead": 0, "percent": 20.0}
    assert "stuck" not in result and "hosts" not in result
    lists = {one["name"]: one["oldest_seconds"] for one in result["lists"]}
    assert lists["unpack"] > 86400 and lists["transcribe"] is None
    assert run(MODULE, env=alone, batch_id=NAMES[1])["totals"]["total"] == 2
    assert "unknown to Redis" in run(MODULE, env=alone, batch_id=NAMES[3])["msg"]
    assert "set database_url" in run(MODULE, env=alone, fail_on=["stuck"])["msg"]
    assert "set database_url" in run(MODULE, env=alone, wait_for="idle")["msg"]
    assert "set database_url" in run(MODULE, env=alone, fail_on=["dead_letters"])["msg"]
    assert result["dead_letters"] == {"recordings": None, "batches": None, "payloads": 0}
    lab.queue.set(f"batch:{NAMES[1]}:total", "many")
    assert f"batch:{NAMES[1]}:total or :processed in Redis is no number" in run(MODULE, env=alone)["msg"]


def test_postgresql_alone_leaves_the_lists_out(run: Run, lab: Lab) -> None:
    alone = {"DATABASE_URL": lab.env["DATABASE_URL"]}
    assert "lists" not in run(MODULE, env=alone)
    assert "set redis_url" in run(MODULE, env=alone, wait_for="idle")["msg"]
    assert "set redis_url" in run(MODULE, env=alone, fail_on=["dead_letters"])["msg"]
    assert run(MODULE, env=alone)["dead_letters"] == {"recordings": 0, "batches": 0, "payloads": None}


def test_secrets_come_from_files_and_are_not_told(run: Run, lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "database_url").write_text(lab.env["DATABASE_URL"] + "\n")
    (tmp_path / "redis_url").write_text("redis://default:sesame-opens@127.0.0.1:1/0\n")
    said = run(MODULE, credentials_directory=tmp_path)
    assert "Redis at 127.0.0.1:1 cannot be asked" in said["msg"] and "sesame-opens" not in json.dumps(said)
    (tmp_path / "redis_url").unlink()
    assert run(MODULE, credentials_directory=tmp_path).get("failed") is None
    (tmp_path / "redis_url").touch()
    assert run(MODULE, credentials_directory=tmp_path)["msg"] == f"{tmp_path}/redis_url is empty"
    (tmp_path / "redis_url").unlink()
    (tmp_path / "redis_url").mkdir()
    assert "cannot be read" in run(MODULE, credentials_directory=tmp_path)["msg"]


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "set database_url and redis_url"),
        ({"DATABASE_URL": "mysql://x"}, "must be a URL postgresql://"),
        ({"DATABASE_URL": "postgresql://x:99999999/y"}, "must be a URL postgresql://"),
        ({"REDIS_URL": "localhost"}, "must be a URL redis://"),
        (
            {"DATABASE_URL": "postgresql://u:sesame-opens@127.0.0.1:1/x"},
            "PostgreSQL at 127.0.0.1:1/x cannot be reached",
        ),
        ({"DATABASE_URL": "postgresql://u:sesame-opens%zz@127.0.0.1:1/x"}, "invalid percent-encoded token"),
        ({"REDIS_URL": "redis://u:sesame-opens@127.0.0.1:1/0?socket_timeout=soon"}, "redis_url: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: Run, env: dict[str, str], said: str) -> None:
    result = run(MODULE, env=env)
    assert said in result["msg"] and "\n" not in result["msg"] and "sesame-opens" not in json.dumps(result)


def test_times_that_cannot_be_are_refused(run: Run, lab: Lab) -> None:
    for wrong in ({"stuck_after": 0}, {"timeout": -1}):
        assert "at least" in run(MODULE, env=lab.env, **wrong)["msg"]


def test_a_database_of_another_release(run: Run, lab: Lab) -> None:
    lab.sql("DROP FUNCTION stuck_batches")
    assert "run `lab-audio migrate`" in run(MODULE, env=lab.env)["msg"]
    lab.sql("DROP VIEW batch_progress")
    assert "run `lab-audio migrate`" in run(MODULE, env=lab.env)["msg"]


@pytest.mark.parametrize("missing", ["psycopg2", "redis"])
def test_a_missing_library_is_named(run: Run, lab: Lab, tmp_path: Path, missing: str) -> None:
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "__init__.py").write_text("raise ImportError('not here')")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    assert f"({missing})" in run(MODULE, env={**lab.env, "PYTHONPATH": path})["msg"]


def test_its_cost_does_not_grow_with_what_is_finished(lab: Lab) -> None:
    """The plan reads open batches by their indices, however many have ended."""
    lab.sql(
        "INSERT INTO batches (batch_id, state, complete_at) SELECT '20250101-000000-' || lpad(to_hex(n), 6, '0'),"
        " 'complete', now() FROM generate_series(1, 20000) n",
        "INSERT INTO audio_files (batch_id, member, item, state) SELECT batch_id, 'a.mp3', '0', 'done' FROM batches",
    )
    lab.batch(0, "uploaded")
    lab.batch(1, "ready", "'gpu-1'")
    lab.sql("ANALYZE batches", "ANALYZE audio_files")
    with closing(psycopg2.connect(lab.env["DATABASE_URL"])) as connection, connection.cursor() as cursor:
        cursor.execute("EXPLAIN (ANALYZE, FORMAT JSON) SELECT * FROM batch_progress WHERE open")
        plan = json.dumps(cursor.fetchone()[0])
        assert '"Seq Scan"' not in plan, plan


def test_through_ansible_itself(lab: Lab) -> None:
    lab.batch(0, "uploaded", ago="3 hours")
    command = [sys.executable, "-m", "ansible", "adhoc", "localhost", "-c", "local", "-m", "lab.audio.batch_status"]
    env = environment(
        **lab.env,
        ANSIBLE_COLLECTIONS_PATH=str(CHECKOUT / "collections"),
        ANSIBLE_PYTHON_INTERPRETER=PYTHON,
        ANSIBLE_LOCALHOST_WARNING="False",
    )
    good = subprocess.run([*command, "--check", "--diff"], env=env, capture_output=True, text=True)
    assert good.returncode == 0 and f'"batch_id": "{NAMES[0]}"' in good.stdout, good.stdout + good.stderr
    bad = subprocess.run([*command, "-a", '{"fail_on": ["stuck"]}'], env=env, capture_output=True, text=True)
    assert bad.returncode == 2 and "waits for an unpack worker" in bad.stdout, bad.stdout + bad.stderr
