"""Dead letters: list them, look at one, get its recording back, try it again, or accept it.

There are three kinds, each with its own names: recordings (`42`, the audio_id), batches (their batch_id), and payloads
in the list `dead` that no row stands for (`payload-` and eight hex digits of their SHA-256).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from lab_audio import ledger, queues, s3_utils
from lab_audio.contracts import BATCH_ID, TRANSCRIBE, UNPACK, archive_key, item_of
from lab_audio.errors import NotFound, Permanent
from lab_audio.jobs import parse_transcribe_job, parse_unpack_job
from lab_audio.ledger import DeadLetter
from lab_audio.media import reader
from lab_audio.operations.reconcile import Stores
from lab_audio.workers.host import queue_waiting

RECORDING = re.compile(r"[0-9]{1,18}")


def letters(stores: Stores, *, dropped: bool = False) -> Iterator[DeadLetter]:
    """Every dead letter: batches, payloads, then recordings; newest first. With `dropped` also those."""
    yield from ledger.dead_batches(stores.engine, dropped=dropped)
    for payload in reversed(queues.dead_payloads(stores.client)):
        yield DeadLetter("payload", name_of(payload), None, None, destination(payload)[1])
    yield from ledger.dead_recordings(stores.engine, dropped=dropped)


def name_of(payload: str) -> str:
    return f"payload-{hashlib.sha256(payload.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def destination(payload: str) -> tuple[str | None, str]:
    """The list that a payload is for, if for any, and why it was set aside."""
    try:
        parse_unpack_job(payload)
        return UNPACK, "an unpack job; the ledger did not know its batch, and there was no archive"
    except Permanent as unpack:
        try:
            parse_transcribe_job(payload)
            return TRANSCRIBE, "a transcribe job; the ledger did not know its batch and item, or its path was another's"
        except Permanent as transcribe:
            return None, f"no job: {transcribe if 'opus_path' in payload else unpack}"


def show(stores: Stores, name: str) -> dict[str, Any]:
    """Everything known of a dead letter. Raises Permanent if there is none of this name."""
    if RECORDING.fullmatch(name):
        found = dead_recording(stores, name)
        return {**found, **archive_of(stores, found["batch_id"])}
    if BATCH_ID.fullmatch(name):
        return {**batch(stores, name), **archive_of(stores, name)}
    payload = find_payload(stores, name)
    to, reason = destination(payload)
    return {"payload": payload, "reason": reason, "list": to}


def archive_of(stores: Stores, batch_id: str) -> dict[str, Any]:
    """Where the archive is, and its size in bytes; None if the store has it not."""
    try:
        size = s3_utils.head_archive(batch_id, bucket=stores.bucket).size
    except NotFound:
        size = None
    return {"archive": archive_key(batch_id), "archive_bytes": size}


def save(stores: Stores, name: str, path: Path) -> int:
    """Write a dead recording's bytes, as they are in its archive, to a file. Returns how many; or leaves nothing there.

    Raises Permanent where there is no such recording, its archive is gone or broken, or the file cannot be written.
    """
    if not RECORDING.fullmatch(name):
        raise Permanent("only a recording can be saved; a whole archive comes by `lab-audio fetch-archive BATCH_ID`")
    found = dead_recording(stores, name)
    try:
        info = s3_utils.head_archive(found["batch_id"], bucket=stores.bucket)
    except NotFound:
        raise Permanent(f"the archive of batch {found['batch_id']} is gone, and the recording with it") from None
    part = path.with_name(f"{path.name}.part")
    try:
        with s3_utils.open_archive(info, bucket=stores.bucket) as stream:
            for member in reader.read(cast(BinaryIO, stream), info.size, compressed=True):
                if item_of(member.name) == found["item"]:
                    if member.file is None:
                        raise Permanent(f"{found['member']} {member.problem}: there is nothing to save")
                    with part.open("wb") as file:
                        shutil.copyfileobj(member.file, file, 1 << 20)
                    part.replace(path)
                    return member.size
        raise Permanent(f"{found['member']} is not in the archive")
    except OSError as error:
        raise Permanent(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def retry(stores: Stores, names: Iterable[str]) -> Iterator[tuple[str, str | Permanent]]:
    """Try dead letters again. Yields each name with what became of it.

    Recordings of one batch go together: their batch is unpacked anew at once. May be run again if it was cut short.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        try:
            if RECORDING.fullmatch(name):
                wanted.setdefault(dead_recording(stores, name, or_pending=True)["batch_id"], []).append(name)
            elif BATCH_ID.fullmatch(name):
                batch(stores, name)
                wanted.setdefault(name, []).append(name)
            else:
                yield name, revive(stores, name)
        except Permanent as error:
            yield name, error
    for batch_id, of_it in wanted.items():
        whole = batch_id in of_it
        try:
            if s3_utils.stored_at(stores.bucket, archive_key(batch_id)) is None:
                raise Permanent(f"the archive of batch {batch_id} is not in the store")
            count = ledger.retry(stores.engine, batch_id, None if whole else [int(name) for name in of_it])
            queue_waiting(stores.engine, stores.client, batch_id)
        except Permanent as error:
            yield from ((name, error) for name in of_it)
        else:
            them = f"; dead recordings in it: {count}" if whole else ""
            yield from ((name, f"batch {batch_id} is unpacked anew{them}") for name in of_it)


def revive(stores: Stores, name: str) -> str:
    payload = find_payload(stores, name)
    to, reason = destination(payload)
    if to is None:
        raise Permanent(f"it is {reason}")
    if not queues.revive(stores.client, payload, to):
        raise Permanent("it has just gone")
    return f"moved to the list {to}"


def drop(stores: Stores, names: Iterable[str]) -> Iterator[tuple[str, str | Permanent]]:
    """Accept that these are dead. Yields each name with what became of it."""
    for name in names:
        try:
            yield name, drop_one(stores, name)
        except Permanent as error:
            yield name, error


def drop_one(stores: Stores, name: str) -> str:
    if RECORDING.fullmatch(name):
        found = dead_recording(stores, name)
        if not ledger.drop_recording(stores.engine, int(name)):
            raise Permanent("it was retried meanwhile")
        return f"accepted as dead; the archive of batch {found['batch_id']} may go once nothing else in it is dead"
    if BATCH_ID.fullmatch(name):
        state = batch(stores, name)["state"]
        count = ledger.drop_batch(stores.engine, name)
        if count is None:
            raise Permanent(f"it is {state}, and nothing in it is dead")
        fate = "stays until you remove it" if state == "failed" else "may go"
        return f"accepted as dead; dead recordings in it: {count}; its archive {fate}"
    queues.discard(stores.client, find_payload(stores, name))
    return "removed from the list dead"


def dead_recording(stores: Stores, name: str, *, or_pending: bool = False) -> dict[str, Any]:
    found = ledger.whole_recording(stores.engine, int(name))
    if found is None:
        raise Permanent("no recording has this audio_id")
    if found["state"] != "dead" and not (or_pending and found["state"] == "pending"):
        raise Permanent(f"it is {found['state']}, not dead")
    return found


def batch(stores: Stores, batch_id: str) -> dict[str, Any]:
    found = ledger.whole_batch(stores.engine, batch_id)
    if found is None:
        raise Permanent("no batch has this id")
    return found


def find_payload(stores: Stores, name: str) -> str:
    for payload in queues.dead_payloads(stores.client):
        if name_of(payload) == name:
            return payload
    raise Permanent("not an audio_id, a batch_id, or the name of a payload in the list dead")
