"""Dead letters: what was set aside with a reason, until an operator retries it or accepts it (drops it)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, text

from lab_audio.errors import Permanent
from lab_audio.jobs import new_unpack_job
from lab_audio.ledger.connection import transaction

PAGE = 1000
BROKEN_ARCHIVE = "EXISTS (SELECT FROM unnest(flags) AS flag WHERE flag LIKE 'archive:%')"
DEAD_BATCH = f"(state = 'failed' OR state = 'complete' AND flags <> '{{}}' AND {BROKEN_ARCHIVE})"
# A batch b whose archive may go `:days` after its end: nothing in it is dead, or all that is was dropped.
EXPIRED = (
    "state = 'complete' AND complete_at <= now() - make_interval(days => :days)"
    f" AND (dropped_at IS NOT NULL OR flags = '{{}}' OR :days > 0 AND NOT {BROKEN_ARCHIVE})"
    " AND NOT EXISTS (SELECT FROM audio_files a WHERE a.batch_id = b.batch_id AND a.state = 'dead'"
    " AND a.dropped_at IS NULL)"
)


@dataclass(frozen=True)
class DeadLetter:
    """`name`: audio_id of a recording, batch_id of a batch, `payload-...` of a payload without a row.

    `since`: when it was set aside; `dropped_at`: when an operator accepted that.
    """

    kind: str
    name: str
    batch_id: str | None
    member: str | None
    reason: str | None
    attempts: int | None = None
    host: str | None = None
    since: datetime | None = None
    dropped_at: datetime | None = None


def dead_batches(engine: Engine, *, dropped: bool) -> list[DeadLetter]:
    """Failed batches, and complete ones whose archive is a broken tar, newest first; with `dropped` also those."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT batch_id, coalesce(reason, array_to_string(flags, '; ')) AS reason, attempts, host,"
                " coalesce(failed_at, complete_at) AS since, dropped_at"
                f" FROM batches WHERE {DEAD_BATCH} AND (:dropped OR dropped_at IS NULL) ORDER BY batch_id DESC"
            ),
            {"dropped": dropped},
        ).all()
    return [DeadLetter("batch", row[0], row[0], None, *row[1:]) for row in rows]


def dead_recordings(engine: Engine, *, dropped: bool) -> Iterator[DeadLetter]:
    """Dead recordings, newest batches first; with `dropped` also those (reads the whole table).

    They are read a page at a time: a slow reader holds no transaction.
    """
    last: dict[str, Any] = {"batch": None, "id": None}
    while True:
        with transaction(engine) as connection:
            rows = connection.execute(
                text(
                    "SELECT audio_id, batch_id, member, reason, attempts, host, settled_at, dropped_at"
                    " FROM audio_files WHERE state = 'dead'"
                    + ("" if dropped else " AND dropped_at IS NULL")  # said plainly, for the partial index
                    + ("" if last["id"] is None else " AND (batch_id, audio_id) < (:batch, :id)")
                    + f" ORDER BY batch_id DESC, audio_id DESC LIMIT {PAGE}"
                ),
                last,
            ).all()
        yield from (DeadLetter("recording", str(row[0]), *row[1:]) for row in rows)
        if len(rows) < PAGE:
            return
        last = {"batch": rows[-1].batch_id, "id": rows[-1].audio_id}


def whole_recording(engine: Engine, audio_id: int) -> dict[str, Any] | None:
    """Everything known of a recording, and of its batch what decides whether it can be tried again."""
    with transaction(engine) as connection:
        row = connection.execute(
            text(
                "SELECT a.audio_id, a.state, a.reason, a.attempts, a.host, a.batch_id, a.member, a.item,"
                " a.original_filename, a.seconds, a.date::text, a.settled_at, a.dropped_at,"
                " b.state AS batch_state, b.host AS batch_host, b.archive_gone_at"
                " FROM audio_files a JOIN batches b USING (batch_id) WHERE a.audio_id = :id"
            ),
            {"id": audio_id},
        ).one_or_none()
    return dict(row._mapping) if row else None


def whole_batch(engine: Engine, batch_id: str) -> dict[str, Any] | None:
    """Everything known of a batch, with how many of its recordings are in each state."""
    with transaction(engine) as connection:
        row = connection.execute(
            text(
                "SELECT batch_id, state, reason, flags, attempts, host, source, sha256, size, file_count,"
                " minted_at, uploaded_at, unpacking_at, ready_at, complete_at, failed_at, dropped_at, archive_gone_at,"
                " pending, done, dead FROM batches CROSS JOIN LATERAL"
                " (SELECT count(*) FILTER (WHERE state = 'pending') AS pending,"
                " count(*) FILTER (WHERE state = 'done') AS done, count(*) FILTER (WHERE state = 'dead') AS dead"
                " FROM audio_files a WHERE a.batch_id = batches.batch_id) AS recordings WHERE batch_id = :id"
            ),
            {"id": batch_id},
        ).one_or_none()
    return dict(row._mapping) if row else None


def retry(engine: Engine, batch_id: str, audio_ids: Collection[int] | None = None) -> int:
    """RETRY: dead recordings of a batch (None: all of them) are pending again, and an ended batch is unpacked anew.

    Returns how many recordings were dead; the batch's job is then to be pushed. One that is `uploaded` stays so. One
    whose archive was broken is read again: it was perhaps not to be read as it was.
    The archive must be in the store: of a failed batch, which retention leaves alone, it may have been put back.
    Raises Permanent where the batch is still at work, its archive was deleted, or nothing of it is dead.
    """
    with transaction(engine) as connection:
        batch = connection.execute(
            text(
                "SELECT state, host, job, file_count, archive_gone_at,"
                f" {BROKEN_ARCHIVE} AS broken FROM batches WHERE batch_id = :id FOR UPDATE"
            ),
            {"id": batch_id},
        ).one_or_none()
        if batch is None:
            raise Permanent("no such batch")
        if batch.state not in ("uploaded", "complete", "failed") or batch.host is not None:
            where = f"{batch.state}{f' on {batch.host}' if batch.host else ''}"
            raise Permanent(f"batch {batch_id} is still at work ({where}): retry when it has ended and is tidied")
        if batch.archive_gone_at is not None and batch.state != "failed":
            raise Permanent(f"the archive of batch {batch_id} was deleted on {batch.archive_gone_at:%Y-%m-%d}")
        dead = connection.execute(
            text(
                "UPDATE audio_files SET state = 'pending', attempts = 0, reason = NULL, settled_at = NULL,"
                " dropped_at = NULL WHERE batch_id = :id AND state = 'dead'"
                + ("" if audio_ids is None else " AND audio_id = ANY(:audio_ids)")
            ),
            {"id": batch_id, "audio_ids": list(audio_ids or ())},
        ).rowcount
        if batch.state == "complete" and not dead and not batch.broken:
            raise Permanent(f"no recording in batch {batch_id} is dead")
        if batch.state != "uploaded":
            connection.execute(
                text(
                    "UPDATE batches SET state = 'uploaded', uploaded_at = now(), attempts = 0, reason = NULL,"
                    " quota = NULL, complete_at = NULL, failed_at = NULL, dropped_at = NULL, archive_gone_at = NULL,"
                    " job = coalesce(job, :job) WHERE batch_id = :id"
                ),
                {"id": batch_id, "job": new_unpack_job(batch_id, batch.file_count or 0)},
            )
        return dead


def drop_recording(engine: Engine, audio_id: int) -> bool:
    """Accept that a recording is dead. False if it is not."""
    with transaction(engine) as connection:
        return (
            connection.execute(
                text(
                    "UPDATE audio_files SET dropped_at = coalesce(dropped_at, now())"
                    " WHERE audio_id = :id AND state = 'dead'"
                ),
                {"id": audio_id},
            ).rowcount
            > 0
        )


def drop_batch(engine: Engine, batch_id: str) -> int | None:
    """Accept that a batch failed or that its archive is broken, and each dead recording in it.

    Returns how many recordings are dead; None if neither the batch nor any of them is.
    """
    with transaction(engine) as connection:
        batch = connection.execute(
            text(f"UPDATE batches SET dropped_at = coalesce(dropped_at, now()) WHERE batch_id = :id AND {DEAD_BATCH}"),
            {"id": batch_id},
        ).rowcount
        recordings = connection.execute(
            text(
                "UPDATE audio_files SET dropped_at = coalesce(dropped_at, now())"
                " WHERE batch_id = :id AND state = 'dead'"
            ),
            {"id": batch_id},
        ).rowcount
        return recordings if batch or recordings else None


@contextmanager
def holding_dead(engine: Engine, audio_id: int) -> Iterator[bool]:
    """Hold a recording's batch; yields whether the recording is dead and in its archive, so that its object may go.

    Without the hold it could be retried and done meanwhile, and a late deletion would take its new object.
    """
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))  # a store may take its time
        archived = connection.execute(
            text(
                "SELECT archive_gone_at IS NULL FROM batches"
                " WHERE batch_id = (SELECT batch_id FROM audio_files WHERE audio_id = :id) FOR UPDATE"
            ),
            {"id": audio_id},
        ).scalar_one_or_none()
        state = connection.execute(
            text("SELECT state FROM audio_files WHERE audio_id = :id"), {"id": audio_id}
        ).scalar_one_or_none()
        yield bool(archived) and state == "dead"


def expire_archive(engine: Engine, batch_id: str, *, days: int = 0, dry_run: bool = False) -> bool:
    """Whether an archive is to be deleted now; notes, before it is, that the batch is without it.

    That is the archive of a batch that has been complete for `days`. One with a dead recording, or that is a broken
    tar, is kept until that is dropped; with any flag it does not go at once. One that was noted before is to be
    deleted still: the deletion was cut short.
    """
    with transaction(engine) as connection:
        connection.execute(text("SELECT FROM batches WHERE batch_id = :id FOR UPDATE"), {"id": batch_id})
        expired = connection.execute(
            text(
                f"SELECT archive_gone_at IS NOT NULL OR {EXPIRED} FROM batches b"
                " WHERE batch_id = :id AND state = 'complete'"
            ),
            {"id": batch_id, "days": days},
        ).scalar_one_or_none()
        if expired and not dry_run:
            connection.execute(
                text("UPDATE batches SET archive_gone_at = coalesce(archive_gone_at, now()) WHERE batch_id = :id"),
                {"id": batch_id},
            )
        return bool(expired)
