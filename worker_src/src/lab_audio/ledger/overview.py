"""What a person wants to see: open batches and hosts, at a cost that does not grow with what is finished."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, text

from lab_audio.ledger.connection import transaction
from lab_audio.ledger.hosts import EVERYWHERE


@dataclass(frozen=True)
class BatchProgress:
    """An open batch. `since`: when it came into its present state."""

    batch_id: str
    state: str
    host: str | None
    since: datetime | None
    pending: int
    done: int
    dead: int
    flags: list[str]
    reason: str | None


@dataclass(frozen=True)
class HostView:
    """`silent_seconds`: since it was last seen; None if never. `unsandboxed`: kinds of workers without a sandbox."""

    host: str
    paused: bool
    silent_seconds: float | None
    gpu_silent_seconds: float | None
    unsandboxed: list[str]


def open_batches(engine: Engine) -> list[BatchProgress]:
    """Batches that are not ended, and ended ones that are still being tidied."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT batch_id, state, host, since, pending, done, dead, flags, reason"
                " FROM batch_progress WHERE open ORDER BY batch_id"
            )
        ).all()
    return [BatchProgress(*row) for row in rows]


def seen_hosts(engine: Engine) -> list[HostView]:
    """Every host that takes part; a pause of all shows on each. One that is lost comes back when it beats."""
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT host, paused OR EXISTS (SELECT FROM hosts WHERE host = :all AND paused),"
                " extract(epoch FROM now() - seen_at)::float, extract(epoch FROM now() - gpu_seen_at)::float,"
                " unsandboxed"
                " FROM hosts WHERE host <> :all AND seen_at IS NOT NULL ORDER BY host"
            ),
            {"all": EVERYWHERE},
        ).all()
    return [HostView(*row) for row in rows]
