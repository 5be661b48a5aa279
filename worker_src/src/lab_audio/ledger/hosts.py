"""Hosts: who is there, on which disk, and who is paused. Time is PostgreSQL's."""

from __future__ import annotations

from sqlalchemy import Engine, text

from lab_audio.errors import Fatal
from lab_audio.ledger.connection import transaction

EVERYWHERE = "*"
BEAT_SECONDS = 20
SILENT_AFTER = "interval '2 minutes'"


def register(engine: Engine, host: str, scratch_id: str) -> None:
    """Note this host and its disk. Raises Fatal while another disk still beats under the same name."""
    with transaction(engine) as connection:
        connection.execute(
            text("INSERT INTO hosts (host, scratch_id) VALUES (:host, :id) ON CONFLICT DO NOTHING"),
            {"host": host, "id": scratch_id},
        )
        other = connection.execute(
            text(
                f"SELECT scratch_id <> :id AND seen_at > now() - {SILENT_AFTER}"
                " FROM hosts WHERE host = :host FOR UPDATE"
            ),
            {"host": host, "id": scratch_id},
        ).scalar_one()
        if other:
            raise Fatal(
                f"a host named {host} with another scratch disk was seen less than two minutes ago;"
                " give each host its own LAB_HOST, or wait if its disk was just replaced"
            )
        connection.execute(
            text("UPDATE hosts SET scratch_id = :id, seen_at = now() WHERE host = :host"),
            {"host": host, "id": scratch_id},
        )


def beat(engine: Engine, host: str, *, gpu: bool) -> None:
    """Say that this host lives, and with `gpu` that its GPU worker does."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "UPDATE hosts SET seen_at = now(), gpu_seen_at = CASE WHEN :gpu THEN now() ELSE gpu_seen_at END"
                " WHERE host = :host"
            ),
            {"host": host, "gpu": gpu},
        )


def pause(engine: Engine, host: str | None, *, paused: bool) -> bool:
    """Pause or resume a host, or with None every host there is or will be. False if the host is unknown.

    A paused host takes no new batch and finishes what it has. Resuming all resumes each.
    """
    with transaction(engine) as connection:
        if host is None:
            connection.execute(
                text("INSERT INTO hosts (host) VALUES (:all) ON CONFLICT DO NOTHING"), {"all": EVERYWHERE}
            )
        found = connection.execute(
            text("UPDATE hosts SET paused = :paused WHERE host = :host OR (:all AND NOT :paused)"),
            {"paused": paused, "host": host or EVERYWHERE, "all": host is None},
        )
        return found.rowcount > 0
