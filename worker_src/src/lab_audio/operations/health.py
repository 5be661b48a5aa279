"""Whether it works: the stores, the hosts and what waits between them, and this host. Looks, and changes nothing.

Checks run side by side, until a deadline; those that ask a store begin when it has answered.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from redis import Redis
from rich import filesize
from sqlalchemy import Engine

from lab_audio import ledger, queues, s3_utils, scratch
from lab_audio.config import HealthSettings, StoreSettings
from lab_audio.contracts import BATCH_ID, DEAD
from lab_audio.errors import ConfigError, LabAudioError
from lab_audio.ledger.hosts import SILENT_SECONDS
from lab_audio.log import duration
from lab_audio.media import canary, sandbox
from lab_audio.models.classifier import find_gemma, load_policies
from lab_audio.models.revision import damage, revision
from lab_audio.models.transcriber import find_whisper
from lab_audio.operations.reconcile import Stores
from lab_audio.release import release
from lab_audio.workers.gpu_worker import present_devices

DEADLINE_SECONDS = 7.0
SLOW_SECONDS = 0.1
SKEW_SECONDS = (30, 300)  # warning; failing, as stores refuse requests that are 15 minutes off
ROOM = (0.10, 0.02)  # of scratch that is free, or batches'
START_SECONDS = (120, 900)  # of a worker; the models take a while
MEMORY = (0.80, 0.95)  # of Redis that is used
AGES = {
    "dump": 26 * 3600,
    "source": 1800,
    "retention": 26 * 3600,
    "reconcile": 600,
    "audit": 8 * 86400,
}  # of a timer's last run, and a look at the source; that of metrics is for Prometheus to judge
HOW = {
    "dump": "on the database's host: systemctl start lab-audio-dump",
    "source": "where its transfer worker is: systemctl status transfer-worker",
    "retention": "lab-audio retention",
    "reconcile": "lab-audio reconcile --quick",
    "audit": "lab-audio reconcile",
}
WORKERS = ("transfer-worker", "unpack-worker", "gpu-worker")
JOBS = tuple(f"lab-audio-{job}" for job in ("metrics", "reconcile", "retention", "audit"))
URGENT = {"dump": "BackupStale", "source": "WorkerSilent"}
MESSAGES = "docs/operations.md#messages"


class State(IntEnum):
    GOOD = 0
    WARNING = 1
    FAILING = 2


@dataclass(frozen=True)
class Finding:
    """What a check has to say; `mend`: the command or the page that helps, where something is wrong."""

    check: str
    state: State
    what: str
    mend: str = ""


@dataclass(frozen=True)
class ListView:
    """A list in Redis: how many jobs wait there, and for how long the batch of the first has (None: nobody knows)."""

    name: str
    jobs: int
    oldest_seconds: float | None


@dataclass(frozen=True)
class Lab:
    settings: HealthSettings
    stores: Stores


Said = Iterator[tuple[State, str, str]]
Answer = tuple[str, list[Finding], bool]  # of which check; False: it had none


@dataclass(frozen=True)
class Check:
    """`needs`: checks that must have an answer, be it a bad one, before this one is asked.

    `local`: asked on hosts with scratch only. `mend`: what helps where it has no answer.
    """

    name: str
    ask: Callable[[Lab], Said]
    needs: tuple[str, ...] = ()
    local: bool = False
    mend: str = MESSAGES


def runbook(alert: str) -> str:
    return f"docs/runbooks/{alert}.md"


def open_stores(settings: StoreSettings) -> Stores:
    """The stores, none of which is asked yet; one that does not answer is not asked twice. Raises ConfigError."""
    bucket = s3_utils.open_bucket(settings, attempts=1, seconds=DEADLINE_SECONDS)
    return Stores(ledger.open_ledger(settings), queues.open_queues(settings), bucket)


def examine(lab: Lab) -> list[Finding]:
    """Everything that there is to say, in the order of the checks.

    A check that has no answer when the time is over is failing; its thread is left behind.
    """
    checks = [check for check in CHECKS if not check.local or has_scratch(lab.settings)]
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    begun: dict[str, Check] = {}
    said: dict[str, list[Finding]] = {}
    there: set[str] = set()
    until = time.monotonic() + DEADLINE_SECONDS
    while True:
        for check in checks:
            if check.name not in begun and there.issuperset(check.needs):
                begun[check.name] = check
                threading.Thread(target=_ask, args=(check, lab, answers), daemon=True).start()
        if len(said) == len(begun):
            break
        try:
            name, findings, answered = answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        said[name] = findings
        if answered:
            there.add(name)
    late = f"no answer in {DEADLINE_SECONDS:.0f} s"
    for check in checks:
        if check.name not in begun:
            missing = " and ".join(name for name in check.needs if name not in there)
            said[check.name] = [Finding(check.name, State.WARNING, f"not looked at, for want of {missing}")]
        elif check.name not in said:
            said[check.name] = [Finding(check.name, State.FAILING, late, check.mend)]
    return [finding for check in checks for finding in said[check.name]]


def _ask(check: Check, lab: Lab, answers: queue.SimpleQueue[Answer]) -> None:
    try:
        answers.put((check.name, [Finding(check.name, *said) for said in check.ask(lab)], True))
        return
    except LabAudioError as error:
        what = " ".join(str(error).split())
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
    answers.put((check.name, [Finding(check.name, State.FAILING, what, check.mend)], False))


def good(what: str) -> tuple[State, str, str]:
    return State.GOOD, what, ""


def warning(what: str, mend: str) -> tuple[State, str, str]:
    return State.WARNING, what, mend


def failing(what: str, mend: str) -> tuple[State, str, str]:
    return State.FAILING, what, mend


def graded(value: float, bounds: tuple[float, float], what: str, mend: str) -> tuple[State, str, str]:
    """Good below the first bound, failing from the second on."""
    state = State(sum(value >= bound for bound in bounds))
    return state, what, mend if state else ""


def some(names: Iterable[str], most: int = 5) -> str:
    """Names in a line, the first few of many."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def check_store(lab: Lab) -> Said:
    began = time.monotonic()
    ahead = s3_utils.prove(lab.stores.bucket, f"health/{lab.settings.lab_host}")
    yield good(f"an object was put, got and deleted in {(time.monotonic() - began) * 1000:.0f} ms")
    what = f"this host's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    if abs(ahead) >= SKEW_SECONDS[0]:
        yield graded(abs(ahead), SKEW_SECONDS, what, "timedatectl says whether NTP works; chrony: chronyc makestep")


def check_redis(lab: Lab) -> Said:
    refused = queues.refusal(lab.stores.client)
    if refused:
        yield failing(f"takes no jobs: {refused}", "room on its disk: df; memory: redis-cli INFO; its log says why")
    try:
        server = queues.server(lab.stores.client)
    except ConfigError as error:
        yield warning(str(error), "let its user ask for INFO: ACL SETUSER NAME +info")
        return
    used = server.used / max(server.most, 1)
    memory = f"{filesize.decimal(server.used)} of {filesize.decimal(server.most)}"
    what = f"answers in {server.seconds * 1000:.1f} ms, uses {memory}"
    yield graded(used, MEMORY, what, "raise maxmemory, or see what else is in it: redis-cli --bigkeys")
    if server.seconds >= SLOW_SECONDS:
        yield warning(
            f"takes {server.seconds * 1000:.0f} ms for an answer", "redis-cli --latency; redis-cli SLOWLOG GET"
        )
    if not server.persistent:
        yield warning("forgets everything when it ends", "appendonly yes in its configuration; the role redis sets it")
    if not server.rewrites:
        yield failing("its append-only file only grows, as it cannot be rewritten", "df on its host; its log says why")
    if server.policy != "noeviction":
        yield failing(
            f"throws jobs away when it is full ({server.policy})", "maxmemory-policy noeviction in its configuration"
        )


def check_postgresql(lab: Lab) -> Said:
    ledger.check_answers(lab.stores.engine)
    ledger.check_migrated(lab.stores.engine)
    server = ledger.server(lab.stores.engine)
    yield good(
        f"answers in {server['seconds'] * 1000:.1f} ms, has this release's tables, {filesize.decimal(server['bytes'])}"
    )
    if server["seconds"] >= SLOW_SECONDS:
        yield warning(f"takes {server['seconds'] * 1000:.0f} ms for an answer", "SELECT * FROM pg_stat_activity")


def check_timers(lab: Lab) -> Said:
    """Jobs of timers, the dump and looks at sources, that were done once and are not any more; and reconcile, which
    every lab needs.
    """
    ages = {job: seconds for job, seconds in ledger.last_runs(lab.stores.engine).items() if kind_of(job) in AGES}
    late = {job for job, seconds in ages.items() if seconds > AGES[kind_of(job)]}
    done = ", ".join(f"{job} {duration(seconds)} ago" for job, seconds in sorted(ages.items()) if job not in late)
    if done or not late:
        yield good(f"last done: {done or 'none yet'}")
    for job in sorted(late):
        kind = kind_of(job)
        state = failing if kind in URGENT else warning
        what = f"the {job} was last looked at" if kind == "source" else f"{job} was last done"
        yield state(f"{what} {duration(ages[job])} ago", f"{HOW[kind]}; {runbook(URGENT.get(kind, 'TextfileStale'))}")
    if "reconcile" not in ages and ledger.seen_hosts(lab.stores.engine):
        what = "reconcile was never done: nobody notices a lost host"
        yield warning(what, f"{HOW['reconcile']}, by a timer: docs/operations.md#reconcile")


def kind_of(job: str) -> str:
    """What runs are told by: the job, and `source` for a look at any."""
    return job.split(" ", 1)[0]


def waiting(engine: Engine, client: Redis) -> list[ListView]:
    """Every list with its depth and the age of its oldest job."""
    found = queues.lists(client)
    batches = {name: BATCH_ID.search(oldest) if oldest else None for name, (_jobs, oldest) in found.items()}
    ages = ledger.waiting_seconds(engine, [match[0] for match in batches.values() if match])
    return [
        ListView(name, jobs, ages.get(match[0]) if (match := batches[name]) else None)
        for name, (jobs, _oldest) in found.items()
    ]


def check_lists(lab: Lab) -> Said:
    lists = [view for view in waiting(lab.stores.engine, lab.stores.client) if view.name != DEAD]
    yield good(", ".join(f"{view.name} {view.jobs}" for view in lists if view.jobs) or "nothing waits")
    for view in lists:
        if view.oldest_seconds is not None and view.oldest_seconds >= lab.settings.stuck_seconds:
            yield warning(
                f"the oldest job on {view.name} has waited for {duration(view.oldest_seconds)}",
                runbook("QueueOldestTooOld"),
            )


def check_hosts(lab: Lab) -> Said:
    hosts = ledger.seen_hosts(lab.stores.engine)
    if not hosts:
        yield warning("no GPU host takes part", "systemctl start unpack-worker gpu-worker on one")
        return
    present = [host for host in hosts if not host.lost]
    if present:
        yield good(f"{len(present)} take part: {some(host.host for host in present)}")
    for host in hosts:
        silent, gpu = host.silent_seconds, host.gpu_silent_seconds
        if host.lost:
            yield failing(
                f"{host.host} was last seen {duration(silent)} ago, and is lost: others do its batches",
                f"start it again, or lab-audio hosts forget {host.host}; {runbook('WorkerSilent')}",
            )
        elif silent >= SILENT_SECONDS:
            mend = f"there: systemctl start unpack-worker gpu-worker; {runbook('WorkerSilent')}"
            yield failing(f"{host.host} was last seen {duration(silent)} ago", mend)
        elif gpu is None or gpu >= SILENT_SECONDS:
            ready = "never ready" if gpu is None else f"last ready {duration(gpu)} ago"
            yield failing(
                f"{host.host}: its models were {ready}",
                f"there: journalctl -u gpu-worker -n 50; {runbook('WorkerSick')}",
            )
        if host.paused:
            yield warning(f"{host.host} is paused", f"lab-audio resume {host.host}")
        if host.unsandboxed:
            yield warning(f"{host.host} decodes strangers' recordings without a sandbox", "docs/security.md")
    releases = {host.host: " and ".join(sorted(set(host.releases.values()))) for host in present if host.releases}
    releases.setdefault(lab.settings.lab_host, release())  # the ledger knows nothing of a transfer host
    if len(set(releases.values())) > 1 or any(" and " in release for release in releases.values()):
        yield warning(f"releases differ: {pairs(releases)}", runbook("ReleaseSkew"))
    models = {host.host: pairs(host.models) for host in present if host.models}
    if len(set(models.values())) > 1:
        each = "; ".join(f"{host}: {revisions}" for host, revisions in sorted(models.items()))
        yield failing(f"models differ, and so would results: {each}", runbook("ModelRevisionSkew"))


def pairs(named: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(named.items()))


def check_batches(lab: Lab) -> Said:
    stuck = ledger.stuck_batches(lab.stores.engine, lab.settings.stuck_seconds)
    count = len(ledger.open_batches(lab.stores.engine))
    yield good(f"{count} open, {len(stuck)} stuck")
    for batch in stuck:
        state = failing if batch.severity == "critical" else warning
        yield state(f"{batch.batch_id}: {batch.reason}", f"lab-audio batch {batch.batch_id}; {runbook('BatchStuck')}")


def dead_letters(stores: Stores) -> dict[str, int]:
    """How many of each kind were set aside and wait for somebody."""
    return {**ledger.count_dead(stores.engine), "payload": queues.count_dead(stores.client)}


def check_dead(lab: Lab) -> Said:
    counts = {kind: count for kind, count in dead_letters(lab.stores).items() if count}
    if counts:
        yield warning(f"set aside: {pairs(counts)}", f"lab-audio dead list; {runbook('DeadLetters')}")
    else:
        yield good("none")


def check_archives(lab: Lab) -> Said:
    """Archives that are needed for longer than others are kept, and such as should be gone."""
    days = lab.settings.retention_days
    unsettled = ledger.unsettled_archives(lab.stores.engine, max(1, days - 1))
    overdue = len(ledger.expired_archives(lab.stores.engine, days + 2))
    if unsettled:
        what = f"as old as others are when they go, and still needed: {some(unsettled)}"
        yield warning(what, f"lab-audio batch {unsettled[0]}; {runbook('ArchiveNearRetention')}")
    if overdue:
        yield failing(f"{overdue} should be gone for two days", "lab-audio retention")
    if not unsettled and not overdue:
        yield good(f"kept for {days} days after their batch")


def check_workers(_lab: Lab) -> Said:
    """Whether the workers and timers that this host is to have run, on all devices, and their jobs do not fail."""
    units = enabled_units()
    running = [unit for unit, state in units.items() if state["ActiveState"] == "active"]
    if working := [unit for unit in running if unit in WORKERS]:
        yield good(f"{', '.join(working)} {'runs' if len(working) == 1 else 'run'}")
    for unit, state in units.items():
        look = f"journalctl -u {unit} -n 50; {runbook('WorkerSick')}"
        serving = re.search(r"([0-9]+) of ([0-9]+) devices", state.get("StatusText", ""))
        if unit in JOBS:
            if state["ActiveState"] == "failed":
                yield warning(f"{unit} has failed", f"journalctl -u {unit} -n 50; {MESSAGES}")
        elif state["SubState"] == "auto-restart":
            yield failing(f"{unit} has ended, and is started again", look)
        elif state["ActiveState"] == "activating":
            seconds = time.monotonic() - int(state["InactiveExitTimestampMonotonic"]) / 1e6
            yield graded(seconds, START_SECONDS, f"{unit} has been starting for {duration(seconds)}", look)
        elif unit not in running:
            mend = f"systemctl start {unit}; {runbook('WorkerSilent' if unit in WORKERS else 'TextfileStale')}"
            yield failing(f"{unit} is {state['ActiveState']}", mend)
        elif serving and serving[1] != serving[2]:
            yield warning(f"{unit} {state['StatusText']}", look)


def enabled_units() -> dict[str, dict[str, str]]:
    """What systemd says of each worker and timer that it is to start here, and of timers' jobs; nothing where it
    cannot be asked.
    """
    program = shutil.which("systemctl")
    if program is None:
        return {}
    asked = "--property=Id,UnitFileState,ActiveState,SubState,InactiveExitTimestampMonotonic,StatusText"
    units = [f"{unit}.service" for unit in (*WORKERS, *JOBS)] + [f"{job}.timer" for job in JOBS]
    done = subprocess.run([program, "show", asked, *units], capture_output=True, text=True, timeout=5, check=False)
    if done.returncode:
        return {}
    said = [dict(line.split("=", 1) for line in unit.splitlines()) for unit in done.stdout.strip().split("\n\n")]
    enabled = {unit["Id"] for unit in said if unit["UnitFileState"] == "enabled"}
    return {
        unit["Id"].removesuffix(".service"): unit
        for unit in said
        if enabled & {unit["Id"], unit["Id"].replace(".service", ".timer")}
    }


def has_scratch(settings: HealthSettings) -> bool:
    """Whether a worker has made its scratch here, or we may not look."""
    try:
        return (settings.scratch_root / ".id").exists()
    except OSError:
        return True


def check_scratch(lab: Lab) -> Said:
    """Whether anything but batches fills it: these come and go."""
    root = lab.settings.scratch_root
    most = max(0, scratch.capacity(root))
    size, free = (int(value) for value in scratch.disk(root))
    what = f"{filesize.decimal(free)} of {filesize.decimal(size)} are free on {root}, batches may fill"
    bounds = (1 - ROOM[0], 1 - ROOM[1])
    mend = f"du -sh {root}/*; {runbook('ScratchFilling')}"
    yield graded(1 - most / size, bounds, f"{what} {filesize.decimal(most)}", mend)


def check_folders(lab: Lab) -> Said:
    """Whose each folder is; one that the ledger does not give this host is a stray, and what nobody knows stays."""
    root, host = lab.settings.scratch_root, lab.settings.lab_host
    disk = ledger.disk_of(lab.stores.engine, host)
    if not has_scratch(lab.settings):
        if disk is not None:
            what = f"the ledger knows {host}, but {root} is not its scratch: is it mounted?"
            yield failing(what, f"findmnt {root}; mount -a")
        return
    if disk is not None and (root / ".id").read_text() != disk:
        what = f"{root} is another disk than the one that the ledger knows for {host}"
        yield failing(what, "docs/operations.md#a-host-is-gone")
        return
    there = scratch.batches(root)
    held = ledger.held_batches(lab.stores.engine, host)
    there = [batch_id for batch_id in there if (root / batch_id).exists()]  # else it was given back meanwhile
    states = ledger.states_of(lab.stores.engine, there, host)
    mine = [f"{batch_id} ({states.get(batch_id, 'unknown')})" for batch_id in there if batch_id in held]
    yield good(f"{len(mine)} of batches{': ' if mine else ''}{some(mine)}")
    strays = [f"{batch_id} ({states.get(batch_id, 'unknown')})" for batch_id in there if batch_id not in held]
    if strays:
        mend = "the workers remove them each minute; else: lab-audio retention"
        yield warning(f"strays: {some(strays)}", mend)
    names = (path.name for path in root.iterdir())
    others = sorted(name for name in names if not name.startswith(".") and not BATCH_ID.fullmatch(name))
    if others:
        yield warning(f"of nobody: {some(others)}", f"look at them in {root}, and remove them by hand")
    foreign = [batch_id for batch_id in there if not os.access(root / batch_id, os.W_OK)]
    if foreign:
        owners = some(f"{batch_id} ({owner(root / batch_id)})" for batch_id in foreign)
        yield failing(
            f"not to be written by the workers' user: {owners}", f"chown -R --reference={root} {root}/{foreign[0]}"
        )


def owner(path: Path) -> str:
    try:
        return f"owner {path.owner()}"
    except (KeyError, OSError):
        return "owner unknown"


def check_sandbox(lab: Lab) -> Said:
    """A recording of our own goes through ffmpeg as a stranger's does."""
    problem = sandbox.problem()
    if problem and not lab.settings.allow_unsandboxed:
        yield failing(f"none works here: {problem}", MESSAGES)
        return
    with tempfile.TemporaryDirectory(prefix="lab-audio-") as folder:
        canary.encode(Path(folder))
    if problem:
        yield warning(f"ffmpeg works without one (ALLOW_UNSANDBOXED): {problem}", "docs/security.md")
    else:
        yield good("ffmpeg works in it")


def check_models(lab: Lab) -> Said:
    """What lies on the disk: whole by its manifest, and of one revision."""
    installed = installed_models(lab.settings.models_root)
    count = len(load_policies(lab.settings.policies_dir))
    yield good(f"{pairs(installed)}; {count} policies")
    for name in ("whisperx", "gemma"):
        damaged = damage(lab.settings.models_root / name)
        if damaged:
            where = lab.settings.models_root / name
            yield failing(
                f"{where} is not as its manifest says: {some(damaged)}",
                "copy it again: the role gpu_worker, or model_sync with verify=full",
            )


def installed_models(root: Path) -> dict[str, str]:
    """The revision of each model on this disk. Raises ConfigError unless there is one of each."""
    base, adapter = find_gemma(root)
    return {"whisper": revision(find_whisper(root)), "gemma": revision(base), "adapter": revision(adapter)}


def check_loaded(lab: Lab) -> Said:
    """Whether this host's GPU worker has loaded what lies on its disk."""
    hosts = {host.host: host for host in ledger.seen_hosts(lab.stores.engine)}
    here = hosts.get(lab.settings.lab_host)
    if here is None or here.lost or not here.models:
        return
    installed = installed_models(lab.settings.models_root)
    other = {
        name: f"{rev}, on disk {installed.get(name)}" for name, rev in here.models.items() if installed.get(name) != rev
    }
    if other:
        yield warning(f"other ones than on disk are loaded: {pairs(other)}", "systemctl restart gpu-worker")
    else:
        yield good("those on disk are loaded")


def check_gpu(lab: Lab) -> Said:
    devices = lab.settings.devices or present_devices()
    wanted = [int(match[1] or 0) for device in devices if (match := re.fullmatch(r"cuda(?::([0-9]+))?", device))]
    if not wanted:
        if lab.settings.devices:
            yield good("none is asked for (DEVICES)")
        else:
            yield failing(
                "none is here, so the models run on the CPU",
                "nvidia-smi; dmesg | grep -i nvidia; DEVICES=cpu if that is meant",
            )
        return
    program = shutil.which("nvidia-smi")
    if program is None:
        yield failing("nvidia-smi is missing", "install the NVIDIA driver")
        return
    asked = ["--query-gpu=index,name,memory.used,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run([program, *asked], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    if done.returncode:
        yield failing(f"nvidia-smi: {' '.join((done.stderr or done.stdout).split())[:200]}", runbook("WorkerSick"))
        return
    present = {int(row[0]): row[1:] for row in (line.split(", ") for line in done.stdout.splitlines()) if len(row) == 4}
    for index in wanted:
        if index in present:
            name, used, most = present[index]
            yield good(f"cuda:{index} {name}, {used} of {most} MiB used")
        else:
            yield failing(
                f"cuda:{index} is not there; nvidia-smi finds {len(present)}",
                f"dmesg | grep -i xid; a reboot; {runbook('WorkerSick')}",
            )


CHECKS = (
    Check("object store", check_store),
    Check("Redis", check_redis),
    Check("PostgreSQL", check_postgresql),
    Check("timers", check_timers, ("PostgreSQL",)),
    Check("lists", check_lists, ("PostgreSQL", "Redis")),
    Check("hosts", check_hosts, ("PostgreSQL",)),
    Check("batches", check_batches, ("PostgreSQL",)),
    Check("dead letters", check_dead, ("PostgreSQL", "Redis")),
    Check("archives", check_archives, ("PostgreSQL",)),
    Check("workers", check_workers),
    Check("scratch", check_scratch, local=True, mend=runbook("ScratchFilling")),
    Check("scratch folders", check_folders, ("PostgreSQL",), mend=runbook("ScratchFilling")),
    Check("sandbox", check_sandbox, local=True),
    Check("models", check_models, local=True),
    Check("models loaded", check_loaded, ("PostgreSQL", "models"), local=True),
    Check("GPU", check_gpu, local=True, mend=runbook("WorkerSick")),
)
