"""What a host does beside its jobs: it beats, tidies its scratch, and returns the jobs of its dead slots."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from sqlalchemy import Engine

from lab_audio import ledger, metrics, queues, scratch
from lab_audio.config import GpuSettings, MediaSettings, UnpackSettings
from lab_audio.contracts import TRANSCRIBE, UNPACK, archive_key, processing_list, transcribe_list
from lab_audio.errors import ConfigError, Fatal, Permanent
from lab_audio.jobs import parse_transcribe_job
from lab_audio.ledger.hosts import BEAT_SECONDS
from lab_audio.log import get_logger
from lab_audio.media import sandbox
from lab_audio.release import release
from lab_audio.s3_utils import Bucket, delete_archive, delete_opus, open_bucket
from lab_audio.workers.loop import Stop, in_background, patiently

TIDY_SECONDS = 60


@dataclass(frozen=True)
class Host:
    """A host's name, its scratch, and the three stores."""

    name: str
    scratch: Path
    engine: Engine
    client: Redis
    bucket: Bucket
    archive_after_batch: str = "keep"

    def list_of(self, kind: str) -> str:
        """The list that a kind of worker serves here."""
        return {"unpack": UNPACK, "route": TRANSCRIBE, "gpu": transcribe_list(self.name)}[kind]


def open_host(settings: UnpackSettings | GpuSettings, stop: Stop) -> Host:
    """Open the stores, waiting for them, and enter this host. Raises Fatal or ConfigError if it may not work."""
    host = Host(
        settings.lab_host,
        settings.scratch_root,
        ledger.open_ledger(settings),
        queues.open_queues(settings),
        open_bucket(settings),
        settings.archive_after_batch,
    )
    patiently(stop, ledger.check_migrated, host.engine)
    kind, unsandboxed = "unpack" if isinstance(settings, UnpackSettings) else "gpu", not has_sandbox(settings)
    for batch_id in patiently(stop, enter, host, scratch.prepare(host.scratch), kind, unsandboxed):
        patiently(stop, queue_waiting, host.engine, host.client, batch_id)
    return host


def has_sandbox(settings: MediaSettings) -> bool:
    """Whether ffmpeg runs in a sandbox here. Raises ConfigError if it does not and need not be trusted to."""
    problem = sandbox.problem()
    if problem is None:
        return True
    if not settings.allow_unsandboxed:
        raise ConfigError(
            f"no sandbox for ffmpeg works here: {problem} (ALLOW_UNSANDBOXED=true does without, if every recording is"
            " trusted)"
        )
    get_logger().warning("FFMPEG RUNS WITHOUT A SANDBOX: a hostile recording may take over this host", why=problem)
    return False


def enter(host: Host, disk: str, kind: str, unsandboxed: bool) -> list[str]:
    """Enter this host in the ledger. If its disk was replaced, what lay on the old one is lost: returns the batches
    that are to be unpacked anew.
    """
    with ledger.registering(
        host.engine, host.name, disk, host.scratch, kind=kind, release=release(), unsandboxed=unsandboxed
    ) as lost:
        if lost is not None:
            forget(host.engine, host.client, host.name, lost)
    return lost.reopened if lost else []


def lose_host(engine: Engine, client: Redis, host: str, *, unless_seen: bool = False) -> list[str] | None:
    """LOST: return a host's batches and delete its lists and keys. Returns the batches that are to be unpacked anew;
    None if it beats again.
    """
    with ledger.losing(engine, host, unless_seen=unless_seen) as lost:
        if lost is not None:
            forget(engine, client, host, lost)
    return lost.reopened if lost else None


def forget(engine: Engine, client: Redis, host: str, lost: ledger.Lost) -> None:
    """Have Redis forget a lost host, within the ledger's transaction: whoever takes or publishes one of its batches
    waits until it is over.
    """
    for number in queues.leftover_slots(client, host, "gpu"):
        note_deaths(engine, queues.Inbox(client, transcribe_list(host), processing_list(host, "gpu", number)))
    queues.forget_host(client, host)
    for batch_id in (*lost.reopened, *lost.ended):
        queues.forget_batch(client, batch_id)
    if lost.reopened or lost.ended:
        get_logger().warning("scratch of a host is lost", host=host, batches=lost.reopened)


def open_inbox(host: Host, kind: str) -> tuple[scratch.Slot, queues.Inbox]:
    """Take a slot of this kind and its way to jobs. The slot must be kept as long as the inbox is used."""
    slot = scratch.take_slot(host.scratch, kind)
    if slot is None:
        raise Fatal(f"{scratch.MAX_SLOTS} {kind} workers run on {host.name} already")
    own = processing_list(host.name, kind, slot.number)
    return slot, queues.Inbox(host.client, host.list_of(kind), own)


def beat(host: Host, stop: Stop, *, gpu: bool) -> None:
    """Begin to say every 20 s, in a thread, that this host lives; with `gpu`, that its models are ready."""

    def beats() -> None:
        while not stop():
            patiently(stop, ledger.beat, host.engine, host.name, gpu=gpu)
            stop.wait(BEAT_SECONDS)

    in_background(stop, "beat", beats)


def attend(host: Host, kinds: Iterable[str], stop: Stop) -> None:
    """Begin the host's duties in threads: beats, and at once and every minute the rest."""
    metrics.SCRATCH.labels("size").set_function(lambda: scratch.disk(host.scratch)[0])
    metrics.SCRATCH.labels("free").set_function(lambda: scratch.disk(host.scratch)[1])
    metrics.SCRATCH.labels("batches_may_fill").set_function(lambda: scratch.fillable(host.scratch))
    beat(host, stop, gpu=False)

    def duties() -> None:
        while not stop():
            for kind in kinds:
                patiently(stop, return_leftovers, host, kind)
            patiently(stop, tidy, host)
            stop.wait(TIDY_SECONDS)

    in_background(stop, "duties", duties)


def return_leftovers(host: Host, kind: str) -> None:
    """Put the jobs of slots whose process is dead back to the list they came from."""
    for number in queues.leftover_slots(host.client, host.name, kind):
        slot = scratch.take_slot(host.scratch, kind, number)
        if slot is None:
            continue
        try:
            if kind == "gpu":
                own = processing_list(host.name, kind, number)
                note_deaths(host.engine, queues.Inbox(host.client, host.list_of(kind), own))
            count = queues.put_back(host.client, host.name, kind, number, host.list_of(kind))
        finally:
            slot.release()
        get_logger().info("returned the jobs of a dead slot", kind=kind, slot=number, jobs=count)


def note_deaths(engine: Engine, inbox: queues.Inbox) -> None:
    """Note of each recording that a GPU process had in hand as it died that it may have been the cause: such a one is
    prepared alone next time, after its attempt was counted.
    """
    items = []
    for job in inbox.left():
        with suppress(Permanent):
            wanted = parse_transcribe_job(job)
            items.append((wanted.batch_id, wanted.item))
    if items:
        ledger.note_deaths(engine, items)


def tidy(host: Host) -> None:
    """TIDY: remove every folder that the ledger does not give this host, and let go of batches that ended here."""
    for batch_id in sorted({*ledger.leaving_batches(host.engine, host.name), *strays(host)}):
        tidy_batch(host, batch_id)


def strays(host: Host) -> list[str]:
    """Batches whose folder the ledger does not give this host."""
    held = ledger.held_batches(host.engine, host.name)
    return [batch_id for batch_id in scratch.batches(host.scratch) if batch_id not in held]


def tidy_batch(host: Host, batch_id: str) -> None:
    """TIDY of one batch, under its lock and after reading the ledger again; left for later while the lock is held."""
    with scratch.batch_lock(host.scratch, batch_id) as locked:
        if not locked or ledger.holds(host.engine, batch_id, host.name):
            return
        try:
            scratch.cleanup_scratch(batch_id, root=host.scratch)
        except OSError as error:
            get_logger().error("scratch folder cannot be removed", batch_id=batch_id, error=str(error))
            return
        batch = ledger.find_batch(host.engine, batch_id)
        if batch is not None and batch.host == host.name:
            if host.archive_after_batch == "delete" and ledger.expire_archive(host.engine, batch_id):
                delete_archive(archive_key(batch_id), bucket=host.bucket)
            queues.forget_batch(host.client, batch_id)
            ledger.release(host.engine, batch_id, host.name)


def return_batch(host: Host, batch_id: str) -> None:
    """Give up a batch whose scratch is damaged: what is not done is unpacked again, here or elsewhere, uncounted.

    May be called again if it was cut short. Does nothing while somebody else on this host has the batch in hand.
    """
    with scratch.batch_lock(host.scratch, batch_id) as locked:
        if not locked:
            return
        if ledger.holds(host.engine, batch_id, host.name):
            scratch.cleanup_scratch(batch_id, root=host.scratch)
            ledger.give_back(host.engine, batch_id, host.name)
            get_logger().warning("batch returned: its scratch was lost", batch_id=batch_id)
        queue_waiting(host.engine, host.client, batch_id)


def queue_waiting(engine: Engine, client: Redis, batch_id: str) -> None:
    """Push the job of a batch that waits to be unpacked, unless it is on the list."""
    job = ledger.waiting_job(engine, batch_id)
    if job is not None and not queues.is_queued(client, UNPACK, job):
        queues.push(client, UNPACK, job)


def delete_dead_object(engine: Engine, bucket: Bucket, audio_id: int, key: str, *, dry_run: bool = False) -> bool:
    """Delete what an attempt put of a recording that is dead now, and tell whether it is to be deleted.

    Not if the recording was retried meanwhile, nor where no archive has it any more.
    """
    with ledger.holding_dead(engine, audio_id) as dead:
        if dead and not dry_run:
            delete_opus(key, bucket=bucket)
        return dead


def drop_stale(host: Host, inbox: queues.Inbox, job: str, batch_id: str) -> None:
    """Drop a transcribe job that is of no use now: PUBLISH makes it again.

    The batch's row is held, as PUBLISH holds it: else a job that PUBLISH saw in flight could be dropped after it. Of a
    batch that is ready here again, it goes to the list's tail.
    """
    with ledger.publishing(host.engine, batch_id, host.name) as ready:
        if ready is None:
            inbox.drop(job)
        else:
            inbox.move(job, inbox.source)
