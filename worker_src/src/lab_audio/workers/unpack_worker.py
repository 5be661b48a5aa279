"""The unpack worker: an archive becomes Opus files on this host's scratch, sealed in the ledger, published in Redis."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from lab_audio import ledger, metrics, notify, queues, s3_utils, scratch
from lab_audio.config import UnpackSettings
from lab_audio.contracts import item_of, opus_path
from lab_audio.errors import Fatal, LabAudioError, NotFound, Permanent
from lab_audio.jobs import TranscribeJob, UnpackJob, parse_unpack_job
from lab_audio.ledger import Archive, NewItem, Refused
from lab_audio.log import get_logger
from lab_audio.media import archive as tar
from lab_audio.media import canary, reader, transcode
from lab_audio.workers.host import Host, attend, open_host, open_inbox, tidy, tidy_batch
from lab_audio.workers.loop import COMPLAIN_SECONDS, Stop, Stopped, patiently

SPOOL_BYTES = 16 << 20
PAUSE_SECONDS = 2
MAX_ATTEMPTS = 5
MAX_FILE_BYTES = 4 << 30  # a day of the best MP3 is 3.5 GB
MAX_NAME_BYTES = 2000  # what PostgreSQL can index
FFMPEG_PAUSES = (5, 30)  # seconds before it is tried once more, where it may have been the host's fault


@dataclass(frozen=True)
class Encoding:
    """How recordings become Opus: bits per second, how many at once, and whether from compressed archives, too."""

    bitrate: int
    threads: int
    compressed: bool = False


@dataclass
class Contents:
    """What a batch's folder holds, kept while a store is away. `rows`: item to row; `etag`: of which archive.

    `room` and `quota`: bytes that it takes with the results to come, and that it may take.
    """

    folder: Path
    quota: int
    etag: str | None = None
    rows: dict[str, NewItem] = field(default_factory=dict)
    room: int = 0

    def add(self, row: NewItem) -> None:
        """Enter a row. Raises OSError beyond the quota."""
        self.rows[row.item] = row
        self.room += row.room
        if self.room > self.quota:
            raise full(self.quota)


def full(quota: int) -> OSError:
    return OSError(errno.EDQUOT, f"the batch needs more than the {quota} bytes set aside for it")


def run(settings: UnpackSettings, stop: Stop) -> None:
    """Serve `unpack` until asked to stop; the batch in hand is finished, or left to the slot if a store is away."""
    host = open_host(settings, stop)
    slot, inbox = open_inbox(host, "unpack")
    encoding = Encoding(settings.opus_bitrate, settings.transcode_threads, settings.compressed_archives)
    attend(host, ("unpack",), stop)
    get_logger().info("unpack worker ready", host=host.name, slot=slot.number)
    notify.ready("waiting for archives")
    said = -float(COMPLAIN_SECONDS)
    try:
        while not stop():
            job = patiently(stop, inbox.claim, PAUSE_SECONDS)
            why = None if job is None else handle(host, inbox, job, encoding, stop)
            if why:
                if time.monotonic() - said >= COMPLAIN_SECONDS:
                    said = time.monotonic()
                    get_logger().info("not to be unpacked now", why=why, job=job)
                    notify.status(f"takes no archive now: {why}")
                stop.wait(PAUSE_SECONDS)
    except Stopped:
        pass
    finally:
        slot.release()
    stop.check()


def handle(host: Host, inbox: queues.Inbox, job: str, encoding: Encoding, stop: Stop) -> str | None:
    """Do one unpack job to its end, or put it back on its list and return why this host is to take nothing for now.

    Raises Fatal if scratch fails.
    """
    try:
        wanted = parse_unpack_job(job)
        if not patiently(stop, known, host, wanted, job):
            raise Permanent("its batch is unknown and has no archive")
    except Permanent as error:
        get_logger().error("unpack job set aside", reason=str(error), job=job[:200])
        patiently(stop, inbox.bury, job)
        return None
    with scratch.batch_lock(host.scratch, wanted.batch_id) as locked:
        if locked:
            try:
                refused = attempt(host, wanted.batch_id, encoding, stop)
            except OSError as error:
                raise Fatal(f"SCRATCH_ROOT {host.scratch}: {error}") from error
        else:
            refused = Refused("somebody on this host unpacks, tidies or returns it", "tail")
        if refused is not None and refused.job != "drop":
            patiently(stop, inbox.move, job, inbox.source, refused.job)
            return refused.why
        patiently(stop, publish, host, inbox, wanted.batch_id, job)
    patiently(stop, tidy_batch, host, wanted.batch_id)
    notify.status("waiting for archives")
    return None


def attempt(host: Host, batch_id: str, encoding: Encoding, stop: Stop) -> Refused | None:
    """TAKE and unpack a batch whose lock is held. Returns why, if it is neither sealed nor failed now.

    Raises OSError if scratch fails; where it is only full, the batch is given back.
    """
    log, began = get_logger().bind(batch_id=batch_id), time.monotonic()
    taken = patiently(stop, lambda: ledger.take(host.engine, batch_id, host.name, scratch.capacity(host.scratch)))
    if isinstance(taken, Refused):
        if taken.job == "drop":
            log.info("not to be unpacked", why=taken.why)
        return taken
    notify.status(f"unpacking {batch_id}")
    log = log.bind(attempt=taken.attempts)
    try:
        with metrics.stage("unpack"):
            unpack(host, batch_id, taken, encoding, stop)
        return None
    except Permanent as error:
        reason = str(error)
    except (LabAudioError, Stopped):
        raise
    except OSError as error:
        if not scratch.is_full(error):
            raise
        log.warning("batch given back, for want of room on scratch", why=error.strerror)
        metrics.RETRIES.labels("scratch").inc()
        scratch.cleanup_scratch(batch_id, root=host.scratch)
        patiently(stop, tidy, host)  # strays take room that is nobody's
        failed = patiently(
            stop, lambda: ledger.return_full(host.engine, batch_id, host.name, scratch.capacity(host.scratch))
        )
        if failed is None:
            return Refused(f"scratch is full: {error.strerror}", "head")
        log.error("batch failed", reason=failed, duration=seconds_since(began))
        return None
    except Exception as error:
        log.exception("unpacking went wrong")
        reason = f"{type(error).__name__}: {error}"[:500]
        if taken.attempts < MAX_ATTEMPTS:
            scratch.cleanup_scratch(batch_id, root=host.scratch)
            patiently(stop, ledger.give_back, host.engine, batch_id, host.name)
            return Refused(reason, "tail")
    log.error("batch failed", reason=reason, duration=seconds_since(began))
    patiently(stop, ledger.fail, host.engine, batch_id, host.name, reason)
    return None


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


def unpack(host: Host, batch_id: str, taken: ledger.Taken, encoding: Encoding, stop: Stop) -> None:
    """Fill the batch's folder, from its archive or from the kept Opus, and SEAL.

    Raises Permanent if the batch is to fail; OSError, also where its quota of scratch does not do.
    """
    began = time.monotonic()
    contents = Contents(scratch.fresh_dir(host.scratch, batch_id), taken.quota)
    if taken.archive_gone:
        patiently(stop, fetch_kept, host, batch_id, contents)
        archive, flags = taken.archive, list(taken.flags)
        known = len(taken.settled) + len(contents.rows)
        if not known:
            raise Permanent("its archive is gone, and nothing of it is kept")
        if known < (archive.file_count or 0):
            flags.append(f"archive: gone; {known} of its {archive.file_count} recordings are known")
    else:
        archive, flags = patiently(stop, read_archive, host, batch_id, taken, encoding, contents)
    rows = list(contents.rows.values())
    state = patiently(stop, ledger.seal, host.engine, batch_id, host.name, rows, archive, flags)
    log = get_logger().bind(batch_id=batch_id, attempt=taken.attempts, duration=seconds_since(began))
    if state is not None:
        tell_entered(log, [row for row in rows if row.item not in taken.settled])
    log.info("batch unpacked", state=state, items=len(rows), flags=flags)


def seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 3)


def tell_entered(log: Any, rows: list[NewItem]) -> None:
    """Count what SEAL has entered, and say what of it is dead."""
    for row in rows:
        metrics.RECORDINGS.labels("encoded" if row.reason is None else "dead").inc()
        if row.reason is not None:
            log.warning("recording set aside", item=row.item, member=row.member, reason=row.reason)


def fetch_kept(host: Host, batch_id: str, contents: Contents) -> None:
    """Fill a folder with the Opus that the store keeps of each item without a result; goes on after an earlier try."""
    for row, key in ledger.kept_items(host.engine, batch_id):
        if row.item in contents.rows:
            continue
        opus = contents.folder / f"{row.item}.opus"
        try:
            size = s3_utils.download_opus(key, opus, bucket=host.bucket)
            seconds = transcode.duration(opus)
            contents.add(replace(row, seconds=seconds, room=scratch.room_of(size, seconds)))
        except NotFound:
            contents.add(replace(row, reason="its archive and its Opus are gone"))
        except Permanent as error:
            contents.add(replace(row, reason=f"its archive is gone, and of its Opus: {error}"))


def read_archive(
    host: Host, batch_id: str, taken: ledger.Taken, encoding: Encoding, contents: Contents
) -> tuple[Archive, list[str]]:
    """Fill a folder from the archive; goes on after an earlier try, unless the archive was replaced since.

    Returns the archive as found and the batch's flags. Raises Permanent if the archive is missing or is not the one
    that was uploaded.
    """
    try:
        info = s3_utils.head_archive(batch_id, bucket=host.bucket)
    except NotFound:
        raise Permanent("archive missing") from None
    promised = taken.archive.sha256 or info.sha256
    if contents.etag not in (None, info.etag):
        contents.rows.clear()
        contents.room = 0
    contents.etag, folder = info.etag, contents.folder
    flags: list[str] = []
    recordings, cut = 0, None
    most = info.size * (tar.MAX_RATIO if encoding.compressed else 1)  # that come of it, whatever it says
    running: deque[tuple[Future[NewItem], int]] = deque()

    def collect(left: int, room: int = 0) -> None:
        """Until no more than `left` are being encoded, and `room` beside them fits into the quota, if it can."""
        while running and (
            len(running) > left or contents.room + sum(size for _encoding, size in running) + room > contents.quota
        ):
            contents.add(running.popleft()[0].result())

    with (
        s3_utils.open_archive(info, bucket=host.bucket) as stream,
        ThreadPoolExecutor(encoding.threads, thread_name_prefix="encode") as pool,
    ):
        try:
            for member in reader.read(cast(BinaryIO, stream), info.size, compressed=encoding.compressed):
                recordings += 1
                notify.progress()
                row = entry(member)
                if row.item in contents.rows:
                    continue
                if row.reason is not None or row.item in taken.settled or member.file is None:
                    contents.add(row)
                else:
                    spool = min(member.size, most) if member.size > SPOOL_BYTES else 0
                    collect(2 * encoding.threads - 1, spool)
                    if contents.room + spool > contents.quota:
                        raise full(contents.quota)
                    try:
                        mp3 = spooled(member.file, folder)
                    except tar.ArchiveBroken as error:
                        cut = replace(row, reason=f"is cut off: {error}")
                        raise
                    job = pool.submit(encode, row, mp3, folder, encoding.bitrate, taken.attempts)
                    running.append((job, spool))
        except tar.ArchiveBroken as error:
            flags.append(f"archive: {error}")
        except reader.Killed as error:  # not waited for, but counted: this archive may be what fills the memory
            raise RuntimeError(str(error)) from error
        finally:
            collect(0)
        stream.drain()
        found = stream.sha256()
    if cut is not None:  # only now: had the store gone away, it might be whole when it is read again
        contents.add(cut)
    if promised is not None and found != promised:
        raise Permanent(f"the archive's SHA-256 is {found}, uploaded was {promised}")
    if taken.archive.file_count not in (None, recordings):
        flags.append(f"file_count: the job says {taken.archive.file_count}, the archive holds {recordings}")
    return Archive(found, info.size, recordings), flags


def entry(member: tar.Member) -> NewItem:
    """The row of a member, with a reason if it is not to be encoded."""
    name, reason, item = member.name, member.problem, item_of(member.name)
    if len(name.encode()) > MAX_NAME_BYTES:
        name = f"{name[:200]}... {item}"
        reason = f"its name is longer than {MAX_NAME_BYTES} bytes"
    elif reason is None and not name.lower().endswith(".mp3"):
        reason = "is not an .mp3 file"
    elif reason is None and member.size > MAX_FILE_BYTES:
        reason = f"is larger than {MAX_FILE_BYTES >> 30} GiB"
    return NewItem(name, item, PurePosixPath(name).name, reason=reason)


def spooled(recording: BinaryIO, folder: Path) -> BinaryIO:
    """Copy a recording out of the stream: into memory, or beside the batch if it is large."""
    spool = cast(BinaryIO, tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder)))  # noqa: SIM115 (encode closes it)
    try:
        shutil.copyfileobj(recording, spool, 1 << 20)
        spool.seek(0)
    except BaseException:
        with suppress(OSError):  # its own, if scratch is full; it takes room until it is closed
            spool.close()
        raise
    return spool


def encode(row: NewItem, mp3: BinaryIO, folder: Path, bitrate: int, attempt: int) -> NewItem:
    """Encode one recording; one that cannot be is a row with the reason. `attempt`: of its batch."""
    reason, began = "", time.monotonic()
    with mp3:
        for pause in (*FFMPEG_PAUSES, None):
            try:
                target = folder / f"{row.item}.opus"
                seconds, most = encode_bounds(mp3, bitrate)
                mp3.seek(0)
                with metrics.stage("encode"):
                    opus = transcode.encode(mp3, target, bitrate=bitrate, timeout=seconds, most=most)
                break
            except transcode.Unfinished as error:  # for want of memory or time, perhaps not its own
                if pause is not None:
                    metrics.RETRIES.labels("ffmpeg").inc()
                    time.sleep(pause)
                    continue
                reason = f"{error}, {len(FFMPEG_PAUSES) + 1} times"
            except Permanent as error:
                reason = str(error)
            canary.encode(folder)  # else ffmpeg is broken, not the recording
            return replace(row, reason=reason)
    log = get_logger().bind(batch_id=folder.name, item=row.item, member=row.member, attempt=attempt)
    log.info("recording encoded", seconds=round(opus.seconds, 3), duration=seconds_since(began))
    return replace(row, seconds=opus.seconds, room=scratch.room_of(opus.size, opus.seconds))


def encode_bounds(mp3: BinaryIO, bitrate: int) -> tuple[float, int]:
    """Seconds that encoding may take: a minute, and what a tenth of a core needs for MP3 of 8 kb/s; and bytes that may
    come of it: a MiB, and twice what such MP3 makes.
    """
    size = mp3.seek(0, os.SEEK_END)
    return 60 + size / 30_000, (1 << 20) + 2 * size * bitrate // 8_000
