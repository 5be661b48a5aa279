"""The transfer worker: settled source files become verified archives, each with a job.

    mint in the ledger -> build the tar -> upload, verified -> record -> push the job -> fate of the source files

A kill at any point leaves a ledger that says where to go on: unfinished mints first, then jobs and fates.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from redis import Redis
from sqlalchemy import Connection, Engine, text

from lab_audio import ledger, metrics, notify, queues, s3_utils, source
from lab_audio.config import TransferSettings
from lab_audio.contracts import UNPACK, SourceFile, item_of
from lab_audio.errors import ConfigError, Fatal, NotFound, Permanent
from lab_audio.jobs import new_unpack_job
from lab_audio.ledger import Archive, Mint
from lab_audio.log import get_logger
from lab_audio.media import archive as tar
from lab_audio.media import reader
from lab_audio.s3_utils import ArchiveInfo, Bucket
from lab_audio.workers.loop import Stop, Stopped, patiently

LOCK_SECONDS = 5.0
NOTE_SECONDS = 60.0
T = TypeVar("T")


@dataclass(frozen=True)
class Transfer:
    """One source, the three stores, and the directory for the archive being built."""

    source: source.Source
    engine: Engine
    client: Redis
    bucket: Bucket
    tmp: Path
    fate: str


def run(settings: TransferSettings, stop: Stop, *, once: bool = False) -> None:
    """Transfer what settles at the source until asked to stop; with `once`, what is settled now."""
    where = source.parse(settings.source, ssh_key=settings.ssh_key, ssh_known_hosts=settings.ssh_known_hosts)
    if len(s3_utils.as_header(where.name)) > s3_utils.MAX_METADATA:
        raise ConfigError(f"SOURCE: longer than {s3_utils.MAX_METADATA} characters, percent-encoded")
    transfer = Transfer(
        where,
        ledger.open_ledger(settings),
        queues.open_queues(settings),
        s3_utils.open_bucket(settings),
        settings.transfer_tmp / hashlib.sha256(where.name.encode()).hexdigest()[:16],
        settings.source_fate,
    )
    try:
        patiently(stop, ledger.check_migrated, transfer.engine)
        while not stop():
            patiently(stop, hold_and_transfer, transfer, settings, stop, once)
            if once:
                break
            stop.wait(LOCK_SECONDS)
    except Stopped:
        pass
    stop.check()


def hold_and_transfer(transfer: Transfer, settings: TransferSettings, stop: Stop, once: bool) -> None:
    """Transfer as long as this process holds the source; returns at once if another does."""
    with ledger.lock_source(transfer.engine, transfer.source.name) as lock:
        if lock is None:
            get_logger().info("another transfer worker holds the source", source=transfer.source.name)
            notify.ready(f"another transfer worker serves {transfer.source.name}; this one would step in")
            return
        empty_tmp(transfer.tmp)
        try:
            push_unqueued(transfer)
            for unfinished in ledger.unfinished_mints(transfer.engine, transfer.source.name):
                finish_mint(transfer, unfinished, stop)
            do_fates(transfer)
            note = noting(transfer, stop) if not once else lambda: None  # who comes once is missed by nobody
            while not stop():
                began = time.monotonic()
                transfer_settled(transfer, settings, lock, stop, note)
                if once:
                    return
                stop.wait(max(0.0, settings.scan_seconds - (time.monotonic() - began)))
        finally:
            shutil.rmtree(transfer.tmp, ignore_errors=True)


def noting(transfer: Transfer, stop: Stop) -> Callable[[], None]:
    """What keeps in the ledger, once a minute, that the source answers."""
    noted = -NOTE_SECONDS

    def note() -> None:
        nonlocal noted
        if time.monotonic() - noted >= NOTE_SECONDS:
            patiently(stop, ledger.note_run, transfer.engine, f"source {transfer.source.name}")
            noted = time.monotonic()

    return note


def empty_tmp(tmp: Path) -> None:
    """Make the directory for archives, without what a killed run left. Raises Fatal where it cannot be written."""
    try:
        if tmp.exists():
            shutil.rmtree(tmp)
        tmp.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise Fatal(f"TRANSFER_TMP {tmp} cannot be used: {error.strerror}") from None


def transfer_settled(
    transfer: Transfer, settings: TransferSettings, lock: Connection, stop: Stop, note: Callable[[], None]
) -> None:
    """Look at the source once, and transfer batch after batch until nothing settled is left."""
    files = patiently(stop, source.settled, transfer.source, settings.settle_seconds)
    note()
    notify.ready(f"looking for recordings at {transfer.source.name}")
    for file in [file for file in files if not fits_header(file)]:
        get_logger().warning("archive at the source left out: its path is too long", path=file.path)
        files.remove(file)
    while files and not stop():
        lock.execute(text("SELECT 1"))  # the source is ours only as long as this connection lives
        minted = ledger.mint(
            transfer.engine,
            transfer.source.name,
            files,
            most_files=settings.batch_files,
            most_bytes=settings.batch_bytes,
        )
        if minted is None:
            return
        finish_mint(transfer, minted, stop)
        do_fates(transfer)
        note()
        mine = set(minted.files)  # one that was struck waits for the next look
        files = [file for file in files if file not in mine]


def fits_header(file: SourceFile) -> bool:
    """Whether a file can be named in its archive's metadata, where it is an archive itself."""
    return not file.path.lower().endswith(".tar") or len(s3_utils.as_header(file.path)) <= s3_utils.MAX_METADATA


def finish_mint(transfer: Transfer, minted: Mint, stop: Stop) -> None:
    """Bring a minted batch's archive into the store, record it, and push its job."""
    log = get_logger().bind(batch_id=minted.batch_id)
    began = time.monotonic()
    log.info("batch minted", files=len(minted.files), bytes=sum(file.size for file in minted.files))
    notify.status(f"transferring {minted.batch_id}: {len(minted.files)} files")
    path = transfer.tmp / f"{minted.batch_id}.tar"
    archive: Archive | None
    try:
        archive, struck = patiently(stop, stored_archive, transfer, minted) or patiently(
            stop, store_archive, transfer, minted, path
        )
        reason = "all its source files vanished or changed before upload"
    except Permanent as error:
        archive, struck, reason = None, {}, str(error)
    finally:
        path.unlink(missing_ok=True)
    job = None if archive is None else new_unpack_job(minted.batch_id, archive.file_count or 0)
    patiently(
        stop,
        ledger.record_upload,
        transfer.engine,
        minted.batch_id,
        job,
        archive or Archive(None, None, None),
        struck,
        reason,
    )
    for file, why in struck.items():
        log.warning("source file left out", path=file.path, reason=why)
    log = log.bind(duration=round(time.monotonic() - began, 3))
    if job is None:
        log.error("batch failed", reason=reason)
    else:
        patiently(stop, queues.push, transfer.client, UNPACK, job)
        metrics.RECORDINGS.labels("transferred").inc(archive.file_count or 0 if archive else 0)
        for file in minted.files if not is_archive(minted) else ():
            if file not in struck:
                log.info("recording uploaded", item=item_of(file.path), member=file.path, bytes=file.size)
        log.info("batch uploaded", files=len(minted.files) - len(struck))


def stored_archive(transfer: Transfer, minted: Mint) -> tuple[Archive | None, dict[SourceFile, str]] | None:
    """An archive that an earlier run stored for this batch and never recorded, read back whole; None if there is none.

    It is taken as it is: what the source holds now may be something else. A damaged one is deleted, if it can be built
    again; else it may be all that is left, and Permanent is raised.
    """
    try:
        info = s3_utils.head_archive(minted.batch_id, bucket=transfer.bucket)
        sha256, found = read_back(transfer.bucket, info, names if is_archive(minted) else reader.sources)
    except NotFound:
        return None
    if info.sha256 != sha256:
        now = source.stat(transfer.source, [file.path for file in minted.files])
        if any(now.get(file.path) != file for file in minted.files):
            raise Permanent(f"the archive's SHA-256 is {sha256}, uploaded was {info.sha256 or 'not said'}")
        s3_utils.delete_archive(info.key, bucket=transfer.bucket)
        return None
    there = set(minted.files if is_archive(minted) else found)
    struck = {file: "not in the stored archive" for file in minted.files if file not in there}
    return Archive(sha256, info.size, len(found)), struck


def read_back(
    bucket: Bucket, info: ArchiveInfo, entries: Callable[[BinaryIO, int], Iterator[T]]
) -> tuple[str, list[T]]:
    """SHA-256 of a stored archive, and its entries; those before the damage where it is broken.

    Raises NotFound; reader.Died and Killed, as then entries before the damage may be missing.
    """
    found: list[T] = []
    with s3_utils.open_archive(info, bucket=bucket) as stream:
        try:
            for entry in entries(cast(BinaryIO, stream), info.size):
                found.append(entry)
        except reader.Died:
            raise
        except tar.ArchiveBroken as error:
            get_logger().warning("archive is broken", key=info.key, reason=str(error))
        stream.drain()
        return stream.sha256(), found


def names(stream: BinaryIO, size: int) -> Iterator[str]:
    """The names of an archive's members."""
    return (member.name for member in reader.read(stream, size, compressed=True))


def is_archive(minted: Mint) -> bool:
    """Whether the batch is one archive that lay at the source, to be taken as it is."""
    return len(minted.files) == 1 and minted.files[0].path.lower().endswith(".tar")


def store_archive(transfer: Transfer, minted: Mint, path: Path) -> tuple[Archive | None, dict[SourceFile, str]]:
    """Build the archive of what is still as it was minted, and upload it. Also returns what was left out, and why.

    Raises Retryable if a file changed while it was read: the next try leaves it out.
    """
    with metrics.stage("build"):
        built, struck = (copy_archive if is_archive(minted) else build_archive)(transfer, minted, path)
    if built is None:
        return None, struck
    with metrics.stage("upload"):
        s3_utils.upload_archive(
            path,
            minted.batch_id,
            bucket=transfer.bucket,
            sha256=built.sha256,
            file_count=built.file_count,
            source=transfer.source.name,
            source_file=minted.files[0] if is_archive(minted) else None,
        )
    return Archive(built.sha256, built.size, built.file_count), struck


def build_archive(transfer: Transfer, minted: Mint, path: Path) -> tuple[tar.Built | None, dict[SourceFile, str]]:
    now = source.stat(transfer.source, [file.path for file in minted.files])
    struck = {
        file: "changed before upload" if file.path in now else "vanished before upload"
        for file in minted.files
        if now.get(file.path) != file
    }
    wanted = [file for file in minted.files if file not in struck]
    came: set[SourceFile] = set()

    def noted(members: Iterable[tuple[SourceFile, BinaryIO]]) -> Iterator[tuple[SourceFile, BinaryIO]]:
        for file, content in members:
            came.add(file)
            yield file, content

    with source.stream(transfer.source, wanted) as members:
        built = tar.build(noted(members), path)
    struck |= {file: "vanished before upload" for file in wanted if file not in came}
    return (built if came else None), struck


def copy_archive(transfer: Transfer, minted: Mint, path: Path) -> tuple[tar.Built | None, dict[SourceFile, str]]:
    (file,) = minted.files
    try:
        sha256, size = source.fetch_file(transfer.source, file, path)
    except NotFound:
        return None, {file: "vanished before upload"}
    except Permanent:
        return None, {file: "changed before upload"}
    count = 0
    try:
        with path.open("rb") as content:
            for _member in reader.read(content, size, compressed=True):
                count += 1
    except tar.ArchiveBroken as error:
        get_logger().warning("archive at the source is broken", path=file.path, reason=str(error))
    return tar.Built(sha256, size, count), {}


def push_unqueued(transfer: Transfer) -> None:
    """Push the job of every uploaded batch that Redis does not hold."""
    for batch_id, job in ledger.unqueued(transfer.engine, queues.queued_unpack_jobs(transfer.client)):
        queues.push(transfer.client, UNPACK, job)
        get_logger().info("job pushed again", batch_id=batch_id)


def do_fates(transfer: Transfer) -> None:
    """Move or delete source files whose archive is verified, where they still are what was archived."""
    files = ledger.unfated(transfer.engine, transfer.source.name)
    if not files:
        return
    gone = {file.path for file in files}
    if transfer.fate in ("move", "delete"):
        done = source.apply_fate(transfer.source, files, "move" if transfer.fate == "move" else "delete")
        left = [file for file in files if file.path not in done]
        now = source.stat(transfer.source, [file.path for file in left]) if left else {}
        stuck = {file.path for file in left if now.get(file.path) == file}
        if stuck:
            get_logger().warning(
                "source files cannot be removed", fate=transfer.fate, count=len(stuck), first=min(stuck)
            )
        gone -= stuck
    ledger.fated(transfer.engine, transfer.source.name, [file for file in files if file.path in gone])
