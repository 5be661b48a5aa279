"""Every metric there is, with its unit and meaning, and the ways out: workers serve theirs by HTTP, and what runs by a
timer leaves a file for node_exporter. docs/metrics.md is made from this.

Labels have few values: no batch, recording or path is one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)
from prometheus_client.metrics_core import Metric

from lab_audio.errors import ConfigError
from lab_audio.log import get_logger

disable_created_metrics()  # type: ignore[no-untyped-call]  # nobody asks when a series began

PORTS = {"transfer-worker": 9791, "unpack-worker": 9792, "gpu-worker": 9793}
BIND_SECONDS = 10.0
REQUEST_SECONDS = 10.0
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class WorkerRegistry(CollectorRegistry):
    """A worker's own metrics, and what the processes that it started have reported last, by device."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: dict[str, list[Metric]] = {}

    def collect(self) -> Iterator[Metric]:
        families = {family.name: family for family in super().collect()}
        for device, reported in list(self.reports.items()):
            for family in reported:
                families[family.name].samples += [
                    sample._replace(labels={**sample.labels, "device": device}) for sample in family.samples
                ]
        yield from families.values()


@dataclass(frozen=True)
class Described:
    """A metric as the page tells it."""

    registry: CollectorRegistry
    name: str
    kind: str
    labels: tuple[str, ...]
    unit: str
    meaning: str


ALL: list[Described] = []
T = TypeVar("T", Counter, Gauge, Histogram)


def _metric(
    kind: type[T], registry: CollectorRegistry, name: str, unit: str, meaning: str, *labels: str, **more: Any
) -> T:
    made = kind(f"lab_audio_{name}", meaning, labels, registry=registry, **more)
    ALL.append(Described(registry, f"lab_audio_{name}", kind.__name__.lower(), labels, unit, meaning))
    return made


WORKER = WorkerRegistry()
STORES, LEDGER, LISTS = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
RECONCILE, RETENTION = CollectorRegistry(), CollectorRegistry()

# Of each worker
RELEASE = _metric(Gauge, WORKER, "release_info", "1", "Which release runs", "release")
STAGE = _metric(
    Histogram,
    WORKER,
    "stage_seconds",
    "seconds",
    "Time that a piece of work spent in a stage: archives are built, uploaded and unpacked; recordings are encoded,"
    " decoded, transcribed, classified (several at once) and brought home (upload and ledger)",
    "stage",
    buckets=SECONDS,
)
RECORDINGS = _metric(
    Counter,
    WORKER,
    "recordings_total",
    "recordings",
    "Recordings whose stage is over: transferred, encoded, done, or dead",
    "outcome",
)
BYTES = _metric(
    Counter, WORKER, "transferred_bytes_total", "bytes", "Bytes to and from the object store", "what", "direction"
)
RETRIES = _metric(
    Counter,
    WORKER,
    "retries_total",
    "tries",
    "Tries that came to nothing and are made again, by what was to blame: a store that is away, the source, scratch"
    " that is full, ffmpeg, or the models",
    "cause",
)
SCRATCH = _metric(
    Gauge,
    WORKER,
    "scratch_bytes",
    "bytes",
    "Size of scratch's disk, what of it is free, and what batches may fill, with what they fill already",
    "what",
)
AUDIO = _metric(Counter, WORKER, "audio_seconds_total", "seconds", "Sound that the models have heard")
MODELS = _metric(
    Counter,
    WORKER,
    "models_seconds_total",
    "seconds",
    "What the models' process did with its time: work in the models, wait for recordings that are decoded or for the"
    " stores, or idle as there is no job. rate(audio) / rate(work) is the real-time factor,"
    " rate(wait) / (rate(wait) + rate(work)) the share of time that the models wait",
    "doing",
)
MODEL = _metric(Gauge, WORKER, "model_info", "1", "Which revision of each model is loaded", "model", "revision")
DEVICES = _metric(Gauge, WORKER, "devices", "devices", "Devices that it is to serve, and those that it serves", "what")
DEATHS = _metric(
    Counter,
    WORKER,
    "gpu_process_deaths_total",
    "deaths",
    "Processes of the GPU worker that died: killed, sick (could not work), or crashed (hung, or unforeseen)",
    "how",
)

# Of the whole, from the ledger
BATCHES = _metric(Gauge, LEDGER, "batches", "batches", "Open batches, by state", "state")
STUCK = _metric(
    Gauge,
    LEDGER,
    "stuck_batches",
    "batches",
    "Open batches that are stuck: warning, open for STUCK_SECONDS; critical, no progress for so long",
    "severity",
)
STUCK_AFTER = _metric(
    Gauge,
    LEDGER,
    "stuck_after_seconds",
    "seconds",
    "STUCK_SECONDS: a batch that takes longer, or a job that waits longer",
)
PROGRESS = _metric(Gauge, LEDGER, "open_recordings", "recordings", "Recordings of open batches, by state", "state")
OLDEST = _metric(Gauge, LEDGER, "oldest_batch_seconds", "seconds", "Age of the oldest open batch; 0 without one")
IDLE = _metric(
    Gauge,
    LEDGER,
    "longest_idle_seconds",
    "seconds",
    "Longest time without progress of an open batch",
)
DEAD = _metric(
    Gauge, LEDGER, "dead_letters", "letters", "Recordings and batches that were set aside and wait for somebody", "kind"
)
SEEN = _metric(
    Gauge,
    LEDGER,
    "host_silent_seconds",
    "seconds",
    "Time since a host's workers were seen, also of one that is lost and not forgotten, and since its models were ready"
    " (gpu)",
    "host",
    "what",
)
PAUSED = _metric(Gauge, LEDGER, "host_paused", "0 or 1", "Whether a host takes no new batch", "host")
HOST_RELEASE = _metric(
    Gauge, LEDGER, "host_release_info", "1", "Which release each host's workers run", "host", "worker", "release"
)
HOST_MODEL = _metric(
    Gauge,
    LEDGER,
    "host_model_info",
    "1",
    "Revision of each model that a host has loaded",
    "host",
    "model",
    "revision",
)
UNSETTLED = _metric(
    Gauge,
    LEDGER,
    "archives_near_retention",
    "archives",
    "Archives that are as old as others are when they go, and are still needed",
)
RUN = _metric(
    Gauge,
    LEDGER,
    "run_age_seconds",
    "seconds",
    "Time since a timer's job, the dump of the database, or a look at each source, was last done",
    "job",
)
DATABASE = _metric(Gauge, LEDGER, "database_bytes", "bytes", "Size of the database")

# Of the whole, from Redis
JOBS = _metric(
    Gauge, LISTS, "list_jobs", "jobs", "Jobs that wait on a list; payloads that were set aside on `dead`", "list"
)
WAITED = _metric(
    Gauge,
    LISTS,
    "list_oldest_seconds",
    "seconds",
    "For how long the batch of the first job on a list has been waiting: since its last progress, or since it was last"
    " taken; 0 where nothing waits",
    "list",
)

UP = _metric(Gauge, STORES, "store_up", "0 or 1", "Whether a store answers", "store")

FOUND = _metric(
    Gauge, RECONCILE, "reconcile_found", "things", "What the last run found, by the line of its report", "job", "what"
)
REMOVED = _metric(Gauge, RETENTION, "retention_removed", "things", "What the last retention removed", "kind")
FREED = _metric(Gauge, RETENTION, "retention_removed_bytes", "bytes", "Bytes that the last retention removed", "kind")

PLACES = {
    "Each worker": WORKER,
    "`lab-audio metrics`, of the ledger": LEDGER,
    "`lab-audio metrics`, of Redis": LISTS,
    "`lab-audio metrics`, always": STORES,
    "`lab-audio reconcile`": RECONCILE,
    "`lab-audio retention`": RETENTION,
}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Time this; what raises does not count."""
    began = time.perf_counter()
    yield
    STAGE.labels(name).observe(time.perf_counter() - began)


class Handler(WSGIRequestHandler):
    """A connection that says nothing ends: it takes a thread and a descriptor of the worker's."""

    timeout = REQUEST_SECONDS

    def handle(self) -> None:
        with suppress(TimeoutError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def serve(address: str, port: int) -> None:
    """Serve this worker's metrics from a thread, as soon as the address is free: no worker ends for want of it."""

    def bind() -> None:
        said = False
        while True:
            try:
                server, _thread = start_http_server(port, address, WORKER)
                server.RequestHandlerClass = Handler
                return
            except OSError as error:
                if not said:
                    get_logger().warning("metrics are not served", address=f"{address}:{port}", error=error.strerror)
                said = True
                time.sleep(BIND_SECONDS)

    threading.Thread(target=bind, name="metrics", daemon=True).start()


def write(directory: Path | None, name: str, *registries: CollectorRegistry) -> None:
    """Leave metrics for node_exporter in one file, all or nothing; nothing where no directory is set.

    Raises ConfigError where that cannot be written.
    """
    if directory is None:
        return
    part = directory / f".{name}.{os.getpid()}"
    try:
        part.write_bytes(text(*registries))
        part.chmod(0o644)  # node_exporter is another user
        part.replace(directory / f"{name}.prom")
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"TEXTFILE_DIRECTORY: {directory} cannot be written: {error.strerror}") from None


def text(*registries: CollectorRegistry) -> bytes:
    """Metrics as Prometheus reads them."""
    return b"".join(generate_latest(registry) for registry in registries)
