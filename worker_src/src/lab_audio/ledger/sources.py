"""Source files: each belongs to one batch, minted in the ledger before anything moves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone

from sqlalchemy import Connection, Engine, Row, text

from lab_audio.contracts import SourceFile
from lab_audio.ledger.batches import Archive
from lab_audio.ledger.connection import transaction, translated

FILES = (
    "unnest(CAST(:paths AS bytea[]), CAST(:sizes AS bigint[]), CAST(:mtimes AS bigint[])) AS f (path, size, mtime_ns)"
)
KNOWN = (
    "EXISTS (SELECT FROM source_files s WHERE s.source = :source AND s.path = f.path AND s.size = f.size"
    " AND s.mtime_ns = f.mtime_ns AND s.struck IS NULL)"
)


@dataclass(frozen=True)
class Mint:
    """A batch and the source files that are its own, by path."""

    batch_id: str
    files: list[SourceFile]


def _columns(files: Sequence[SourceFile]) -> dict[str, list[bytes] | list[int]]:
    return {
        "paths": [os.fsencode(f.path) for f in files],
        "sizes": [f.size for f in files],
        "mtimes": [f.mtime_ns for f in files],
    }


def _files(rows: Collection[Row[tuple[memoryview, int, int]]]) -> list[SourceFile]:
    return [SourceFile(os.fsdecode(bytes(row.path)), row.size, row.mtime_ns) for row in rows]


@contextmanager
def lock_source(engine: Engine, source: str) -> Iterator[Connection | None]:
    """Hold a source for this process alone; None if another has it. Lost with the connection that is yielded."""
    with translated(engine), engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        parameters = {"source": source}
        got = connection.execute(
            text("SELECT pg_try_advisory_lock(hashtextextended('lab_audio source ' || :source, 0))"),
            parameters,
        ).scalar_one()
        try:
            yield connection if got else None
        finally:
            connection.invalidate()


def mint(engine: Engine, source: str, files: Sequence[SourceFile], *, most_files: int, most_bytes: int) -> Mint | None:
    """Make one batch of those files that no batch has yet, up to the limits; None if there are none.

    The batch's id is the time of minting and the start of the SHA-256 of its manifest.
    A `.tar` at the source is an archive already and makes a batch of its own.
    """
    with transaction(engine) as connection:
        fresh = _files(
            connection.execute(
                text(f"SELECT f.path, f.size, f.mtime_ns FROM {FILES} WHERE NOT {KNOWN} ORDER BY f.path"),
                {"source": source, **_columns(files)},
            ).all()
        )
        chosen = _first_batch(fresh, most_files, most_bytes)
        if not chosen:
            return None
        manifest = hashlib.sha256(source.encode())
        for file in chosen:
            manifest.update(b"\0%b\0%d\0%d" % (os.fsencode(file.path), file.size, file.mtime_ns))
        entered = 0
        while not entered:
            batch_id = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{manifest.hexdigest()[:6]}"
            entered = connection.execute(
                text(
                    "INSERT INTO batches (batch_id, state, source, minted_at)"
                    " VALUES (:id, 'minted', :source, now()) ON CONFLICT DO NOTHING"
                ),
                {"id": batch_id, "source": source},
            ).rowcount
            manifest.update(b"\0")  # the same files in the same second again: another id
        connection.execute(
            text(
                "INSERT INTO source_files (batch_id, source, path, size, mtime_ns)"
                f" SELECT :id, :source, f.path, f.size, f.mtime_ns FROM {FILES}"
            ),
            {"id": batch_id, "source": source, **_columns(chosen)},
        )
        return Mint(batch_id, chosen)


def _first_batch(files: Sequence[SourceFile], most_files: int, most_bytes: int) -> list[SourceFile]:
    chosen: list[SourceFile] = []
    total = 0
    for file in files:
        if file.path.lower().endswith(".tar"):
            if not chosen:
                return [file]
            continue
        total += file.size
        if chosen and (len(chosen) >= most_files or total > most_bytes):
            break
        chosen.append(file)
    return chosen


def unfinished_mints(engine: Engine, source: str) -> list[Mint]:
    """Batches of this source that were minted and never recorded as uploaded, oldest first."""
    with transaction(engine) as connection:
        ids = connection.execute(
            text("SELECT batch_id FROM batches WHERE state = 'minted' AND source = :source ORDER BY minted_at"),
            {"source": source},
        ).scalars()
        return [
            Mint(
                batch_id,
                _files(
                    connection.execute(
                        text(
                            "SELECT path, size, mtime_ns FROM source_files"
                            " WHERE batch_id = :id AND struck IS NULL ORDER BY path"
                        ),
                        {"id": batch_id},
                    ).all()
                ),
            )
            for batch_id in ids.all()
        ]


def record_upload(
    engine: Engine, batch_id: str, job: str | None, archive: Archive, struck: Mapping[SourceFile, str], reason: str
) -> bool:
    """Record that a minted batch's archive is in the store, verified, and which files it was made without, and why.

    With `job` None there is no such archive: the batch is failed, for this reason. False if it was recorded before.
    """
    with transaction(engine) as connection:
        state = connection.execute(
            text("SELECT state FROM batches WHERE batch_id = :id FOR UPDATE"), {"id": batch_id}
        ).scalar_one()
        if state != "minted":
            return False
        for file, reason in struck.items():
            connection.execute(
                text(
                    "UPDATE source_files SET struck = :reason"
                    " WHERE batch_id = :id AND path = :path AND size = :size AND mtime_ns = :mtime_ns"
                ),
                {
                    "id": batch_id,
                    "reason": reason,
                    "path": os.fsencode(file.path),
                    "size": file.size,
                    "mtime_ns": file.mtime_ns,
                },
            )
        if job is None:
            connection.execute(
                text("UPDATE batches SET state = 'failed', failed_at = now(), reason = :reason WHERE batch_id = :id"),
                {"id": batch_id, "reason": reason},
            )
        else:
            connection.execute(
                text(
                    "UPDATE batches SET state = 'uploaded', uploaded_at = now(), job = :job, sha256 = :sha256,"
                    " size = :size, file_count = :count WHERE batch_id = :id"
                ),
                {
                    "id": batch_id,
                    "job": job,
                    "sha256": archive.sha256,
                    "size": archive.size,
                    "count": archive.file_count,
                },
            )
        return True


def unqueued(engine: Engine, queued: Collection[str], *, lost_hosts: Collection[str] = ()) -> list[tuple[str, str]]:
    """(batch_id, job) of batches that are to be unpacked and whose job is not among those that Redis holds.

    Batches of `lost_hosts` are among them, also before LOST.
    """
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT batch_id, job FROM batches WHERE state IN ('uploaded', 'unpacking')"
                " OR state = 'ready' AND host = ANY(:lost) ORDER BY uploaded_at"
            ),
            {"lost": list(lost_hosts)},
        ).all()
    held = set(queued)
    return [(row.batch_id, row.job) for row in rows if row.job not in held]


def unfated(engine: Engine, source: str) -> list[SourceFile]:
    """Files of this source whose archive is verified and whose fate is still to be done."""
    with transaction(engine) as connection:
        return _files(
            connection.execute(
                text(
                    "SELECT s.path, s.size, s.mtime_ns FROM source_files s JOIN batches b USING (batch_id)"
                    " WHERE s.source = :source AND s.fate_at IS NULL AND s.struck IS NULL"
                    " AND b.uploaded_at IS NOT NULL ORDER BY s.path"
                ),
                {"source": source},
            ).all()
        )


def fated(engine: Engine, source: str, files: Sequence[SourceFile]) -> None:
    """Note that the fate of these files is done, or no longer ours to do."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                f"UPDATE source_files s SET fate_at = now() FROM {FILES} WHERE s.source = :source AND s.path = f.path"
                " AND s.size = f.size AND s.mtime_ns = f.mtime_ns AND s.fate_at IS NULL AND s.struck IS NULL"
            ),
            {"source": source, **_columns(files)},
        )
