"""Hosts: who is there, on which disk, who is paused, and who is lost. Time is PostgreSQL's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from lab_audio.errors import Fatal
from lab_audio.ledger.connection import transaction

EVERYWHERE = "*"
BEAT_SECONDS = 20
SILENT_SECONDS = 120
SILENT_AFTER = f"interval '{SILENT_SECONDS} seconds'"


@dataclass(frozen=True)
class Lost:
    """Batches of a lost host: those that are to be unpacked anew, and those that had ended."""

    reopened: list[str]
    ended: list[str]


@contextmanager
def registering(
    engine: Engine,
    host: str,
    scratch_id: str,
    scratch_root: Path,
    *,
    kind: str = "",
    release: str = "",
    unsandboxed: bool = False,
) -> Iterator[Lost | None]:
    """Note this host, its disk, and of its workers of a kind the release and whether they go without a sandbox.

    Raises Fatal while another disk still beats under the same name. Once that one is silent, what lay on it is lost
    (LOST): then yields its batches, as `losing` does; else None.
    """
    with transaction(engine) as connection:
        connection.execute(
            text("INSERT INTO hosts (host, scratch_id) VALUES (:host, :id) ON CONFLICT DO NOTHING"),
            {"host": host, "id": scratch_id},
        )
        other, beats = connection.execute(
            text(
                f"SELECT scratch_id <> :id, coalesce(seen_at > now() - {SILENT_AFTER}, false)"
                " FROM hosts WHERE host = :host FOR UPDATE"
            ),
            {"host": host, "id": scratch_id},
        ).one()
        if other and beats:
            raise Fatal(
                f"a host named {host} with another scratch disk was seen less than two minutes ago;"
                " give each host its own LAB_HOST, or wait if its disk was just replaced"
            )
        lost = _lose(connection, host) if other else None
        connection.execute(
            text(
                "UPDATE hosts SET scratch_id = :id, scratch_root = :root, seen_at = now(), doubted_at = NULL,"
                " unsandboxed = array_remove(unsandboxed, :kind) || CASE WHEN :unsandboxed THEN ARRAY[:kind] END,"
                " releases = releases || CAST(:releases AS jsonb),"
                " scratch_bytes = CASE WHEN scratch_id = :id THEN scratch_bytes END WHERE host = :host"
            ),
            {
                "host": host,
                "id": scratch_id,
                "root": str(scratch_root),
                "kind": kind,
                "unsandboxed": unsandboxed,
                "releases": json.dumps({kind: release} if kind else {}),
            },
        )
        yield lost


def beat(engine: Engine, host: str, *, gpu: bool) -> None:
    """Say that this host lives, and with `gpu` that its GPU worker does."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "UPDATE hosts SET seen_at = now(), doubted_at = NULL,"
                " gpu_seen_at = CASE WHEN :gpu THEN now() ELSE gpu_seen_at END WHERE host = :host"
            ),
            {"host": host, "gpu": gpu},
        )


def note_models(engine: Engine, host: str, revisions: Mapping[str, str]) -> None:
    """Keep which models this host's GPU worker has loaded."""
    with transaction(engine) as connection:
        connection.execute(
            text("UPDATE hosts SET models = CAST(:models AS jsonb) WHERE host = :host"),
            {"host": host, "models": json.dumps(dict(revisions))},
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


def silent_hosts(engine: Engine, grace_seconds: float, *, doubt: bool) -> list[tuple[str, bool]]:
    """Hosts that have been silent for the grace, each with whether it was doubted two beats ago and so is lost.

    With `doubt` those that were not doubted yet are from now on. After PostgreSQL itself was away all hosts look
    silent: one that lives has beaten until it is asked for the second time.
    """
    with transaction(engine) as connection:
        values = {"grace": grace_seconds, "beats": 2 * BEAT_SECONDS}
        rows = connection.execute(
            text(
                "SELECT host, coalesce(doubted_at <= now() - make_interval(secs => :beats), false) AS lost FROM hosts"
                " WHERE seen_at < now() - make_interval(secs => :grace) ORDER BY host"
            ),
            values,
        ).all()
        if doubt:
            connection.execute(
                text(
                    "UPDATE hosts SET doubted_at = now()"
                    " WHERE seen_at < now() - make_interval(secs => :grace) AND doubted_at IS NULL"
                ),
                values,
            )
        return [(row.host, row.lost) for row in rows]


@contextmanager
def losing(engine: Engine, host: str, *, unless_seen: bool = False) -> Iterator[Lost | None]:
    """LOST: a host and its scratch are gone. Yields its batches, for Redis to forget them.

    What was open is `uploaded` again when the block ends, and nothing is undone by a host that lives after all: it
    finds that the batches are not its own. With `unless_seen` yields None for a host that beats again; one that does
    not is shown as lost until it does, or is forgotten.
    """
    with transaction(engine) as connection:
        row = connection.execute(
            text("SELECT seen_at, doubted_at FROM hosts WHERE host = :host FOR UPDATE"), {"host": host}
        ).one_or_none()
        if unless_seen and row is not None and row.seen_at is not None and row.doubted_at is None:
            yield None
            return
        lost = _lose(connection, host)
        connection.execute(
            text(
                "UPDATE hosts SET seen_at = NULL, gpu_seen_at = NULL, doubted_at = NULL,"
                " silent_since = CASE WHEN :shown THEN coalesce(seen_at, silent_since) END WHERE host = :host"
            ),
            {"host": host, "shown": unless_seen},
        )
        yield lost


def _lose(connection: Connection, host: str) -> Lost:
    """Take all its batches from a host whose row is locked."""
    connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))  # Redis may take its time
    reopened = connection.execute(
        text(
            "UPDATE batches SET state = 'uploaded', host = NULL, quota = NULL,"
            " attempts = CASE state WHEN 'unpacking' THEN greatest(attempts - 1, 0) ELSE attempts END"
            " WHERE host = :host AND state IN ('unpacking', 'ready') RETURNING batch_id"
        ),
        {"host": host},
    ).scalars()
    ended = connection.execute(
        text("UPDATE batches SET host = NULL, quota = NULL WHERE host = :host RETURNING batch_id"), {"host": host}
    ).scalars()
    return Lost(list(reopened), list(ended))


def disk_of(engine: Engine, host: str) -> str | None:
    """The random name of a host's scratch disk; None if the host is unknown."""
    with transaction(engine) as connection:
        disk: str | None = connection.execute(
            text("SELECT scratch_id FROM hosts WHERE host = :host"), {"host": host}
        ).scalar_one_or_none()
        return disk


def present_hosts(engine: Engine) -> dict[str, str | None]:
    """Hosts that are not lost, each with its SCRATCH_ROOT (None: a release before this one noted it)."""
    with transaction(engine) as connection:
        rows = connection.execute(text("SELECT host, scratch_root FROM hosts WHERE seen_at IS NOT NULL")).all()
    return {row.host: row.scratch_root for row in rows}
