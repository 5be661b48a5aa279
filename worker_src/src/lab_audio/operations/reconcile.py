"""RECONCILE: hosts that are gone lose their batches, Redis is told again what the ledger knows, archives that nobody
knows are entered, and the rows are compared with the objects.

Everything here may run at any time, beside the workers and beside itself, and may be killed anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path

from redis import Redis
from sqlalchemy import Engine

from lab_audio import ledger, queues, s3_utils
from lab_audio.contracts import UNPACK, SourceFile
from lab_audio.errors import NotFound, Permanent
from lab_audio.jobs import new_unpack_job
from lab_audio.ledger import Archive, recovery
from lab_audio.log import get_logger
from lab_audio.media import reader
from lab_audio.s3_utils import ArchiveInfo, Bucket
from lab_audio.source import check_path
from lab_audio.workers.host import delete_dead_object, lose_host
from lab_audio.workers.transfer_sounds import read_back
from lab_audio.workers.unpack_worker import transcribe_jobs

PAGE = 1000
LATE = timedelta(hours=1)  # a worker that another one overtook may still be uploading


@dataclass(frozen=True)
class Stores:
    engine: Engine
    client: Redis
    bucket: Bucket


@dataclass
class Report:
    """What was done (in a dry run: would be), and what only a person can mend.

    `doubted_hosts` are silent and lose their batches at the next reconcile, if it is 40 s later.
    """

    doubted_hosts: list[str] = field(default_factory=list)
    lost_hosts: list[str] = field(default_factory=list)
    returned_batches: list[str] = field(default_factory=list)
    adopted_archives: list[str] = field(default_factory=list)
    pushed_jobs: list[str] = field(default_factory=list)
    published_batches: list[str] = field(default_factory=list)
    forgotten_keys: list[str] = field(default_factory=list)
    deleted_objects: list[str] = field(default_factory=list)
    objects_without_rows: list[str] = field(default_factory=list)
    rows_without_objects: list[str] = field(default_factory=list)


def reconcile(stores: Stores, grace_seconds: float, *, dry_run: bool = False, audit: bool = True) -> Report:
    """Put right what can be put right; with `audit` also compare every row with its object. Raises Retryable, Fatal."""
    report = Report()
    find_lost_hosts(stores, grace_seconds, report, dry_run=dry_run)
    adopt_archives(stores, report, dry_run=dry_run)
    push_jobs(stores, report, dry_run=dry_run)
    publish_again(stores, report, dry_run=dry_run)
    forget_keys(stores, report, dry_run=dry_run)
    if audit:
        compare_objects(stores, report, dry_run=dry_run)
    return report


def find_lost_hosts(stores: Stores, grace_seconds: float, report: Report, *, dry_run: bool) -> None:
    """LOST, for hosts that have been silent and doubted; what Redis still has of hosts that are lost goes too."""
    present = ledger.present_hosts(stores.engine)
    silent = ledger.silent_hosts(stores.engine, grace_seconds, doubt=not dry_run)
    report.doubted_hosts += [host for host, doubted in silent if not doubted]
    gone = [host for host, doubted in silent if doubted]
    for host in [*gone, *sorted(queues.named_hosts(stores.client) - present.keys())]:
        returned: Iterable[str] | None
        if dry_run:
            returned = ledger.held_batches(stores.engine, host)
        else:
            returned = lose_host(stores.engine, stores.client, host, unless_seen=True)
        if returned is None:
            continue
        report.returned_batches += sorted(returned)
        if host in gone:
            report.lost_hosts.append(host)


def adopt_archives(stores: Stores, report: Report, *, dry_run: bool) -> None:
    """Enter archives that other programs put, and whose jobs were lost."""
    for batch_ids in pages(s3_utils.archives(stores.bucket)):
        known = recovery.batch_states(stores.engine, batch_ids)
        for batch_id in batch_ids:
            if batch_id not in known and adopt_archive(stores, batch_id, dry_run=dry_run):
                report.adopted_archives.append(batch_id)


def adopt_archive(stores: Stores, batch_id: str, *, dry_run: bool) -> bool:
    """Enter an archive; one of a transfer worker, which the ledger can only have forgotten, with its source files.

    A transfer worker's is read back whole, but not in a dry run. If it is not what was uploaded, its batch has failed,
    whatever somebody reads later, and its source files are taken anew. False if there is nothing to enter: it has gone,
    or its source is known.
    """
    try:
        info = s3_utils.head_archive(batch_id, bucket=stores.bucket)
        source, files, damage = info.source, [], None
        if source is not None and not dry_run:
            files = source_files(stores, info)
    except NotFound:
        return False
    except Permanent as error:
        source, damage = None, f"{error}; source files that are still there are taken anew"
        get_logger().error("archive is damaged", key=info.key, reason=str(error))
    job = new_unpack_job(batch_id, info.file_count or 0)
    archive = Archive(info.sha256, info.size, info.file_count)
    return recovery.adopt_archive(stores.engine, batch_id, job, archive, source, files, damage, dry_run=dry_run)


def source_files(stores: Stores, info: ArchiveInfo) -> list[SourceFile]:
    """The source files that an archive was made of; those before the damage where it is a broken tar.

    Raises Permanent if its bytes are not those that were uploaded, or its headers not of a transfer worker; NotFound.
    """
    sha256, files = read_back(stores.bucket, info, reader.sources)
    if sha256 != info.sha256:
        raise Permanent(f"the archive's SHA-256 is {sha256}, uploaded was {info.sha256 or 'not said'}")
    files = files if info.source_file is None else [info.source_file]
    for file in files:
        check_path(file.path)
    return files


def push_jobs(stores: Stores, report: Report, *, dry_run: bool) -> None:
    """Push the job of every batch that is to be unpacked and that Redis does not hold."""
    queued = queues.queued_unpack_jobs(stores.client)
    for batch_id, job in ledger.unqueued(stores.engine, queued, lost_hosts=report.lost_hosts):
        report.pushed_jobs.append(batch_id)
        if not dry_run:
            queues.push(stores.client, UNPACK, job)
    if dry_run:
        report.pushed_jobs += report.adopted_archives


def publish_again(stores: Stores, report: Report, *, dry_run: bool) -> None:
    """PUBLISH every ready batch of which Redis misses a job or the counters."""
    roots = ledger.present_hosts(stores.engine)
    flying = {host: queues.transcribe_jobs_of(stores.client, host) for host in roots}
    for batch_id, host in recovery.ready_batches(stores.engine):
        root = roots.get(host)
        if root is None or host in report.lost_hosts:
            continue
        pending = recovery.pending_items(stores.engine, batch_id)
        if flying[host].issuperset(transcribe_jobs(Path(root), batch_id, pending)) and queues.is_published(
            stores.client, batch_id
        ):
            continue
        report.published_batches.append(batch_id)
        if dry_run:
            continue
        with ledger.publishing(stores.engine, batch_id, host) as batch:
            if batch is not None:
                jobs = transcribe_jobs(Path(root), batch_id, batch.pending)
                queues.publish(stores.client, host, batch_id, batch.total, batch.processed, jobs)


def forget_keys(stores: Stores, report: Report, *, dry_run: bool) -> None:
    """Delete the keys of batches that nobody has in hand: a Redis that was restored or crashed may have them again."""
    for batch_id in recovery.keyless_batches(stores.engine, queues.named_batches(stores.client)):
        report.forgotten_keys.append(batch_id)
        if not dry_run:
            queues.forget_batch(stores.client, batch_id)


def compare_objects(stores: Stores, report: Report, *, dry_run: bool) -> None:
    """Compare rows and objects date by date; what looks wrong is looked at once more, for workers are at work."""
    dates = {*recovery.entered_dates(stores.engine), *s3_utils.processed_dates(stores.bucket)}
    for date in sorted(dates):
        rows = recovery.recordings_of(stores.engine, date)
        objects = s3_utils.processed(stores.bucket, date)
        for audio_id, key in objects.items():
            row = rows.get(audio_id)
            if row is None or not row.needs(key):
                check_object(stores, audio_id, key, report, dry_run=dry_run)
        for audio_id, row in rows.items():
            path = row.s3_opus_path
            if path and objects.get(audio_id) != path and s3_utils.stored_at(stores.bucket, path) is None:
                report.rows_without_objects.append(path)


def check_object(stores: Stores, audio_id: int, key: str, report: Report, *, dry_run: bool) -> None:
    """An object that no row seems to need: what a dead recording left behind is deleted, else it is reported.

    One that came well after its recording died was not left behind: the ledger may be older than the store. One whose
    archive is gone is the last that there is of it.
    """
    row = recovery.recording(stores.engine, audio_id)
    at = s3_utils.stored_at(stores.bucket, key)
    if at is None or (row is not None and row.needs(key)):
        return
    left_behind = row is not None and row.settled_at is not None and at <= row.settled_at + LATE
    if left_behind and delete_dead_object(stores.engine, stores.bucket, audio_id, key, dry_run=dry_run):
        report.deleted_objects.append(key)
    else:
        report.objects_without_rows.append(key)


def pages(names: Iterable[str]) -> Iterable[list[str]]:
    names = iter(names)
    while page := list(islice(names, PAGE)):
        yield page
