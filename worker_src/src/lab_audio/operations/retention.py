"""Retention: what nobody needs any more goes. Archives of complete batches, uploads that were given up, stray scratch.

Everything here may run at any time, beside the workers and beside itself, and may be killed anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from lab_audio import ledger, s3_utils, scratch
from lab_audio.config import HostSettings
from lab_audio.errors import NotFound
from lab_audio.log import get_logger
from lab_audio.operations.reconcile import Stores
from lab_audio.workers.host import Host, strays, tidy_batch

UPLOAD_AGE = timedelta(hours=24)
KINDS = ("archive", "upload", "scratch")


@dataclass(frozen=True)
class Removal:
    """What was deleted, or in a dry run would be: an `archive`, an `upload`, or a folder on `scratch`."""

    kind: str
    name: str
    bytes: int


def sweep(stores: Stores, host: Host | None, days: int, *, dry_run: bool = False) -> Iterator[Removal]:
    """Delete it all, yielding each when it is gone; folders only on a host that has scratch."""
    yield from archives(stores, days, dry_run=dry_run)
    yield from uploads(stores, dry_run=dry_run)
    if host is not None:
        yield from folders(host, dry_run=dry_run)


def archives(stores: Stores, days: int, *, dry_run: bool) -> Iterator[Removal]:
    """Delete the archives of batches that have been complete for `days`. The ledger notes each before it goes.

    The bucket says which there are: so one is found, too, whose deletion was cut short or came to nothing. What it
    does not have any more, as somebody else deleted it, is noted. Raises Retryable, Fatal.
    """
    for batch_id in s3_utils.archives(stores.bucket):
        if not ledger.expire_archive(stores.engine, batch_id, days=days, dry_run=dry_run):
            continue
        try:
            info = s3_utils.head_archive(batch_id, bucket=stores.bucket)
        except NotFound:  # another retention was faster
            continue
        if not dry_run:
            s3_utils.delete_archive(info.key, bucket=stores.bucket)
        yield Removal("archive", info.key, info.size)
    if dry_run:
        return
    for batch_id in ledger.expired_archives(stores.engine, days):
        try:
            s3_utils.head_archive(batch_id, bucket=stores.bucket)
        except NotFound:
            get_logger().warning("the archive was gone already", batch_id=batch_id)
            ledger.expire_archive(stores.engine, batch_id, days=days)


def uploads(stores: Stores, age: timedelta = UPLOAD_AGE, *, dry_run: bool) -> Iterator[Removal]:
    """Abort multipart uploads older than `age`; one that is alive after all is begun again. Raises Retryable, Fatal."""
    for prefix in ("archives/", "processed/"):
        for upload in s3_utils.unfinished_uploads(stores.bucket, prefix):
            if datetime.now(timezone.utc) - upload.began < age:
                continue
            size = s3_utils.upload_size(stores.bucket, upload)
            if not dry_run:
                s3_utils.abort_upload(stores.bucket, upload)
            yield Removal("upload", upload.key, size)


def host_here(stores: Stores, settings: HostSettings) -> Host | None:
    """This host, if the ledger knows this machine's scratch under its name; by another's name all would look stray."""
    try:
        disk = (settings.scratch_root / ".id").read_text()
    except OSError:
        return None
    if disk != ledger.disk_of(stores.engine, settings.lab_host):
        return None
    after = settings.archive_after_batch
    return Host(settings.lab_host, settings.scratch_root, stores.engine, stores.client, stores.bucket, after)


def folders(host: Host, *, dry_run: bool) -> Iterator[Removal]:
    """Remove folders of batches that the ledger does not give this host, but for those that a worker has in hand."""
    for batch_id in strays(host):
        folder = scratch.batch_dir(host.scratch, batch_id)
        size = used(folder)
        if not dry_run:
            tidy_batch(host, batch_id)
        if dry_run or not folder.exists():
            yield Removal("scratch", str(folder), size)


def used(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where it vanishes meanwhile."""
    with suppress(OSError):
        return sum(path.lstat().st_size for path in folder.iterdir())
    return 0
