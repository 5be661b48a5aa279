"""What a person, check-health and metrics want to see, at a cost that does not grow with what is finished."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, text

from lab_audio.ledger.connection import transaction
from lab_audio.ledger.dead import DEAD_BATCH, EXPIRED
from lab_audio.ledger.hosts import EVERYWHERE

PROGRESS = "batch_id, state, host, since, pending, done, dead, flags, reason, age_seconds, idle_seconds"


@dataclass(frozen=True)
class BatchProgress:
    """A batch. `since`: when it came into its present state; `idle_seconds`: since its last progress."""

    batch_id: str
    state: str
    host: str | None
    since: datetime | None
    pending: int
    done: int
    dead: int
    flags: list[str]
    reason: str | None
    age_seconds: float | None
    idle_seconds: float | None


@dataclass(frozen=True)
class StuckBatch:
    """`severity`: warning (open for too long) or critical (no progress for so long); `reason`: what it waits for."""

    batch_id: str
    severity: str
    reason: str


@dataclass(frozen=True)
class HostView:
    """`silent_seconds`: since it was last seen. `unsandboxed`: kinds of workers without a sandbox.

    `lost`: others do its batches. `releases`: of each kind of worker; `models`: revision of each.
    """

    host: str
    paused: bool
    lost: bool
    silent_seconds: float
    gpu_silent_seconds: float | None
    unsandboxed: list[str]
    releases: dict[str, str]
    models: dict[str, str]


@dataclass(frozen=True)
class ItemView:
    """A recording of a batch, as `lab-audio batch` tells it."""

    audio_id: int
    item: str
    member: str
    state: str
    attempts: int
    host: str | None
    seconds: float | None
    settled_at: datetime | None
    reason: str | None


def open_batches(engine: Engine) -> list[BatchProgress]:
    """Batches that are not ended, and ended ones that are still being tidied."""
    with transaction(engine) as connection:
        rows = connection.execute(text(f"SELECT {PROGRESS} FROM batch_progress WHERE open ORDER BY batch_id")).all()
    return [BatchProgress(*row) for row in rows]


def newest_batches(engine: Engine, count: int) -> list[BatchProgress]:
    """The newest so many batches, ended or not, the newest first."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(f"SELECT {PROGRESS} FROM batch_progress ORDER BY batch_id DESC LIMIT :count"), {"count": count}
        ).all()
    return [BatchProgress(*row) for row in rows]


def seen_hosts(engine: Engine) -> list[HostView]:
    """Every host that takes part, or is lost and not forgotten; a pause of all shows on each."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT host, paused OR EXISTS (SELECT FROM hosts WHERE host = :all AND paused), seen_at IS NULL,"
                " extract(epoch FROM now() - coalesce(seen_at, silent_since))::float,"
                " extract(epoch FROM now() - gpu_seen_at)::float, unsandboxed, releases, models"
                " FROM hosts WHERE host <> :all AND coalesce(seen_at, silent_since) IS NOT NULL ORDER BY host"
            ),
            {"all": EVERYWHERE},
        ).all()
    return [HostView(*row) for row in rows]


def stuck_batches(engine: Engine, seconds: float) -> list[StuckBatch]:
    """Batches that are stuck by either rule, with the reason; the longest without progress first."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text("SELECT batch_id, severity, reason FROM stuck_batches(make_interval(secs => :seconds))"),
            {"seconds": seconds},
        ).all()
    return [StuckBatch(*row) for row in rows]


def batch_items(engine: Engine, batch_id: str) -> list[ItemView]:
    """Every recording of a batch, in the order of its archive's names."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT audio_id, item, member, state, attempts, host, seconds, settled_at, reason"
                " FROM audio_files WHERE batch_id = :id ORDER BY member"
            ),
            {"id": batch_id},
        ).all()
    return [ItemView(*row) for row in rows]


def count_dead(engine: Engine) -> dict[str, int]:
    """How many recordings and batches were set aside and neither retried nor dropped."""
    with transaction(engine) as connection:
        row = connection.execute(
            text(
                "SELECT (SELECT count(*) FROM audio_files WHERE state = 'dead' AND dropped_at IS NULL) AS recording,"
                f" (SELECT count(*) FROM batches WHERE {DEAD_BATCH} AND dropped_at IS NULL) AS batch"
            )
        ).one()
    return dict(row._mapping)


def waiting_seconds(engine: Engine, batch_ids: Collection[str]) -> dict[str, float]:
    """For how long each batch's jobs have been waiting: since its last progress, or since it was last taken."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text("SELECT batch_id, idle_seconds FROM batch_progress WHERE batch_id = ANY(:ids)"),
            {"ids": list(batch_ids)},
        ).all()
    return {batch_id: seconds for batch_id, seconds in rows if seconds is not None}


def states_of(engine: Engine, batch_ids: Collection[str], host: str) -> dict[str, str]:
    """The state of each of these batches that the ledger knows, and whose it is where that is another host."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT batch_id, state || CASE WHEN host <> :host THEN ' on ' || host ELSE '' END AS state"
                " FROM batches WHERE batch_id = ANY(:ids)"
            ),
            {"ids": list(batch_ids), "host": host},
        ).all()
    return {row.batch_id: row.state for row in rows}


def unsettled_archives(engine: Engine, days: int) -> list[str]:
    """Batches whose archive is older than this and still needed: open ones, and dead ones or with something dead."""
    with transaction(engine) as connection:
        return list(
            connection.execute(
                text(
                    "SELECT batch_id FROM batches WHERE archive_gone_at IS NULL"
                    " AND uploaded_at <= now() - make_interval(days => :days)"
                    " AND batch_id = ANY(ARRAY("
                    "SELECT batch_id FROM batches WHERE state IN ('uploaded', 'unpacking', 'ready')"
                    f" UNION SELECT batch_id FROM batches WHERE {DEAD_BATCH} AND dropped_at IS NULL"
                    " UNION SELECT batch_id FROM audio_files WHERE state = 'dead' AND dropped_at IS NULL))"
                    " ORDER BY uploaded_at"
                ),
                {"days": days},
            ).scalars()
        )


def expired_archives(engine: Engine, days: int) -> list[str]:
    """Batches whose archive retention should have deleted by now, and did not."""
    with transaction(engine) as connection:
        return list(
            connection.execute(
                text(f"SELECT batch_id FROM batches b WHERE {EXPIRED} AND archive_gone_at IS NULL ORDER BY batch_id"),
                {"days": days},
            ).scalars()
        )


def note_run(engine: Engine, job: str) -> None:
    """Keep that a timer's job is done, or a look at a source."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO runs (job, ended_at) VALUES (:job, now())"
                " ON CONFLICT (job) DO UPDATE SET ended_at = excluded.ended_at"
            ),
            {"job": job},
        )


def last_runs(engine: Engine) -> dict[str, float]:
    """For each job of a timer, the dump and a look at each source (`source NAME`), seconds since it was last done."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text("SELECT job, extract(epoch FROM now() - ended_at)::float AS seconds FROM runs")
        ).all()
    return {row.job: row.seconds for row in rows}


def server(engine: Engine) -> dict[str, Any]:
    """`seconds`: of a small transaction; `bytes`: of the database."""
    with transaction(engine) as connection:
        connection.execute(text("SELECT 1"))
        began = time.monotonic()
        connection.execute(text("SELECT 1"))
        seconds = time.monotonic() - began
        size = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    return {"seconds": seconds, "bytes": int(size)}
