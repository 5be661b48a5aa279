"""What reconcile and restore ask of the ledger, and the rows that they make from what the stores hold."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from sqlalchemy import Connection, Engine, text

from lab_audio.contracts import SourceFile
from lab_audio.ledger.batches import Archive
from lab_audio.ledger.connection import transaction

SEQUENCE = "pg_get_serial_sequence('audio_files', 'audio_id')"
SPARE_IDS = 1_000_000


@dataclass(frozen=True)
class Recording:
    """A row of audio_files, as far as its object is concerned."""

    audio_id: int
    batch_id: str | None
    batch_state: str | None
    state: str
    s3_opus_path: str | None
    settled_at: datetime | None

    def needs(self, key: str) -> bool:
        """Whether an object under this key is this recording's, or may be so yet."""
        if self.state == "pending":
            return self.batch_state != "failed"
        return self.state == "done" and self.s3_opus_path in (None, key)


RECORDING = (
    "SELECT audio_id, batch_id, b.state AS batch_state, a.state, s3_opus_path, settled_at"
    " FROM audio_files a LEFT JOIN batches b USING (batch_id)"
)


def ready_batches(engine: Engine) -> list[tuple[str, str]]:
    """(batch_id, host) of every batch that is at the GPU workers."""
    with transaction(engine) as connection:
        rows = connection.execute(text("SELECT batch_id, host FROM batches WHERE state = 'ready' ORDER BY batch_id"))
        return [(row.batch_id, row.host) for row in rows]


def pending_items(engine: Engine, batch_id: str) -> list[tuple[str, str]]:
    """(item, original_filename) of each item of a batch without a result."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text("SELECT item, original_filename FROM audio_files WHERE batch_id = :id AND state = 'pending'"),
            {"id": batch_id},
        )
        return [(row.item, row.original_filename) for row in rows]


def batch_states(engine: Engine, batch_ids: Collection[str]) -> dict[str, str]:
    """The state of each of these batches that the ledger knows."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text("SELECT batch_id, state FROM batches WHERE batch_id = ANY(:ids)"), {"ids": list(batch_ids)}
        )
        return {row.batch_id: row.state for row in rows}


def keyless_batches(engine: Engine, batch_ids: Collection[str]) -> list[str]:
    """Those of these batches that should have no keys in Redis: nobody has them in hand."""
    with transaction(engine) as connection:
        kept = connection.execute(
            text("SELECT batch_id FROM batches WHERE batch_id = ANY(:ids) AND host IS NOT NULL"),
            {"ids": list(batch_ids)},
        ).scalars()
        return sorted(set(batch_ids) - set(kept))


def entered_dates(engine: Engine) -> list[str]:
    """The dates (YYYY-MM-DD) on which recordings were entered, at the cost of a look into the index for each."""
    with transaction(engine) as connection:
        return list(
            connection.execute(
                text(
                    "WITH RECURSIVE day (date) AS (SELECT min(date) FROM audio_files UNION ALL"
                    " SELECT (SELECT min(a.date) FROM audio_files a WHERE a.date > day.date) FROM day"
                    " WHERE day.date IS NOT NULL) SELECT date::text FROM day WHERE date IS NOT NULL"
                )
            ).scalars()
        )


def recordings_of(engine: Engine, date: str) -> dict[int, Recording]:
    """Recordings by audio_id that were entered on a date."""
    with transaction(engine) as connection:
        rows = connection.execute(text(f"{RECORDING} WHERE date = CAST(:date AS date)"), {"date": date})
        return {row.audio_id: Recording(*row) for row in rows}


def recording(engine: Engine, audio_id: int) -> Recording | None:
    with transaction(engine) as connection:
        row = connection.execute(text(f"{RECORDING} WHERE audio_id = :id"), {"id": audio_id}).one_or_none()
        return Recording(*row) if row else None


def other_sessions(engine: Engine) -> list[str]:
    """Where other processes of lab_audio are connected to the ledger from."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT DISTINCT coalesce(host(client_addr), 'this host') FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'lab-audio' AND pid <> pg_backend_pid()"
            )
        )
        return sorted(rows.scalars())


def known_hosts(engine: Engine) -> list[str]:
    """Every host that the ledger has a row of, or that has a batch."""
    with transaction(engine) as connection:
        return list(
            connection.execute(
                text(
                    "SELECT host FROM hosts WHERE seen_at IS NOT NULL"
                    " UNION SELECT host FROM batches WHERE host IS NOT NULL ORDER BY host"
                )
            ).scalars()
        )


def spare_ids(engine: Engine, highest: int) -> int:
    """Move the sequence of audio_id so far beyond the highest that the store knows that none is given out twice.

    Recordings that were entered and have no object are not known there: hence the room. Returns the last id before
    the next.
    """
    with transaction(engine) as connection:
        used = connection.execute(text("SELECT coalesce(max(audio_id), 0) FROM audio_files")).scalar_one()
        if highest <= used:
            highest = used
        last = highest + SPARE_IDS
        sequence = connection.execute(text(f"SELECT {SEQUENCE}")).scalar_one()
        now = connection.execute(text(f"SELECT last_value FROM {sequence}")).scalar_one()
        if now < last:
            connection.execute(text(f"SELECT setval('{sequence}', :last)"), {"last": last})
        return max(int(now), last)


def archived_batches(engine: Engine) -> list[str]:
    """Batches whose archive should be in the store, or has been: of minted ones those with recordings, of failed ones
    those with recordings that wait.
    """
    with transaction(engine) as connection:
        return list(
            connection.execute(
                text(
                    "SELECT batch_id FROM batches b WHERE archive_gone_at IS NULL"
                    " AND (state NOT IN ('minted', 'failed') OR EXISTS"
                    " (SELECT FROM audio_files a WHERE a.batch_id = b.batch_id"
                    " AND (b.state = 'minted' OR a.state = 'pending'))) ORDER BY batch_id"
                )
            ).scalars()
        )


def open_without_archive(engine: Engine, gone: Collection[str], reopened: Collection[str]) -> list[str]:
    """Batches to be unpacked from their Opus, of which no source is known.

    `gone`, `reopened`: batches whose archive is found to be gone, and that are unpacked anew, which the ledger may not
    have noted yet. It may not know them, either.
    """
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT batch_id, source IS NULL AND (archive_gone_at IS NOT NULL OR batch_id = ANY(:gone)) AND"
                " (state IN ('uploaded', 'unpacking', 'ready') OR batch_id = ANY(:reopened)) AS without FROM batches"
                " WHERE archive_gone_at IS NOT NULL OR batch_id = ANY(:gone) OR batch_id = ANY(:reopened)"
            ),
            {"gone": list(gone), "reopened": list(reopened)},
        ).all()
    unknown = set(gone) & set(reopened) - {row.batch_id for row in rows}
    return sorted({row.batch_id for row in rows if row.without} | unknown)


def without_all_sources(engine: Engine) -> list[str]:
    """Batches to be unpacked with fewer source files than recordings; one that was a .tar there has one file."""
    with transaction(engine) as connection:
        return list(
            connection.execute(
                text(
                    "SELECT b.batch_id FROM batches b LEFT JOIN source_files s"
                    " ON s.batch_id = b.batch_id AND s.struck IS NULL"
                    " WHERE b.state = 'uploaded' AND b.source IS NOT NULL GROUP BY b.batch_id"
                    " HAVING count(s.path) < b.file_count AND NOT coalesce("
                    "bool_or(lower(encode(substring(s.path FROM length(s.path) - 3), 'escape')) = '.tar'), false)"
                    " ORDER BY b.batch_id"
                )
            ).scalars()
        )


def unknown_sources(engine: Engine, batch_ids: Collection[str]) -> list[str]:
    """Those of these batches that the ledger does not know, or of which it knows no source."""
    with transaction(engine) as connection:
        known = connection.execute(
            text("SELECT batch_id FROM batches WHERE batch_id = ANY(:ids) AND source IS NOT NULL"),
            {"ids": list(batch_ids)},
        ).scalars()
        return sorted(set(batch_ids) - set(known))


def adopt_archive(
    engine: Engine,
    batch_id: str,
    job: str,
    archive: Archive,
    source: str | None,
    files: Sequence[SourceFile],
    damage: str | None,
    *,
    dry_run: bool,
) -> bool:
    """Enter a batch that the ledger has forgotten, with the source files that are in its archive. One that is known
    gets its source, if that was unknown. False if nothing is new.

    A file that the ledger still gives to a batch that was only minted is in this one since: it is struck there.
    With `damage` the batch is entered as failed, for this reason.
    """
    with transaction(engine) as connection, _kept(connection, dry_run=dry_run):
        entered = connection.execute(
            text(
                "INSERT INTO batches"
                " (batch_id, state, job, sha256, size, file_count, source, uploaded_at, reason, failed_at)"
                " VALUES (:id, CASE WHEN :damage IS NULL THEN 'uploaded' ELSE 'failed' END, :job, :sha256, :size,"
                " :count, :source, now(), :damage, CASE WHEN :damage IS NULL THEN NULL ELSE now() END)"
                " ON CONFLICT (batch_id) DO UPDATE SET source = excluded.source"
                " WHERE batches.source IS NULL AND excluded.source IS NOT NULL"
            ),
            {
                "id": batch_id,
                "job": job,
                "sha256": archive.sha256,
                "size": archive.size,
                "count": archive.file_count,
                "source": source,
                "damage": damage,
            },
        ).rowcount
        if not entered or source is None:
            return entered > 0
        values = {
            "id": batch_id,
            "source": source,
            "paths": [os.fsencode(file.path) for file in files],
            "sizes": [file.size for file in files],
            "mtimes": [file.mtime_ns for file in files],
        }
        files_of_it = (
            "unnest(CAST(:paths AS bytea[]), CAST(:sizes AS bigint[]), CAST(:mtimes AS bigint[]))"
            " AS f (path, size, mtime_ns)"
        )
        connection.execute(
            text(
                f"UPDATE source_files s SET struck = 'is in batch ' || :id FROM {files_of_it}, batches b"
                " WHERE s.source = :source AND s.path = f.path AND s.size = f.size AND s.mtime_ns = f.mtime_ns"
                " AND s.struck IS NULL AND b.batch_id = s.batch_id AND b.state = 'minted'"
            ),
            values,
        )
        connection.execute(
            text(
                "INSERT INTO source_files (batch_id, source, path, size, mtime_ns)"
                f" SELECT :id, :source, path, size, mtime_ns FROM {files_of_it} ON CONFLICT DO NOTHING"
            ),
            values,
        )
        return True


@contextmanager
def _kept(connection: Connection, *, dry_run: bool) -> Iterator[None]:
    """What happens in this block is kept; in a dry run it is undone."""
    savepoint = connection.begin_nested()
    yield
    savepoint.rollback() if dry_run else savepoint.commit()


def adopt_recording(
    engine: Engine, audio_id: int, date: str, batch_id: str, member: str, item: str, job: str, *, dry_run: bool
) -> bool:
    """Enter a recording whose object the ledger knows nothing of, or believes dead, as pending; its batch is unpacked
    anew. A batch that is unknown has no archive any more. False if another recording has this place already.
    """
    with transaction(engine) as connection, _kept(connection, dry_run=dry_run):
        connection.execute(
            text(
                "INSERT INTO batches (batch_id, state, job, uploaded_at, archive_gone_at)"
                " VALUES (:id, 'uploaded', :job, now(), now()) ON CONFLICT DO NOTHING"
            ),
            {"id": batch_id, "job": job},
        )
        _lock(connection, batch_id)
        values = {
            "audio_id": audio_id,
            "id": batch_id,
            "member": member,
            "item": item,
            "name": PurePosixPath(member).name,
            "date": date,
        }
        changed = connection.execute(
            text(
                "INSERT INTO audio_files (audio_id, batch_id, member, item, original_filename, date, state)"
                " VALUES (:audio_id, :id, :member, :item, :name, CAST(:date AS date), 'pending') ON CONFLICT DO NOTHING"
            ),
            values,
        ).rowcount
        changed += connection.execute(
            text(
                "UPDATE audio_files SET state = 'pending', attempts = 0, reason = NULL, settled_at = NULL,"
                " dropped_at = NULL WHERE audio_id = :audio_id AND batch_id = :id AND item = :item AND state = 'dead'"
            ),
            values,
        ).rowcount
        if changed:
            connection.execute(
                text(
                    "UPDATE batches SET state = 'uploaded', host = NULL, quota = NULL, attempts = 0, reason = NULL,"
                    " job = coalesce(job, :job) WHERE batch_id = :id AND state IN ('complete', 'failed')"
                ),
                {"id": batch_id, "job": job},
            )
        return changed > 0


def note_archive_gone(engine: Engine, batch_id: str, job: str) -> None:
    """Note that a batch's archive is not in the store; one that was only minted has been through all the same, and one
    that failed is unpacked from what is kept of it.
    """
    with transaction(engine) as connection:
        _lock(connection, batch_id)
        connection.execute(
            text(
                "UPDATE batches SET archive_gone_at = coalesce(archive_gone_at, now()), job = coalesce(job, :job),"
                " uploaded_at = coalesce(uploaded_at, now()), reason = NULL, failed_at = NULL,"
                " attempts = CASE state WHEN 'failed' THEN 0 ELSE attempts END,"
                " state = CASE WHEN state IN ('minted', 'failed') THEN 'uploaded' ELSE state END WHERE batch_id = :id"
            ),
            {"id": batch_id, "job": job},
        )


def _lock(connection: Connection, batch_id: str) -> None:
    connection.execute(text("SELECT FROM batches WHERE batch_id = :id FOR UPDATE"), {"id": batch_id})
