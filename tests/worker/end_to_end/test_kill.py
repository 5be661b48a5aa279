"""`kill -9` of every worker in mid-batch, and a restart: nothing is lost, doubled or done again that was done."""

from __future__ import annotations

import os
import signal
from typing import Any

import psycopg2

import corpus
from lab import Host, Lab, Program, command_line, wait_for

FILES = 24
BATCHES = 2
GROUP = 2  # recordings that are classified together: what a kill of the GPU process may cost


def test_each_worker_is_killed_in_mid_batch_and_started_again(lab: Lab) -> None:
    corpus.make_many(lab.source, FILES)
    host = lab.host("h1")
    gpu = lab.start(host, "gpu-worker", CLASSIFY_BATCH=str(GROUP))
    kill_transfer_between_upload_and_record(lab, host)
    kill_transfer_between_record_and_push(lab, host)
    start_transfer(lab, host, "--once").wait()
    check_transferred(lab, host)

    lab.wait_ready(host, gpu)
    kill_unpack(lab, host)
    unpack = lab.start(host, "unpack-worker")
    done = kill_gpu_process(lab, gpu)
    done |= kill_gpu_parent(lab, gpu, done)
    gpu = lab.start(host, "gpu-worker", CLASSIFY_BATCH=str(GROUP))
    lab.wait_ended(BATCHES, gpu, unpack)

    lab.account(FILES, host)
    after = finished(lab)
    assert {audio_id: after[audio_id] for audio_id in done} == done
    assert lab.one("SELECT sum(attempts) FROM audio_files") <= FILES + 2 * GROUP
    for program in (gpu, unpack):
        assert program.terminate() == 0, program.tail()


def start_transfer(lab: Lab, host: Host, *options: str) -> Program:
    return lab.start(host, "transfer-worker", *options, BATCH_FILES=str(FILES // BATCHES))


def kill_transfer_between_upload_and_record(lab: Lab, host: Host) -> None:
    """The batch's row is locked from its mint on, so that the upload can happen and its record cannot."""
    holder = psycopg2.connect(lab.env["DATABASE_URL"])
    try:
        transfer = start_transfer(lab, host)

        def minted() -> Any:
            with holder.cursor() as cursor:
                cursor.execute("SELECT batch_id FROM batches WHERE state = 'minted' FOR UPDATE")
                found = cursor.fetchone()
            if found is None:
                holder.rollback()
            return found

        (batch_id,) = wait_for("a minted batch", minted)
        wait_for("its archive", lambda: f"archives/{batch_id}.tar" in lab.objects("archives/"))
        transfer.kill()
    finally:
        holder.close()
    assert lab.one("SELECT state FROM batches WHERE batch_id = %s", batch_id) == "minted"
    assert lab.redis.llen("unpack") == 0


def kill_transfer_between_record_and_push(lab: Lab, host: Host) -> None:
    """Redis takes no writes meanwhile."""
    lab.redis.execute_command("CLIENT", "PAUSE", 120_000, "WRITE")
    try:
        transfer = start_transfer(lab, host)
        wait_for("a recorded batch", lambda: lab.rows("SELECT FROM batches WHERE state = 'uploaded'"))
        transfer.kill()
    finally:
        lab.redis.execute_command("CLIENT", "UNPAUSE")
    assert lab.redis.llen("unpack") == 0


def check_transferred(lab: Lab, host: Host) -> None:
    assert lab.rows("SELECT state, count(*), sum(file_count) FROM batches GROUP BY state") == [
        ("uploaded", BATCHES, FILES)
    ]
    assert lab.rows("SELECT count(*), count(DISTINCT path) FROM source_files WHERE struck IS NULL") == [(FILES, FILES)]
    jobs = {row[0].encode() for row in lab.rows("SELECT job FROM batches")}
    queued = lab.redis.lrange("unpack", 0, -1)
    assert (len(queued), set(queued)) == (BATCHES, jobs)
    assert len(lab.objects("archives/")) == BATCHES
    assert list((host.directory / "tmp" / "transfer").rglob("*")) == []


def kill_unpack(lab: Lab, host: Host) -> None:
    unpack = lab.start(host, "unpack-worker", TRANSCODE_THREADS="1")

    def in_the_middle() -> bool:
        unpack.check_running()
        return len(list(host.scratch.glob("*/*.opus"))) >= 2

    wait_for("some recordings to be encoded", in_the_middle)
    unpack.kill()
    assert lab.rows("SELECT host FROM batches WHERE state = 'unpacking'") == [("h1",)]
    assert lab.one("SELECT count(*) FROM audio_files") == 0


def finished(lab: Lab) -> dict[int, tuple[Any, ...]]:
    """What must never change again of each recording that is done."""
    rows = lab.rows(
        "SELECT audio_id, attempts, settled_at, s3_opus_path, transcript_id, t.created_at"
        " FROM audio_files JOIN transcripts t USING (audio_id) WHERE state = 'done'"
    )
    return {row[0]: row for row in rows}


def wait_done(lab: Lab, gpu: Program, count: int) -> dict[int, tuple[Any, ...]]:
    def enough() -> dict[int, tuple[Any, ...]] | None:
        gpu.check_running()
        done = finished(lab)
        return done if len(done) >= count else None

    done: dict[int, tuple[Any, ...]] = wait_for(f"{count} recordings to be done", enough)
    assert len(done) < FILES, "all were done before the kill"
    return done


def kill_gpu_process(lab: Lab, gpu: Program) -> dict[int, tuple[Any, ...]]:
    done = wait_done(lab, gpu, 3)
    (child,) = gpu.children()
    os.kill(child, signal.SIGKILL)
    wait_for("the parent to start another", lambda: set(gpu.children()) - {child})
    assert gpu.events("GPU process died")[0]["why"] == "killed by SIGKILL"
    return done


def kill_gpu_parent(lab: Lab, gpu: Program, before: dict[int, tuple[Any, ...]]) -> dict[int, tuple[Any, ...]]:
    # Some of the killed process's uploads may have been on their way: more than those must be new.
    done = wait_done(lab, gpu, len(before) + 6)
    (child,) = gpu.children()
    gpu.kill()
    assert not command_line(child)
    return done
