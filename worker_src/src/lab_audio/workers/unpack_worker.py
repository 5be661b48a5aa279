"""The unpack worker: an archive becomes Opus files on this host's scratch, sealed in the ledger, published in Redis."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from lab_audio import ledger, queues, s3_utils, scratch
from lab_audio.config import UnpackSettings
from lab_audio.contracts import (
    TranscribeJob,
    UnpackJob,
    item_of,
    opus_path,
    parse_unpack_job,
)
from lab_audio.errors import Fatal, LabAudioError, NotFound, Permanent
from lab_audio.ledger import Archive, NewItem, Refused
from lab_audio.log import get_logger
from lab_audio.media import archive as tar
from lab_audio.media import transcode
from lab_audio.workers.host import Host, attend, open_host, open_inbox, tidy_batch
from lab_audio.workers.loop import Stop, Stopped, patiently

SPOOL_BYTES = 16 << 20
PAUSE_SECONDS = 2
MAX_ATTEMPTS = 5
MAX_NAME_BYTES = 2000  # what PostgreSQL can index
FFMPEG_TRIES = 3


@dataclass(frozen=True)
class Encoding:
    """How recordings become Opus: bits per second, and how many at once."""

    bitrate: int
    threads: int


def run(settings: UnpackSettings, stop: Stop) -> None:
    """Serve `unpack` until asked to stop; the batch in hand is finished, or left to the slot if a store is away."""
    host = open_host(settings, stop)
    slot, inbox = open_inbox(host, "unpack")
    encoding = Encoding(settings.opus_bitrate, settings.transcode_threads)
    attend(host, ("unpack",), stop)
    get_logger().info("unpack worker ready", host=host.name, slot=slot.number)
    try:
        while not stop():
            job = patiently(stop, inbox.claim, PAUSE_SECONDS)
            if job is not None and not handle(host, inbox, job, encoding, stop):
                stop.wait(PAUSE_SECONDS)
    except Stopped:
        pass
    finally:
        slot.release()
    stop.check()


def handle(host: Host, inbox: queues.Inbox, job: str, encoding: Encoding, stop: Stop) -> bool:
    """Do one unpack job to its end. False if this host is to take nothing for now: the job is back on its list."""
    try:
        wanted = parse_unpack_job(job)
        if not patiently(stop, known, host, wanted, job):
            raise Permanent("its batch is unknown and has no archive")
    except Permanent as error:
        get_logger().error("unpack job set aside", reason=str(error), job=job[:200])
        patiently(stop, inbox.bury, job)
        return True
    log = get_logger().bind(batch_id=wanted.batch_id)
    with scratch.batch_lock(host.scratch, wanted.batch_id) as locked:
        if not locked:  # held by whoever unpacks, tidies or returns it on this host: look again later
            patiently(stop, inbox.move, job, inbox.source)
            return False
        taken = patiently(stop, ledger.take, host.engine, wanted.batch_id, host.name)
        if isinstance(taken, Refused):
            log.info("not to be unpacked now", why=taken.why)
            if taken.job != "drop":
                patiently(stop, inbox.move, job, inbox.source, taken.job)
                return False
        else:
            try:
                unpack(host, wanted, taken, encoding, stop)
            except Permanent as error:
                log.error("batch failed", reason=str(error))
                patiently(stop, ledger.fail, host.engine, wanted.batch_id, host.name, str(error))
            except OSError as error:
                raise Fatal(f"SCRATCH_ROOT {host.scratch}: {error}") from error
            except (LabAudioError, Stopped):
                raise
            except Exception as error:
                log.exception("unpacking went wrong", attempts=taken.attempts)
                if taken.attempts < MAX_ATTEMPTS:
                    scratch.cleanup_scratch(wanted.batch_id, root=host.scratch)
                    patiently(stop, ledger.give_back, host.engine, wanted.batch_id, host.name)
                    patiently(stop, inbox.move, job, inbox.source)
                    return False
                reason = f"{type(error).__name__}: {error}"[:500]
                patiently(stop, ledger.fail, host.engine, wanted.batch_id, host.name, reason)
        patiently(stop, publish, host, inbox, wanted.batch_id, job)
    patiently(stop, tidy_batch, host, wanted.batch_id)
    return True


def known(host: Host, wanted: UnpackJob, job: str) -> bool:
    """Whether the ledger knows the batch; one that another program uploaded is entered if its archive is there."""
    if ledger.find_batch(host.engine, wanted.batch_id) is not None:
        return True
    try:
        info = s3_utils.head_archive(wanted.batch_id, bucket=host.bucket)
    except NotFound:
        return False
    ledger.adopt(host.engine, wanted.batch_id, job, Archive(info.sha256, info.size, wanted.file_count))
    return True


def publish(host: Host, inbox: queues.Inbox, batch_id: str, job: str) -> None:
    """PUBLISH, holding the batch's row; a batch that is not this host's to publish only loses the job."""
    with ledger.publishing(host.engine, batch_id, host.name) as batch:
        if batch is None:
            inbox.drop(job)
        else:
            pending = transcribe_jobs(host.scratch, batch_id, batch.pending)
            inbox.publish(job, host.name, batch_id, batch.total, batch.processed, pending)


def transcribe_jobs(scratch_root: Path, batch_id: str, pending: list[tuple[str, str]]) -> Iterator[str]:
    """The payload of each pending (item, original_filename)."""
    for item, name in pending:
        path = str(opus_path(scratch_root, batch_id, item))
        yield TranscribeJob(batch_id=batch_id, opus_path=path, original_filename=name).payload()


def unpack(host: Host, wanted: UnpackJob, taken: ledger.Taken, encoding: Encoding, stop: Stop) -> None:
    """Stream the archive, encode each recording, and SEAL. Raises Permanent if the batch is to fail."""
    encoded: dict[str, NewItem] = {}
    archive, flags = patiently(stop, read_archive, host, wanted, taken, encoding, encoded)
    state = patiently(
        stop, ledger.seal, host.engine, wanted.batch_id, host.name, list(encoded.values()), archive, flags
    )
    get_logger().info("batch unpacked", batch_id=wanted.batch_id, state=state, items=len(encoded), flags=flags)


def read_archive(
    host: Host, wanted: UnpackJob, taken: ledger.Taken, encoding: Encoding, encoded: dict[str, NewItem]
) -> tuple[Archive, list[str]]:
    """Fill `encoded` (item to row) from the archive, skipping what is in it from an earlier try.

    Returns the archive as found and the batch's flags. Raises Permanent if the archive is missing or is not the one
    that was uploaded.
    """
    try:
        info = s3_utils.head_archive(wanted.batch_id, bucket=host.bucket)
    except NotFound:
        raise Permanent("archive missing") from None
    promised = taken.archive.sha256 or info.sha256
    folder = scratch.batch_dir(host.scratch, wanted.batch_id)
    folder.mkdir(mode=0o750, exist_ok=True)
    flags: list[str] = []
    recordings = 0
    running: deque[Future[NewItem]] = deque()

    def collect(most: int) -> None:
        while len(running) > most:
            row = running.popleft().result()
            encoded[row.item] = row

    with (
        s3_utils.open_archive(info, bucket=host.bucket) as stream,
        ThreadPoolExecutor(encoding.threads, thread_name_prefix="encode") as pool,
    ):
        try:
            for member in tar.read(cast(BinaryIO, stream)):
                recordings += 1
                row = entry(member)
                if row.item in encoded:
                    continue
                if row.reason is not None or row.item in taken.settled or member.file is None:
                    encoded[row.item] = row
                else:
                    running.append(pool.submit(encode, row, spooled(member.file, folder), folder, encoding.bitrate))
                    collect(2 * encoding.threads)
        except tar.ArchiveBroken as error:
            flags.append(f"archive: {error}")
        finally:
            collect(0)
        stream.drain()
        found = stream.sha256()
    if promised is not None and found != promised:
        raise Permanent(f"the archive's SHA-256 is {found}, uploaded was {promised}")
    if wanted.file_count != recordings:
        flags.append(f"file_count: the job says {wanted.file_count}, the archive holds {recordings}")
    return Archive(found, info.size, recordings), flags


def entry(member: tar.Member) -> NewItem:
    """The row of a member, with a reason if it is not to be encoded."""
    name, reason, item = member.name, member.problem, item_of(member.name)
    if len(name.encode()) > MAX_NAME_BYTES:
        name = f"{name[:200]}... {item}"
        reason = f"its name is longer than {MAX_NAME_BYTES} bytes"
    elif reason is None and not name.lower().endswith(".mp3"):
        reason = "is not an .mp3 file"
    return NewItem(name, item, PurePosixPath(name).name, reason=reason)


def spooled(recording: BinaryIO, folder: Path) -> BinaryIO:
    """Copy a recording out of the stream: into memory, or beside the batch if it is large."""
    spool = cast(BinaryIO, tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder)))  # noqa: SIM115 (encode closes it)
    shutil.copyfileobj(recording, spool, 1 << 20)
    spool.seek(0)
    return spool


def encode(row: NewItem, mp3: BinaryIO, folder: Path, bitrate: int) -> NewItem:
    """Encode one recording; one that cannot be is a row with the reason."""
    with mp3:
        for tries_left in reversed(range(FFMPEG_TRIES)):
            try:
                target = folder / f"{row.item}.opus"
                opus = transcode.encode(mp3, target, bitrate=bitrate, timeout=encode_seconds(mp3))
                break
            except transcode.Killed as error:  # for want of memory, perhaps not its own
                if not tries_left:
                    return replace(row, reason=f"{error}, {FFMPEG_TRIES} times")
            except Permanent as error:
                return replace(row, reason=str(error))
    return replace(row, seconds=opus.seconds)


def encode_seconds(mp3: BinaryIO) -> float:
    """A bound for encoding: a minute, and what a tenth of a core needs for MP3 of 8 kb/s."""
    size = mp3.seek(0, os.SEEK_END)
    mp3.seek(0)
    return 60 + size / 6_000
