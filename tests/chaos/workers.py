"""The project's workers as forked children: real loops, shorter pauses, named fail points, stand-ins for the models.

Nothing here is imported by the workers: a child wraps their functions after the fork.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import importlib
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  # here, once for all forks
import redis
import typer
from botocore.config import Config
from sqlalchemy import Engine, event

from lab_audio import config, log, s3_utils
from lab_audio.cli import operate
from lab_audio.contracts import Classification, Transcript
from lab_audio.errors import Permanent
from lab_audio.media import sandbox
from lab_audio.operations import reconcile as reconciling
from lab_audio.operations import retention as retaining
from lab_audio.workers import gpu_worker, transfer_sounds, unpack_worker
from lab_audio.workers.loop import Stop, exit_code
from lab_audio.workers.recognition import Models

from recordings import POLICIES, score, speaks

AT_RISK = 3  # attempts from which no injected kill hits an item
PART_BYTES = 5 << 20  # the least that S3 takes
HAND_SECONDS = 10.0  # for which an item is in a process's hands at most
LET_GO = ("hand_back", "note_error")  # functions after which it is not any more
GRACE_SECONDS = 8.0
WHOLE_SHARE = 0.2  # of the runs of reconcile, those that compare all rows and objects
UPLOAD_SECONDS = 20.0
_LIBC = ctypes.CDLL(None, use_errno=True)

# Pauses and bounds of a lab, as a campaign has minutes where a lab has weeks. A name that is gone is an error.
TIMES: dict[str, Any] = {
    "lab_audio.ledger.hosts:BEAT_SECONDS": 1,
    "lab_audio.ledger.hosts:SILENT_AFTER": "interval '5 seconds'",
    "lab_audio.ledger.connection:ANSWER_SECONDS": 10,
    "lab_audio.workers.host:TIDY_SECONDS": 3,
    "lab_audio.workers.transfer_sounds:LOCK_SECONDS": 0.5,
    "lab_audio.workers.unpack_worker:PAUSE_SECONDS": 1,
    "lab_audio.workers.unpack_worker:FFMPEG_PAUSES": (0.5, 1),
    "lab_audio.workers.gpu_worker:IDLE_SECONDS": 1,
    "lab_audio.s3_utils:PART_SIZE": PART_BYTES,
    "lab_audio.s3_utils:Config": partial(Config, read_timeout=5),
}


@dataclass(frozen=True)
class Step:
    """A step of the protocol: the roles that take it, and the function that does it ("module:name", inside lab_audio).

    `idle`: what it answers when there was nothing to do. `anyone`: it falls to whichever of the roles comes first, so a
    kill in one of them will do.
    """

    name: str
    roles: tuple[str, ...]
    function: str
    idle: tuple[Any, ...] = (None, False)
    anyone: bool = False


STEPS = [
    Step("MINT", ("transfer",), "ledger:mint"),
    Step("BUILD", ("transfer",), "media.archive:build"),
    Step("UPLOAD", ("transfer",), "s3_utils:upload_archive"),
    Step("UPLOADED", ("transfer",), "ledger:record_upload"),
    Step("PUSH", ("transfer",), "queues:push", ()),
    Step("FATE", ("transfer",), "source:apply_fate"),
    Step("FATED", ("transfer",), "ledger:fated", ()),
    Step("CLAIM", ("unpack", "slot", "gpu"), "queues:Inbox.claim"),
    Step("ADOPT", ("unpack",), "ledger:adopt", ()),
    Step("TAKE", ("unpack",), "ledger:take"),
    Step("ENCODE", ("unpack",), "media.transcode:encode"),
    Step("SEAL", ("unpack",), "ledger:seal"),
    Step("FAIL", ("unpack",), "ledger:fail"),
    Step("PUBLISH", ("unpack",), "queues:Inbox.publish", ()),
    Step("BEGIN", ("slot",), "ledger:begin"),
    Step("MODEL", ("slot",), ""),
    Step("RESULT", ("slot",), "scratch:write_atomic", ()),
    Step("PUT", ("slot",), "s3_utils:upload_opus"),
    Step("FINISH", ("slot",), "ledger:finish"),
    Step("BURY", ("slot",), "ledger:bury"),
    Step("ACK", ("slot",), "queues:Inbox.ack", ()),
    Step("MOVE", ("unpack", "slot", "gpu"), "queues:Inbox.move", ()),
    Step("ROUTE", ("gpu",), "workers.gpu_worker:route_job", ()),
    Step("DROP", ("slot",), "workers.host:drop_stale", ()),
    Step("RETURN", ("slot",), "ledger:give_back", ()),
    Step("FULL", ("unpack",), "ledger:return_full", ()),
    Step("CLEANUP", ("unpack", "slot", "gpu"), "scratch:cleanup_scratch", (), anyone=True),
    Step("FORGET", ("unpack", "slot", "gpu"), "queues:forget_batch", (), anyone=True),
    Step("RELEASE", ("unpack", "slot", "gpu"), "ledger:release", (), anyone=True),
    Step("LEFTOVERS", ("unpack", "gpu"), "queues:put_back", ()),
    Step("LOST", ("reconcile", "forget"), "workers.host:lose_host"),
    Step("LOST-REDIS", ("reconcile", "forget"), "queues:forget_host", ()),
    Step("LOST-PUSH", ("forget",), "queues:push", ()),
    Step("RECONCILE-PUSH", ("reconcile",), "queues:push", ()),
    Step("RECONCILE-PUBLISH", ("reconcile",), "queues:publish", ()),
    Step("RECONCILE-OBJECT", ("reconcile",), "s3_utils:delete_opus", ()),
    Step("RETAIN", ("retention",), "ledger:expire_archive"),
    Step("RETAIN-DELETE", ("retention",), "s3_utils:delete_archive", ()),
]
SIDES = ("before", "after")


def points(role: str) -> list[str]:
    """The fail points of a role: `role STEP before|after`."""
    return [f"{role} {step.name} {side}" for step in STEPS if role in step.roles for side in SIDES]


def not_killed(roles: Collection[str], kills: Mapping[str, int]) -> list[str]:
    """Fail points of these roles at which nobody was killed yet."""
    missing = []
    for step in STEPS:
        for side in SIDES:
            mine = [f"{role} {step.name} {side}" for role in step.roles if role in roles]
            if not step.anyone:
                missing += [point for point in mine if not kills.get(point)]
            elif mine and not any(kills.get(point) for point in mine):
                missing.append(f"any {step.name} {side}")
    return missing


class Board:
    """Bytes that the driver and its children share: whether to kill at all, and of each child two flags."""

    ARMED, SICK, AT_RISK = 0, 1, 2

    def __init__(self, children: int) -> None:
        self._bytes = mmap.mmap(-1, 1 + 3 * children)

    def _place(self, flag: int, child: int) -> int:
        return 0 if flag == self.ARMED else 1 + 3 * child + flag

    def set(self, flag: int, value: bool, child: int = 0) -> None:
        self._bytes[self._place(flag, child)] = value

    def get(self, flag: int, child: int = 0) -> bool:
        return bool(self._bytes[self._place(flag, child)])


@dataclass(frozen=True)
class Life:
    """What one child is, and how it is to die.

    `deaths`: fail point, to how often it is passed first; `effect`: how the effect begins before which it dies (a
    statement, command or request to a store), and how many such are passed first.
    """

    child: int
    role: str
    host: str
    deaths: Mapping[str, int]
    effect: tuple[str, int]
    clock_hours: float = 0.0


class Points:
    """A child's fail points: it dies at the first that is due, unless that could bury a healthy item."""

    def __init__(self, life: Life, board: Board, report: int) -> None:
        self.life, self.board, self.report = life, board, report
        self.left = dict(life.deaths)
        self.effect, self.effects_left = life.effect
        self.begun: dict[int, tuple[int, float]] = {}  # item to its attempts, and since when
        self.serves = False
        self.lock = threading.RLock()

    def tell(self, what: str, value: object) -> None:
        told = {"child": self.life.child, "pid": os.getpid(), what: value}
        os.write(self.report, json.dumps(told).encode() + b"\n")

    def pass_by(self, step: str, side: str) -> None:
        with self.lock:
            if step == "CLAIM" and not self.serves:
                self.serves = True
                self.tell("serves", True)
            name = f"{self.life.role} {step} {side}"
            if name in self.left and self.mortal():
                self.left[name] -= 1
                if self.left[name] < 0:
                    self.die(name)

    def before_effect(self, effect: str) -> None:
        with self.lock:
            if effect.startswith(self.effect) and self.mortal():
                self.effects_left -= 1
                if self.effects_left < 0:
                    self.die("before an effect")

    def die(self, why: str) -> None:
        self.tell("died", why)
        os.kill(os.getpid(), signal.SIGKILL)

    def mortal(self) -> bool:
        """Whether a kill now could bury no healthy item; the driver is told of it as well."""
        risky = self.at_risk()
        self.board.set(Board.AT_RISK, risky, self.life.child)
        return self.board.get(Board.ARMED) and not self.board.get(Board.SICK, self.life.child) and not risky

    def at_risk(self) -> bool:
        recent = time.monotonic() - HAND_SECONDS
        return any(attempts >= AT_RISK and since > recent for attempts, since in self.begun.values())

    def note(self, step: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Keep in mind which items are in the models' hands, for the driver and for ourselves."""
        with self.lock:
            if step == "BEGIN" and answer is not None:
                self.begun[arguments[1]] = answer, time.monotonic()
                self.tell("begun", [arguments[1], answer])
            elif step in ("FINISH", "BURY", *LET_GO):
                self.begun.pop(arguments[1], None)
                self.tell("settled", arguments[1])
            self.board.set(Board.AT_RISK, self.at_risk(), self.life.child)

    def around(self, step: Step, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def stepped(*arguments: Any, **named: Any) -> Any:
            self.pass_by(step.name, "before")
            answer = function(*arguments, **named)
            self.note(step.name, arguments, answer)
            if not any(answer is nothing for nothing in step.idle):
                self.pass_by(step.name, "after")
            return answer

        return stepped


def replace(path: str, make: Callable[[Any], Any]) -> None:
    """Put something in place of "module:name" wherever lab_audio has it. Raises AttributeError if it is not there.

    So a function that was renamed ends the campaign, and does not go without its fail points.
    """
    module_name, _, name = path.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    there = getattr(owner, name)
    instead = make(there)
    setattr(owner, name, instead)
    if not outer:
        for module in [m for n, m in sys.modules.items() if n.startswith("lab_audio")]:
            for other in [n for n, v in vars(module).items() if v is there and (callable(v) or n == name)]:
                setattr(module, other, instead)


def put(path: str, value: Any) -> None:
    replace(path, lambda _: value)


def shorten() -> None:
    """Give this process a lab's pauses in miniature; called once, before the forks."""
    for path, value in TIMES.items():
        put(path, value)
    sandbox.problem()  # the answer is inherited by all that are forked
    put("lab_audio.s3_utils:upload_archive", partial(s3_utils.upload_archive, part_size=PART_BYTES))
    from_url = redis.Redis.from_url
    redis.Redis.from_url = lambda url, **more: from_url(url, **{**more, "socket_timeout": 6})  # type: ignore[method-assign]


def watch_effects(points: Points, bucket: s3_utils.Bucket) -> None:
    """Call `points` before each effect of this process on a store."""
    event.listen(Engine, "before_cursor_execute", lambda *a: points.before_effect(f"sql {a[2]}"))
    event.listen(Engine, "commit", lambda _: points.before_effect("commit"))
    requests = bucket.client.meta.events
    requests.register("before-send.s3", lambda request, **_: points.before_effect(f"s3 {request.method}"))
    execute = redis.Redis.execute_command

    def watched(client: redis.Redis, *args: Any, **options: Any) -> Any:
        points.before_effect(f"redis {args[0]}")
        return execute(client, *args, **options)

    redis.Redis.execute_command = watched  # type: ignore[method-assign, assignment]


def shift_clock(hours: float) -> None:
    """Set this process's idea of the time, as far as lab_audio asks."""
    shift = datetime.timedelta(hours=hours)
    true_time = time.time

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) + shift

    time.time = lambda: true_time() + shift.total_seconds()
    for module in [m for n, m in sys.modules.items() if n.startswith("lab_audio")]:
        if vars(module).get("datetime") is datetime.datetime:
            module.datetime = Shifted  # type: ignore[attr-defined]


class StandIn:
    """The models: what they say follows from the samples; poison kills or raises each time, a sick one always."""

    def __init__(self, board: Board, points: Points, fates: Mapping[str, str]) -> None:
        self.board, self.points, self.fates = board, points, fates

    def transcribe(self, samples: Any) -> Transcript:
        self.points.pass_by("MODEL", "before")
        if self.board.get(Board.SICK, self.points.life.child):
            self.points.tell("failed", True)
            raise RuntimeError("CUDA error: device-side assert triggered")
        words = hashlib.sha256((samples * 32768).astype("<i2").tobytes()).hexdigest()
        fate = self.fates.get(words)
        if fate == "kills":
            self.points.die("poison")
        if fate == "raises":
            raise RuntimeError("shape mismatch")
        if fate == "refused":
            raise Permanent("longer than the models take")
        self.points.pass_by("MODEL", "after")
        if fate and not speaks(words):  # whatever was not planted is the canary
            return Transcript("", "en", [], False, "stand-in")
        return Transcript(words, "en", [{"start": 0.0, "end": 0.2, "text": words}], True, "stand-in")

    def classify(self, texts: Any) -> list[list[Classification]]:
        return [[self.verdict(words, policy) for policy in POLICIES] for words in texts]

    @staticmethod
    def verdict(words: str, policy: str) -> Classification:
        value = score(words, policy)
        label = "violates" if value >= 0.5 else "complies"
        return Classification(policy, "0" * 64, label, value, "stand-in", "stand-in", [value])


class Nursery:
    """Forks workers. Made before any thread is: a fork copies the caller only."""

    def __init__(
        self, environment: Mapping[str, str], directory: Path, board: Board, report: int, fates: Mapping[str, str]
    ) -> None:
        self.environment, self.directory, self.board, self.report = dict(environment), directory, board, report
        self.fates = fates
        self.mutant: Callable[[], None] = lambda: None
        os.environ.update(self.environment)
        log.configure("WARNING")
        shorten()
        self.bucket = s3_utils.open_bucket(config.load(config.S3Settings))  # never used here, so safe to fork

    def fork(self, life: Life) -> int:
        """Start a worker; its pid."""
        me = os.getpid()
        self.board.set(Board.AT_RISK, False, life.child)
        self.board.set(Board.SICK, False, life.child)
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            _LIBC.prctl(gpu_worker.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != me:
                os._exit(1)
            os.setsid()  # Ctrl-C is the driver's
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            random.seed()
            out = os.open(self.directory / f"{life.role}-{life.host}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = self._live(life)
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _live(self, life: Life) -> int:
        fail_points = Points(life, self.board, self.report)
        put("lab_audio.s3_utils:open_bucket", lambda *_, **__: self.bucket)
        self.mutant()
        for step in STEPS:
            if life.role in step.roles and step.function:
                replace(f"lab_audio.{step.function}", partial(fail_points.around, step))
        watch_effects(fail_points, self.bucket)
        for name in LET_GO:
            replace(f"lab_audio.ledger:{name}", partial(fail_points.around, Step(name, (), "")))
        if self.board.get(Board.ARMED) and random.random() > WHOLE_SHARE:  # most reconciles are --quick, as in a lab
            put("lab_audio.operations.reconcile:compare_objects", lambda *_, **__: None)
        if life.clock_hours:
            shift_clock(life.clock_hours)
        os.environ.update(LAB_HOST=life.host, SCRATCH_ROOT=str(self.directory / "hosts" / life.host / "scratch"))
        stand_in = StandIn(self.board, fail_points, self.fates)
        return exit_code(lambda: ROLES[life.role](Models(stand_in.transcribe, stand_in.classify)))


def transfer(_: Models) -> None:
    transfer_sounds.run(config.load(config.TransferSettings), Stop().on_signals())


def unpack(_: Models) -> None:
    unpack_worker.run(config.load(config.UnpackSettings), Stop().on_signals())


def gpu(_: Models) -> None:
    """The GPU worker's parent: its processes are the driver's children, which starts them as the parent would."""
    put("lab_audio.workers.gpu_worker:supervise", lambda settings, devices, stop: stop.event.wait())
    gpu_worker.run(config.load(config.GpuSettings), Stop().on_signals())


def slot(models: Models) -> None:
    gpu_worker.work_slot(config.load(config.GpuSettings), lambda: models, Stop())


def stores() -> reconciling.Stores:
    return operate.open_stores(config.load(config.StoreSettings))


def reconcile(_: Models) -> None:
    """One `lab-audio reconcile`, whose grace for hosts is as short as all else here."""
    report = reconciling.reconcile(stores(), GRACE_SECONDS)
    for what in ("objects_without_rows", "rows_without_objects"):
        for which in getattr(report, what):
            print(f"{what}: {which}", flush=True)


def retention(_: Models) -> None:
    """One `lab-audio retention`, for which seconds are days."""
    here = stores()
    list(retaining.archives(here, 0, dry_run=False))
    list(retaining.uploads(here, datetime.timedelta(seconds=UPLOAD_SECONDS), dry_run=False))


def forget(_: Models) -> None:
    """`lab-audio hosts forget LAB_HOST`."""
    try:
        operate.forget(os.environ["LAB_HOST"])
    except typer.Exit as left:
        if left.exit_code:
            raise SystemExit(left.exit_code) from None


ROLES: dict[str, Callable[[Models], None]] = {
    role.__name__: role for role in (transfer, unpack, gpu, slot, reconcile, retention, forget)
}
