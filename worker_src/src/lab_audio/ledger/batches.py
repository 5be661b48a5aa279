"""Batches: minted, uploaded, unpacking, ready, complete; or failed, with a reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, text

from lab_audio.contracts import processed_key
from lab_audio.ledger.connection import transaction
from lab_audio.ledger.hosts import EVERYWHERE, SILENT_AFTER
from lab_audio.scratch import estimated_room


@dataclass(frozen=True)
class Archive:
    """What is known of an archive: bytes, SHA-256 in hex, and how many recordings the job promised."""

    sha256: str | None
    size: int | None
    file_count: int | None


@dataclass(frozen=True)
class Batch:
    batch_id: str
    state: str
    host: str | None
    reason: str | None


@dataclass(frozen=True)
class Taken:
    """A batch that is this host's to unpack, for the n-th time. `settled`: items that are done or dead.

    `quota`: bytes of scratch set aside for it here. `archive_gone`: its archive was deleted on purpose.
    """

    archive: Archive
    settled: frozenset[str]
    attempts: int
    quota: int
    flags: list[str]
    archive_gone: bool


@dataclass(frozen=True)
class Refused:
    """A batch that is not to be unpacked here now. `job`: what is to become of it.

    Back to the `head` of the list while this host takes nothing; to its `tail` while another host has the batch,
    which may yet give it back; `drop` where nobody needs it.
    """

    why: str
    job: Literal["head", "tail", "drop"]


@dataclass(frozen=True)
class NewItem:
    """A member as unpack leaves it: with its length in seconds, or with the reason why it is dead.

    `room`: bytes that it takes on scratch, with its result.
    """

    member: str
    item: str
    original_filename: str
    seconds: float | None = None
    reason: str | None = None
    room: int = 0


@dataclass(frozen=True)
class Publication:
    """What Redis is to be told of a ready batch. `pending`: (item, original_filename) of each item without a result."""

    total: int
    processed: int
    pending: list[tuple[str, str]]


def _locked(connection: Connection, batch_id: str) -> Row[Any] | None:
    return connection.execute(
        text(
            "SELECT state, host, sha256, size, file_count, quota, flags, archive_gone_at IS NOT NULL AS archive_gone"
            " FROM batches WHERE batch_id = :id FOR UPDATE"
        ),
        {"id": batch_id},
    ).one_or_none()


def find_batch(engine: Engine, batch_id: str) -> Batch | None:
    with transaction(engine) as connection:
        row = connection.execute(
            text("SELECT batch_id, state, host, reason FROM batches WHERE batch_id = :id"), {"id": batch_id}
        ).one_or_none()
    return Batch(*row) if row else None


def adopt(engine: Engine, batch_id: str, job: str, archive: Archive) -> None:
    """Enter a batch that another program uploaded; one that is known stays as it is."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO batches (batch_id, state, job, sha256, size, file_count, uploaded_at)"
                " VALUES (:id, 'uploaded', :job, :sha256, :size, :file_count, now()) ON CONFLICT DO NOTHING"
            ),
            {
                "id": batch_id,
                "job": job,
                "sha256": archive.sha256,
                "size": archive.size,
                "file_count": archive.file_count,
            },
        )


def take(engine: Engine, batch_id: str, host: str, capacity: int) -> Taken | Refused:
    """Make an uploaded batch this host's; one that it was already unpacking is its own still.

    `capacity`: bytes that batches may fill of this host's scratch. What they fill is set aside for them as long as
    they are this host's, and a batch is refused while there is no room for it.
    """
    with transaction(engine) as connection:
        paused, gpu, most_here = connection.execute(
            text(
                "UPDATE hosts SET scratch_bytes = greatest(scratch_bytes, :capacity) WHERE host = :host"
                " RETURNING paused OR EXISTS (SELECT FROM hosts WHERE host = :all AND paused),"
                f" coalesce(gpu_seen_at > now() - {SILENT_AFTER}, false), scratch_bytes"
            ),
            {"host": host, "all": EVERYWHERE, "capacity": capacity},
        ).one()
        if paused:
            return Refused(f"{host} is paused", "head")
        if not gpu:
            return Refused(f"no gpu worker was seen on {host} in the last two minutes", "head")
        batch = _locked(connection, batch_id)
        if batch is None:
            return Refused("it is unknown", "drop")
        if batch.state != "uploaded" and not (batch.state == "unpacking" and batch.host == host):
            why = f"it is {batch.state}" + (f" on {batch.host}" if batch.host else "")
            return Refused(why, "tail" if batch.state == "unpacking" else "drop")
        quota, largest = batch.quota, _largest_quota(connection, host)
        if quota is None:  # what seems to need more may well do with half of the largest scratch
            quota = min((largest + 1) // 2, estimated_room(batch.size or 0, batch.file_count or 0))
        quota = min(quota, largest)  # which may have been another host's that is lost
        room = capacity - _reserved(connection, host, batch_id)
        if batch.host != host and quota > room:
            why = f"it needs {quota} bytes of scratch, {max(0, room)} are free for it on {host}"
            return Refused(why, "head" if room < capacity and quota <= most_here else "tail")
        attempts = connection.execute(
            text(
                "UPDATE batches SET state = 'unpacking', host = :host, quota = :quota, unpacking_at = now(),"
                " attempts = attempts + CASE state WHEN 'unpacking' THEN 0 ELSE 1 END"
                " WHERE batch_id = :id RETURNING attempts"
            ),
            {"id": batch_id, "host": host, "quota": quota},
        ).scalar_one()
        settled = connection.execute(
            text("SELECT item FROM audio_files WHERE batch_id = :id AND state <> 'pending'"), {"id": batch_id}
        ).scalars()
        archive = Archive(batch.sha256, batch.size, batch.file_count)
        return Taken(archive, frozenset(settled), attempts, quota, batch.flags, batch.archive_gone)


def _reserved(connection: Connection, host: str, batch_id: str) -> int:
    """Bytes of a host's scratch that are set aside for other batches than this one."""
    return int(
        connection.execute(
            text("SELECT coalesce(sum(quota), 0) FROM batches WHERE host = :host AND batch_id <> :id"),
            {"id": batch_id, "host": host},
        ).scalar_one()
    )


def _largest_quota(connection: Connection, host: str) -> int:
    """Bytes that one batch may be given: nine tenths of the largest scratch, as what else is on that disk may grow."""
    largest = connection.execute(
        text("SELECT coalesce(max(scratch_bytes), 0) FROM hosts WHERE host = :host OR seen_at IS NOT NULL"),
        {"host": host},
    ).scalar_one()
    return max(1 << 20, int(largest) * 9 // 10)


def return_full(engine: Engine, batch_id: str, host: str, capacity: int) -> str | None:
    """Give back a batch that found no room on this host's scratch, uncounted; its folder must be gone.

    If its quota fits into `capacity` now, it was not others who had filled the disk: the batch has outgrown its quota
    and gets a larger one next time; one that had the largest is failed. Returns the reason of that.
    """
    with transaction(engine) as connection:
        batch = _locked(connection, batch_id)
        if batch is None or batch.state != "unpacking" or batch.host != host:
            return None
        quota, largest = batch.quota, _largest_quota(connection, host)
        if quota <= capacity - _reserved(connection, host, batch_id):
            if quota >= largest:
                reason = (
                    f"larger than scratch: it needs more than {quota} bytes, the most that any host has for a batch"
                )
                _fail(connection, batch_id, host, reason)
                return reason
            quota = min(2 * quota, largest)
        connection.execute(
            text(
                "UPDATE batches SET state = 'uploaded', host = NULL, quota = :quota, attempts = attempts - 1"
                " WHERE batch_id = :id"
            ),
            {"id": batch_id, "quota": quota},
        )
        return None


def kept_items(engine: Engine, batch_id: str) -> list[tuple[NewItem, str]]:
    """Items of a batch without a result, each with the key under which its Opus may be kept."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT audio_id, date::text, member, item, original_filename FROM audio_files"
                " WHERE batch_id = :id AND state = 'pending' ORDER BY member"
            ),
            {"id": batch_id},
        ).all()
    return [
        (NewItem(row.member, row.item, row.original_filename), processed_key(row.date, row.audio_id)) for row in rows
    ]


def seal(
    engine: Engine,
    batch_id: str,
    host: str,
    items: Collection[NewItem],
    archive: Archive,
    flags: Collection[str],
) -> str | None:
    """Enter all items of a batch at once. Returns its new state, `ready` or `complete`; None if it is no longer ours.

    Items that are settled stay as they are; one that is pending and not among these is dead, for it would be waited
    for without end. From now on no more scratch is set aside than the items take.
    """
    with transaction(engine) as connection:
        batch = _locked(connection, batch_id)
        if batch is None or batch.state != "unpacking" or batch.host != host:
            return None
        connection.execute(
            text(
                "INSERT INTO audio_files AS a"
                " (batch_id, member, item, original_filename, seconds, reason, state, date, settled_at)"
                " SELECT :id, member, item, name, seconds, reason,"
                " CASE WHEN reason IS NULL THEN 'pending' ELSE 'dead' END,"
                " (now() AT TIME ZONE 'UTC')::date, CASE WHEN reason IS NULL THEN NULL ELSE now() END"
                " FROM unnest(CAST(:members AS text[]), CAST(:items AS text[]), CAST(:names AS text[]),"
                " CAST(:seconds AS double precision[]), CAST(:reasons AS text[]))"
                " AS new (member, item, name, seconds, reason)"
                " ON CONFLICT (batch_id, member) DO UPDATE"
                " SET state = excluded.state, reason = coalesce(excluded.reason, a.reason),"
                " seconds = coalesce(excluded.seconds, a.seconds), settled_at = excluded.settled_at"
                " WHERE a.state = 'pending'"
            ),
            {
                "id": batch_id,
                "members": [i.member for i in items],
                "items": [i.item for i in items],
                "names": [i.original_filename for i in items],
                "seconds": [i.seconds for i in items],
                "reasons": [i.reason for i in items],
            },
        )
        connection.execute(
            text(
                "UPDATE audio_files SET state = 'dead', reason = 'is not in the archive', settled_at = now()"
                " WHERE batch_id = :id AND state = 'pending' AND item <> ALL(CAST(:items AS text[]))"
            ),
            {"id": batch_id, "items": [i.item for i in items]},
        )
        pending = connection.execute(
            text("SELECT EXISTS (SELECT FROM audio_files WHERE batch_id = :id AND state = 'pending')"),
            {"id": batch_id},
        ).scalar_one()
        state = "ready" if pending else "complete"
        connection.execute(
            text(
                f"UPDATE batches SET state = :state, ready_at = now(), complete_at = {'NULL' if pending else 'now()'},"
                " sha256 = :sha256, size = :size, flags = CAST(:flags AS text[]), quota = :quota, attempts = 0"
                " WHERE batch_id = :id"
            ),
            {
                "id": batch_id,
                "state": state,
                "sha256": archive.sha256,
                "size": archive.size,
                "flags": list(flags),
                "quota": sum(i.room for i in items),
            },
        )
        return state


def fail(engine: Engine, batch_id: str, host: str, reason: str) -> bool:
    """Give up a batch that this host was unpacking. False if it is no longer ours."""
    with transaction(engine) as connection:
        return _fail(connection, batch_id, host, reason)


def _fail(connection: Connection, batch_id: str, host: str, reason: str) -> bool:
    failed = connection.execute(
        text(
            "UPDATE batches SET state = 'failed', reason = :reason, failed_at = now()"
            " WHERE batch_id = :id AND state = 'unpacking' AND host = :host"
        ),
        {"id": batch_id, "host": host, "reason": reason},
    )
    return failed.rowcount > 0


@contextmanager
def publishing(engine: Engine, batch_id: str, host: str) -> Iterator[Publication | None]:
    """Hold a ready batch's row while Redis is told of it; None if it is not this host's to publish.

    The row lock keeps the batch from being completed, tidied or given away between the reading and the telling.
    """
    with transaction(engine) as connection:
        batch = _locked(connection, batch_id)
        if batch is None or batch.state != "ready" or batch.host != host:
            yield None
            return
        rows = connection.execute(
            text("SELECT item, original_filename, state FROM audio_files WHERE batch_id = :id ORDER BY member"),
            {"id": batch_id},
        ).all()
        pending = [(row.item, row.original_filename) for row in rows if row.state == "pending"]
        yield Publication(len(rows), len(rows) - len(pending), pending)


def give_back(engine: Engine, batch_id: str, host: str) -> None:
    """Make a batch whose scratch was removed `uploaded` again, if it is this host's."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "UPDATE batches SET state = 'uploaded', host = NULL, quota = NULL"
                " WHERE batch_id = :id AND state IN ('unpacking', 'ready') AND host = :host"
            ),
            {"id": batch_id, "host": host},
        )


def waiting_job(engine: Engine, batch_id: str) -> str | None:
    """The job of a batch that waits to be unpacked, as pushed; None if it does not wait."""
    with transaction(engine) as connection:
        job: str | None = connection.execute(
            text("SELECT job FROM batches WHERE batch_id = :id AND state = 'uploaded'"), {"id": batch_id}
        ).scalar_one_or_none()
        return job


def holds(engine: Engine, batch_id: str, host: str) -> bool:
    """Whether the ledger gives this host a folder for the batch."""
    with transaction(engine) as connection:
        return bool(
            connection.execute(
                text(
                    "SELECT EXISTS (SELECT FROM batches WHERE batch_id = :id AND host = :host"
                    " AND state IN ('unpacking', 'ready'))"
                ),
                {"id": batch_id, "host": host},
            ).scalar_one()
        )


def held_batches(engine: Engine, host: str) -> set[str]:
    """Batches whose folders the ledger gives this host."""
    with transaction(engine) as connection:
        return set(
            connection.execute(
                text("SELECT batch_id FROM batches WHERE host = :host AND state IN ('unpacking', 'ready')"),
                {"host": host},
            ).scalars()
        )


def leaving_batches(engine: Engine, host: str) -> list[str]:
    """Batches that ended here and whose folder and Redis keys are still to go."""
    with transaction(engine) as connection:
        return list(
            connection.execute(
                text("SELECT batch_id FROM batches WHERE host = :host AND state IN ('complete', 'failed')"),
                {"host": host},
            ).scalars()
        )


def release(engine: Engine, batch_id: str, host: str) -> None:
    """Note that nothing of an ended batch is left on this host."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "UPDATE batches SET host = NULL, quota = NULL"
                " WHERE batch_id = :id AND host = :host AND state IN ('complete', 'failed')"
            ),
            {"id": batch_id, "host": host},
        )
