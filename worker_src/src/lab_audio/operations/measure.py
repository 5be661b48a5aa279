"""The metrics of the whole, looked up once: from one place, however many workers there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from operator import itemgetter

from prometheus_client import CollectorRegistry
from sqlalchemy import Engine

from lab_audio import ledger, metrics, queues, s3_utils
from lab_audio.config import MetricsSettings
from lab_audio.contracts import transcribe_list
from lab_audio.errors import LabAudioError
from lab_audio.log import get_logger
from lab_audio.operations.health import kind_of, waiting
from lab_audio.operations.reconcile import Stores

STATES = ("minted", "uploaded", "unpacking", "ready", "complete", "failed")


def measure(stores: Stores, settings: MetricsSettings) -> list[CollectorRegistry]:
    """Look at everything once. Returns what there is to tell; of a store that is away, only that it is."""
    ledger_up = answers("PostgreSQL", lambda: of_ledger(stores.engine, settings))
    redis_up = answers("Redis", lambda: queues.check_answers(stores.client))
    answers("object store", lambda: s3_utils.check_bucket(stores.bucket))
    told = [metrics.STORES]
    if ledger_up:
        told.append(metrics.LEDGER)
    if ledger_up and redis_up:
        for host in ledger.seen_hosts(stores.engine):  # an empty list is not in Redis
            metrics.JOBS.labels(transcribe_list(host.host)).set(0)
            metrics.WAITED.labels(transcribe_list(host.host)).set(0)
        for view in waiting(stores.engine, stores.client):
            metrics.JOBS.labels(view.name).set(view.jobs)
            metrics.WAITED.labels(view.name).set(view.oldest_seconds or 0)
        told.append(metrics.LISTS)
    return told


def answers(store: str, ask: Callable[[], object]) -> bool:
    """Ask a store, and note whether it answered."""
    try:
        ask()
    except LabAudioError as error:
        get_logger().warning("a store does not answer", store=store, error=str(error))
        metrics.UP.labels(store).set(0)
        return False
    metrics.UP.labels(store).set(1)
    return True


def of_ledger(engine: Engine, settings: MetricsSettings) -> None:
    batches = ledger.open_batches(engine)
    states = Counter(batch.state for batch in batches)
    for state in STATES:
        metrics.BATCHES.labels(state).set(states[state])
    for state in ("pending", "done", "dead"):
        metrics.PROGRESS.labels(state).set(sum(getattr(batch, state) for batch in batches))
    metrics.OLDEST.set(max((batch.age_seconds or 0 for batch in batches), default=0))
    metrics.IDLE.set(max((batch.idle_seconds or 0 for batch in batches), default=0))
    metrics.STUCK_AFTER.set(settings.stuck_seconds)
    stuck = Counter(batch.severity for batch in ledger.stuck_batches(engine, settings.stuck_seconds))
    for severity in ("warning", "critical"):
        metrics.STUCK.labels(severity).set(stuck[severity])
    for kind, count in ledger.count_dead(engine).items():
        metrics.DEAD.labels(kind).set(count)
    for host in ledger.seen_hosts(engine):
        metrics.SEEN.labels(host.host, "workers").set(host.silent_seconds)
        if host.lost:
            continue
        if host.gpu_silent_seconds is not None:
            metrics.SEEN.labels(host.host, "gpu").set(host.gpu_silent_seconds)
        metrics.PAUSED.labels(host.host).set(host.paused)
        for worker, release in host.releases.items():
            metrics.HOST_RELEASE.labels(host.host, worker, release).set(1)
        for model, revision in host.models.items():
            metrics.HOST_MODEL.labels(host.host, model, revision).set(1)
    metrics.UNSETTLED.set(len(ledger.unsettled_archives(engine, max(1, settings.retention_days - 1))))
    # Of several sources the one counts that was longest not looked at: it is set last.
    for job, seconds in sorted(ledger.last_runs(engine).items(), key=itemgetter(1)):
        metrics.RUN.labels(kind_of(job)).set(seconds)
    metrics.DATABASE.set(ledger.server(engine)["bytes"])
