"""Each atomic step of the protocol, split or left out: called in a worker's process before it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import text

from lab_audio import ledger, queues, s3_utils
from lab_audio.workers import gpu_worker, host, transfer_sounds


def mint_split() -> None:
    """The batch and its files in two transactions."""
    whole = ledger.mint

    def mint(engine: Any, source: str, files: Any, **limits: int) -> Any:
        minted = whole(engine, source, files, **limits)
        if minted is not None:
            rows = "SELECT path, size, mtime_ns, source, batch_id FROM source_files WHERE batch_id = :id"
            with engine.begin() as connection:
                kept = connection.execute(text(rows), {"id": minted.batch_id}).mappings().all()
                connection.execute(text("DELETE FROM source_files WHERE batch_id = :id"), {"id": minted.batch_id})
            with engine.begin() as connection:
                insert = (
                    "INSERT INTO source_files (path, size, mtime_ns, source, batch_id)"
                    " VALUES (:path, :size, :mtime_ns, :source, :batch_id)"
                )
                connection.execute(text(insert), [dict(row) for row in kept])
        return minted

    transfer_sounds.ledger.mint = mint


def uploaded_before_upload() -> None:
    """The batch is recorded as uploaded before its archive is."""

    def upload(path: Any, batch_id: str, **more: Any) -> str:
        return whole(path, batch_id, **more)

    whole = s3_utils.upload_archive
    record = ledger.record_upload
    pending: list[Any] = []
    s3_utils.upload_archive = lambda path, batch_id, **more: pending.append((path.read_bytes(), batch_id, more))

    def record_upload(engine: Any, batch_id: str, *rest: Any) -> bool:
        answer = record(engine, batch_id, *rest)
        for content, pending_id, more in pending:
            bucket = more["bucket"]
            bucket.client.put_object(
                Bucket=bucket.name, Key=f"archives/{pending_id}.tar", Body=content, Metadata={"sha256": more["sha256"]}
            )
        pending.clear()
        return answer

    ledger.record_upload = record_upload


def no_push_at_start() -> None:
    """What is uploaded and has no job is not pushed."""
    transfer_sounds.push_unqueued = lambda transfer: None


def claim_by_pop() -> None:
    """A job leaves its list before it is anywhere else."""

    def claim(self: Any, wait: int) -> str | None:
        job = self.client.lpop(self.source)
        if job is not None:
            self.client.rpush(self.own, job)
        self._held.add(job)
        return job

    queues.Inbox.claim = claim


def no_second_look() -> None:
    """The slot's own list is not read at the start."""
    made = queues.Inbox.__init__

    def init(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self._unsure = False

    queues.Inbox.__init__ = init
    host.return_leftovers.__globals__["queues"].leftover_slots = lambda *_: []


def take_not_mine_again() -> None:
    """A batch that this host was unpacking when it died is not taken again."""
    whole = ledger.take

    def take(engine: Any, batch_id: str, name: str, capacity: int) -> Any:
        batch = ledger.find_batch(engine, batch_id)
        if batch is not None and batch.state == "unpacking":
            return ledger.Refused("it is unpacking", "drop")
        return whole(engine, batch_id, name, capacity)

    ledger.take = take


def seal_split() -> None:
    """The batch is ready before its items are there."""
    whole = ledger.seal

    def seal(engine: Any, batch_id: str, name: str, *rest: Any) -> Any:
        with engine.begin() as connection:
            connection.execute(text("UPDATE batches SET state = 'ready' WHERE batch_id = :id"), {"id": batch_id})
        with engine.begin() as connection:
            connection.execute(text("UPDATE batches SET state = 'unpacking' WHERE batch_id = :id"), {"id": batch_id})
        return whole(engine, batch_id, name, *rest)

    ledger.seal = seal


def publish_split() -> None:
    """The unpack job goes before the transcribe jobs are there."""
    whole = queues.Inbox.publish

    def publish(self: Any, job: str, *rest: Any) -> None:
        self.client.lrem(self.own, 0, job)
        whole(self, job, *rest)

    queues.Inbox.publish = publish


def publish_left_out() -> None:
    queues.Inbox.publish = lambda self, job, *rest: self.drop(job)


def finish_split() -> None:
    """An item is done before its results are entered."""
    whole = ledger.finish

    def finish(engine: Any, audio_id: int, key: str, result: Any) -> Any:
        done = "UPDATE audio_files SET state = :state, s3_opus_path = :key WHERE audio_id = :id AND state = :was"
        with engine.begin() as connection:
            values = {"state": "done", "was": "pending", "key": key, "id": audio_id}
            connection.execute(text(done), values)
        with engine.begin() as connection:
            connection.execute(text(done), {"state": "pending", "was": "done", "key": key, "id": audio_id})
        return whole(engine, audio_id, key, result)

    ledger.finish = finish


def finish_without_completing() -> None:
    """The last item does not complete its batch."""
    whole = ledger.finish

    def finish(engine: Any, *rest: Any) -> Any:
        settled = whole(engine, *rest)
        with engine.begin() as connection:
            connection.execute(text("UPDATE batches SET state = 'ready' WHERE state = 'complete' AND host IS NOT NULL"))
        return settled

    ledger.finish = finish


def finish_before_put() -> None:
    """An item is done before its object is in the store."""
    whole = ledger.finish
    pending: dict[int, Any] = {}

    def upload_opus(path: Any, audio_id: int, date: str, **more: Any) -> str:
        pending[audio_id] = (path.read_bytes(), more["bucket"])
        return f"processed/{date}/{audio_id}.opus"

    def finish(engine: Any, audio_id: int, key: str, result: Any) -> Any:
        settled = whole(engine, audio_id, key, result)
        content, bucket = pending[audio_id]
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=content)
        return settled

    ledger.finish, s3_utils.upload_opus = finish, upload_opus


def ack_split() -> None:
    """The job is dropped before the batch's counter is raised."""
    whole = queues.Inbox.ack

    def ack(self: Any, job: str, *rest: Any) -> bool:
        self.client.lrem(self.own, 0, job)
        return whole(self, job, *rest)

    queues.Inbox.ack = ack


def ack_before_finish() -> None:
    """The job is acknowledged before the ledger has the result."""
    whole = gpu_worker.Slot._settle

    def settle(self: Any, work: Any) -> None:
        self.client = self.inbox.client.lrem(self.inbox.own, 0, work.job)
        whole(self, work)

    gpu_worker.Slot._settle = settle


def tidy_releases_first() -> None:
    """The host lets go of a batch before its keys and folder are gone."""

    def tidy_batch(here: Any, batch_id: str) -> None:
        if not ledger.holds(here.engine, batch_id, here.name):
            ledger.release(here.engine, batch_id, here.name)
            host.scratch.cleanup_scratch(batch_id, root=here.scratch)
            queues.forget_batch(here.client, batch_id)

    host.tidy_batch = gpu_worker.tidy_batch = tidy_batch


def tidy_left_out() -> None:
    host.tidy_batch = gpu_worker.tidy_batch = lambda *_, **__: None


# The worker that takes the step, the mutant, and the effect around which a kill should show it: the search begins
# there, to be quick.
MUTANTS: list[tuple[str, Callable[[], None], str]] = [
    ("transfer", mint_split, "sql INSERT INTO source_files"),
    ("transfer", uploaded_before_upload, "s3 PUT"),
    ("transfer", no_push_at_start, "redis RPUSH"),
    ("unpack", claim_by_pop, "redis RPUSH"),
    ("unpack", no_second_look, "sql"),
    ("unpack", take_not_mine_again, "s3 GET"),
    ("unpack", seal_split, "sql UPDATE batches"),
    ("unpack", publish_split, "redis EVALSHA"),
    ("unpack", publish_left_out, "redis"),
    ("gpu", claim_by_pop, "redis RPUSH"),
    ("gpu", finish_split, "sql UPDATE audio_files SET state"),
    ("gpu", finish_without_completing, "sql"),
    ("gpu", finish_before_put, "s3 PUT"),
    ("gpu", ack_split, "redis EVALSHA"),
    ("gpu", ack_before_finish, "s3 PUT"),
    ("gpu", tidy_releases_first, "redis DEL"),
    ("gpu", tidy_left_out, "redis"),
]
