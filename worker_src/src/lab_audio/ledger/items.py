"""Items: a row of audio_files each. An item leaves `pending` once, in one transaction, for `done` or `dead`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, text

from lab_audio.contracts import Result
from lab_audio.ledger.connection import transaction


@dataclass(frozen=True)
class Item:
    """`host` and `batch_state`: whose the batch is now. `date` is YYYY-MM-DD, fixed when the item was entered."""

    audio_id: int
    batch_id: str
    member: str
    state: str
    attempts: int
    reason: str | None
    date: str
    seconds: float | None
    host: str | None
    batch_state: str


@dataclass(frozen=True)
class Settled:
    """The item's state now, how many of its batch are settled of how many, and whether this act settled it."""

    state: str
    processed: int
    total: int
    changed: bool


def find_item(engine: Engine, batch_id: str, item: str) -> Item | None:
    with transaction(engine) as connection:
        row = connection.execute(
            text(
                "SELECT a.audio_id, a.batch_id, a.member, a.state, a.attempts, a.reason, a.date::text, a.seconds,"
                " b.host, b.state AS batch_state"
                " FROM audio_files a JOIN batches b USING (batch_id) WHERE a.batch_id = :id AND a.item = :item"
            ),
            {"id": batch_id, "item": item},
        ).one_or_none()
    return Item(*row) if row else None


def begin(engine: Engine, audio_id: int, host: str, known: int) -> int | None:
    """Count an attempt, just before the models. Returns how many there are now; None if it is not this host's to do.

    `known`: how many there were when the item was read. Asked again, after an answer that was lost, it counts once.
    """
    with transaction(engine) as connection:
        attempts: int | None = connection.execute(
            text(
                "UPDATE audio_files a SET attempts = :known + 1, host = :host FROM batches b"
                " WHERE a.audio_id = :id AND a.state = 'pending' AND a.attempts IN (:known, :known + 1)"
                " AND b.batch_id = a.batch_id AND b.host = :host AND b.state = 'ready' RETURNING a.attempts"
            ),
            {"id": audio_id, "host": host, "known": known},
        ).scalar_one_or_none()
        return attempts


def hand_back(engine: Engine, audio_id: int, host: str, known: int, reason: str | None = None) -> None:
    """Take this host's attempt back, to as many as were known before it; `reason`: what befell the worker, if given."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "UPDATE audio_files SET attempts = :known, reason = coalesce(:reason, reason)"
                " WHERE audio_id = :id AND state = 'pending' AND attempts = :known + 1 AND host = :host"
            ),
            {"id": audio_id, "host": host, "known": known, "reason": reason},
        )


def note_error(engine: Engine, audio_id: int, reason: str) -> None:
    """Keep what went wrong in this attempt; the item stays pending."""
    with transaction(engine) as connection:
        connection.execute(
            text("UPDATE audio_files SET reason = :reason WHERE audio_id = :id AND state = 'pending'"),
            {"id": audio_id, "reason": reason},
        )


def note_deaths(engine: Engine, items: Collection[tuple[str, str]]) -> None:
    """Keep for each (batch_id, item) that its worker died, where nothing else is known to have gone wrong."""
    with transaction(engine) as connection:
        connection.execute(
            text(
                "UPDATE audio_files a SET reason = 'its worker died while it was in hand'"
                " FROM unnest(CAST(:batches AS text[]), CAST(:items AS text[])) AS dead (batch_id, item)"
                " WHERE a.batch_id = dead.batch_id AND a.item = dead.item AND a.state = 'pending' AND a.reason IS NULL"
            ),
            {"batches": [batch_id for batch_id, _item in items], "items": [item for _batch_id, item in items]},
        )


def finish(engine: Engine, audio_id: int, s3_opus_path: str, result: Result) -> Settled:
    """Enter an item's results: pending becomes done. A settled item stays as it is; the answer says how."""
    with transaction(engine) as connection:
        batch_id = _lock_batch_of(connection, audio_id)
        changed = connection.execute(
            text(
                "UPDATE audio_files SET state = 'done', reason = NULL, s3_opus_path = :key, settled_at = now()"
                " WHERE audio_id = :id AND state = 'pending'"
            ),
            {"id": audio_id, "key": s3_opus_path},
        ).rowcount
        if changed:
            connection.execute(
                text(
                    "INSERT INTO transcripts (audio_id, text, language, segments, speech, model)"
                    " VALUES (:id, :text, :language, CAST(:segments AS jsonb), :speech, :model)"
                ),
                {
                    "id": audio_id,
                    **dataclasses.asdict(result.transcript),
                    "segments": json.dumps(result.transcript.segments),
                },
            )
            for verdict in result.classifications:
                connection.execute(
                    text(
                        "INSERT INTO classifications"
                        " (audio_id, policy, policy_sha256, label, score, model, adapter, chunks) VALUES"
                        " (:id, :policy, :policy_sha256, :label, :score, :model, :adapter, CAST(:chunks AS jsonb))"
                    ),
                    {"id": audio_id, **dataclasses.asdict(verdict), "chunks": json.dumps(verdict.chunks)},
                )
        return _count(connection, audio_id, batch_id, changed=changed > 0)


def bury(engine: Engine, audio_id: int, host: str, reason: str) -> Settled:
    """Set an item aside: pending becomes dead, with host and reason, if its batch is this host's.

    A settled item stays as it is, and so does one that another host has now.
    """
    with transaction(engine) as connection:
        batch_id = _lock_batch_of(connection, audio_id)
        changed = connection.execute(
            text(
                "UPDATE audio_files a SET state = 'dead', host = :host, reason = :reason, settled_at = now()"
                " FROM batches b WHERE a.audio_id = :id AND a.state = 'pending'"
                " AND b.batch_id = a.batch_id AND b.host = :host AND b.state = 'ready'"
            ),
            {"id": audio_id, "host": host, "reason": reason},
        ).rowcount
        return _count(connection, audio_id, batch_id, changed=changed > 0)


def count_settled(engine: Engine, audio_id: int) -> Settled:
    """How an item and its batch stand; changes nothing."""
    with transaction(engine) as connection:
        return _count(connection, audio_id, _lock_batch_of(connection, audio_id), changed=False)


def _lock_batch_of(connection: Connection, audio_id: int) -> str:
    return str(
        connection.execute(
            text(
                "SELECT b.batch_id FROM batches b"
                " WHERE b.batch_id = (SELECT batch_id FROM audio_files WHERE audio_id = :id) FOR UPDATE"
            ),
            {"id": audio_id},
        ).scalar_one()
    )


def _count(connection: Connection, audio_id: int, batch_id: str, *, changed: bool) -> Settled:
    """Count the batch under its lock, and complete it if this settled its last item."""
    state, processed, total = connection.execute(
        text(
            "SELECT max(state) FILTER (WHERE audio_id = :id), count(*) FILTER (WHERE state <> 'pending'), count(*)"
            " FROM audio_files WHERE batch_id = :batch"
        ),
        {"id": audio_id, "batch": batch_id},
    ).one()
    if changed and processed == total:
        connection.execute(
            text(
                "UPDATE batches SET state = 'complete', complete_at = now() WHERE batch_id = :batch AND state = 'ready'"
            ),
            {"batch": batch_id},
        )
    return Settled(state, processed, total, changed)
