"""After the database came back from an older dump: the stores know what happened since, and the ledger learns it.

What the dump knows stays; batches that were at work are unpacked anew. Archives that it does not know are entered
with their source files, from their headers, so that no file is taken twice. Objects that it does not know keep their
audio_id: they are entered as pending and go through the models again, from their archive or, where that is gone, from
the Opus itself.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from lab_audio import ledger, queues, s3_utils
from lab_audio.contracts import archive_key, item_of
from lab_audio.errors import ConfigError, NotFound
from lab_audio.jobs import new_unpack_job
from lab_audio.ledger import recovery
from lab_audio.media import reader
from lab_audio.media.archive import ArchiveBroken
from lab_audio.operations.reconcile import Stores, adopt_archive, pages
from lab_audio.s3_utils import Origin
from lab_audio.workers.host import lose_host

READERS = 16


@dataclass
class RestoreReport:
    """What was done, or in a dry run would be. `unclear_objects`: no metadata of ours, or another row has their place.

    `batches_without_archive`: what is left of them is their objects. If their source files were kept, these come a
    second time unless they are moved away. `broken_archives`: not all source files are known; a dry run reads none.
    Both as they stand now, also where an earlier run was cut short.
    """

    returned_batches: list[str] = field(default_factory=list)
    adopted_archives: list[str] = field(default_factory=list)
    broken_archives: list[str] = field(default_factory=list)
    batches_without_archive: list[str] = field(default_factory=list)
    adopted_objects: list[str] = field(default_factory=list)
    unclear_objects: list[str] = field(default_factory=list)
    next_audio_id: int | None = None


def restore(stores: Stores, *, dry_run: bool = False) -> RestoreReport:
    """Bring the ledger up to what the stores hold. May be run again if it was cut short.

    Raises ConfigError while a worker is connected, Retryable, Fatal.
    """
    if others := recovery.other_sessions(stores.engine):
        raise ConfigError(f"workers are connected to the ledger, from {', '.join(others)}: stop all of them first")
    report = RestoreReport()
    if not dry_run:
        queues.forget_everything(stores.client)
    for host in recovery.known_hosts(stores.engine):
        if dry_run:
            report.returned_batches += sorted(ledger.held_batches(stores.engine, host))
        else:
            report.returned_batches += sorted(lose_host(stores.engine, stores.client, host) or [])
    new, highest = new_objects(stores)
    if not dry_run:
        report.next_audio_id = recovery.spare_ids(stores.engine, highest) + 1
    archives = Archives(stores, report, dry_run)
    for page in pages(s3_utils.archives(stores.bucket)):
        archives.adopt(page)
    reopened = adopt_objects(stores, new, archives, report, dry_run=dry_run)
    for batch_id in recovery.archived_batches(stores.engine):
        if archives.there(batch_id) or (is_failed(stores, batch_id) and not anything_kept(stores, batch_id)):
            continue
        if not dry_run:
            recovery.note_archive_gone(stores.engine, batch_id, new_unpack_job(batch_id, 0))
    report.batches_without_archive += recovery.open_without_archive(stores.engine, archives.gone(), reopened)
    report.broken_archives += recovery.without_all_sources(stores.engine)
    return report


def is_failed(stores: Stores, batch_id: str) -> bool:
    batch = ledger.find_batch(stores.engine, batch_id)
    return batch is not None and batch.state == "failed"


def anything_kept(stores: Stores, batch_id: str) -> bool:
    """Whether the store has the Opus of a recording of this batch that waits for its result."""
    items = ledger.kept_items(stores.engine, batch_id)
    return any(s3_utils.stored_at(stores.bucket, key) is not None for _item, key in items)


@dataclass
class Archives:
    """Which archives are in the store. A listing may lag behind either way, so each is asked for itself, once."""

    stores: Stores
    report: RestoreReport
    dry_run: bool
    asked: dict[str, bool] = field(default_factory=dict)

    def adopt(self, batch_ids: list[str]) -> None:
        """Enter those of these archives that the ledger does not know, or of which it knows no source."""
        for batch_id in recovery.unknown_sources(self.stores.engine, batch_ids):
            if adopt_archive(self.stores, batch_id, dry_run=self.dry_run):
                self.report.adopted_archives.append(batch_id)

    def there(self, batch_id: str) -> bool:
        """Whether an archive is in the store; one that was not listed is adopted now."""
        if batch_id not in self.asked:
            self.asked[batch_id] = s3_utils.stored_at(self.stores.bucket, archive_key(batch_id)) is not None
            if self.asked[batch_id] and batch_id not in self.report.adopted_archives:
                self.adopt([batch_id])
        return self.asked[batch_id]

    def gone(self) -> set[str]:
        return {batch_id for batch_id, there in self.asked.items() if not there}


def new_objects(stores: Stores) -> tuple[dict[int, tuple[str, str]], int]:
    """Objects that have no row, or whose recording the ledger believes dead: audio_id to (date, key); and the highest
    audio_id of all objects.
    """
    new: dict[int, tuple[str, str]] = {}
    highest = 0
    for date in s3_utils.processed_dates(stores.bucket):
        rows = recovery.recordings_of(stores.engine, date)
        for audio_id, key in s3_utils.processed(stores.bucket, date).items():
            highest = max(highest, audio_id)
            row = rows.get(audio_id) or recovery.recording(stores.engine, audio_id)
            if row is None or row.state == "dead":
                new[audio_id] = date, key
    return new, highest


def adopt_objects(
    stores: Stores, new: dict[int, tuple[str, str]], archives: Archives, report: RestoreReport, *, dry_run: bool
) -> set[str]:
    """Enter these objects as pending recordings of their batches. Returns the batches."""

    def origin(found: tuple[str, str]) -> Origin | None:
        try:
            return s3_utils.origin(stores.bucket, found[1])
        except NotFound:
            return None

    members: dict[str, dict[str, str]] = {}
    taken: set[tuple[str, str]] = set()  # places, for a dry run, in which the ledger does not tell
    reopened: set[str] = set()
    with ThreadPoolExecutor(READERS) as readers:
        for (audio_id, (date, key)), found in zip(new.items(), readers.map(origin, new.values()), strict=True):
            if found is None:
                report.unclear_objects.append(key)
                continue
            batch_id, item = found.batch_id, found.member_sha1[:16]
            archived = archives.there(batch_id)
            member = found.member.encode("utf-8", "surrogateescape").decode("utf-8", "ignore")
            if item_of(member) != item:  # cut, as it was too long for a header, perhaps within a letter
                if archived and batch_id not in members:
                    members[batch_id] = member_names(stores, batch_id)
                member = members.get(batch_id, {}).get(item, f"{member}... {item}")
            adopted = (batch_id, item) not in taken and recovery.adopt_recording(
                stores.engine, audio_id, date, batch_id, member, item, new_unpack_job(batch_id, 0), dry_run=dry_run
            )
            (report.adopted_objects if adopted else report.unclear_objects).append(key)
            if adopted:
                taken.add((batch_id, item))
                reopened.add(batch_id)
    return reopened


def member_names(stores: Stores, batch_id: str) -> dict[str, str]:
    """The name of each item of an archive; none where it has just gone."""
    names: dict[str, str] = {}
    try:
        info = s3_utils.head_archive(batch_id, bucket=stores.bucket)
    except NotFound:
        return names
    with s3_utils.open_archive(info, bucket=stores.bucket) as stream, suppress(ArchiveBroken):
        for member in reader.read(cast(BinaryIO, stream), info.size, compressed=True):
            names[item_of(member.name)] = member.name
    return names
