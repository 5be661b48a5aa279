"""The driver of a campaign: it acts as systemd, lets things go wrong, and waits for all to come to rest."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checker import Stores
from disks import Disk
from proxies import Proxies
from recordings import Planted, Recording
from stack import Stack
from workers import Board, Life, Nursery, points

HOSTS = ("h1", "h2", "h3")
ON_LOOP = "h3"
SLOTS = 2
TIMERS = {"reconcile": 2.0, "retention": 5.0}  # one run, and so many seconds until the next
STUCK_SECONDS = 60
MEAN_LIFE = 10.0  # seconds until a kill at random, where no fail point was met before
PASSES = 60  # of a fail point at most, before a process dies there once more
EFFECTS = 700  # of which one is the last, if nothing else was
NEVER = 10**9
LATE, LATE_SECONDS = 0.1, 5.0  # so many start later, so that others find what they left
KILLED, FATAL = -signal.SIGKILL, 70
Track = Generator[float, None, None]


@dataclass
class Worker:
    """A place for a process, and what is known of the one that is there.

    `killed`: why the driver kills it; `told`: the fail point that it says it dies at. `begun`: items that are in its
    hands, each with its attempts before. `serves`: asks for jobs. `failed`: when its models first did, being sick.
    `due`: when it starts (again); `ends`: when it is killed at random.
    """

    child: int
    role: str
    host: str
    pid: int = 0
    code: int | None = None
    due: float = 0.0
    ends: float = 0.0
    killed: str = ""
    told: str = ""
    clock_hours: float = 0.0
    log: Path = Path()
    begun: dict[int, int] = field(default_factory=dict)
    serves: bool = False
    failed: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a run takes place: the servers and what stands before them, and all that its children share with it."""

    directory: Path
    stack: Stack
    proxies: Proxies
    disk: Disk
    nursery: Nursery
    board: Board
    report: int
    stores: Stores
    recordings: dict[str, list[Recording]]


class Driver:
    """One run. What is chosen follows from the seed; what the machine makes of it does not.

    Whatever takes time is a track: a generator that yields for how many seconds it is not to be called again.
    """

    def __init__(self, place: Place, options: argparse.Namespace, log: Path, roles: Callable[[str], bool]) -> None:
        self.place, self.options, self.stores = place, options, place.stores
        self.random = random.Random(f"{options.seed} lives")
        self.began = time.monotonic()
        self.log = log.open("w")
        self.planted = Planted()
        self.settled = 0
        self.kills: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()
        self.doses: Counter[str] = Counter()
        self.anew: Counter[str] = Counter()  # measures that were begun anew, as something else befell what they measure
        self.ends: Counter[str] = Counter()
        self.figures: dict[str, list[float]] = {}
        self.oddities: list[str] = []
        self.down: set[str] = set()
        self.tracks: list[tuple[float, Track]] = []
        self.unread = b""
        self.calm = False  # nothing goes wrong any more
        self.quiet = False  # nothing else goes wrong while something is measured
        self.faulty = 0  # faults that are under way
        self.stopped: set[str] = set()  # servers
        self.begins: Counter[int] = Counter()  # BEGINs of each item so far
        self.window: Counter[int] | None = None  # and while this is kept
        self.excused: set[int] = set()  # items that are done twice for another reason than the one that is measured
        self.hit: Callable[[Worker], tuple[str, int]] | None = None  # instead of all other kills: see Life.effect
        everywhere = [("transfer", "t1"), ("reconcile", "timer"), ("retention", "timer"), ("forget", "operator")]
        everywhere += [(role, host) for host in HOSTS for role in ("unpack", "gpu", *["slot"] * SLOTS)]
        everywhere += [("unpack", HOSTS[0])]
        self.workers = [
            Worker(child, role, host) for child, (role, host) in enumerate(w for w in everywhere if roles(w[0]))
        ]
        for worker in self.workers:
            if worker.role == "forget":
                worker.due = float("inf")

    def run(self, minutes: float, *, enough: Callable[[], bool]) -> bool:
        """Let things go wrong so long, and at most as long again until it is enough; then drain.

        False if it does not come to rest.
        """
        self.place.board.set(Board.ARMED, True)
        self.deadline = time.monotonic() + 60 * minutes
        self.start_track(self.telling())
        while time.monotonic() < self.deadline or (time.monotonic() < self.deadline + 60 * minutes and not enough()):
            self.turn()
        self.make_calm()
        came_to_rest = self.drain()
        self.end_workers()
        return came_to_rest

    def start_track(self, track: Track, after: float = 0.0) -> None:
        self.tracks.append((time.monotonic() + after, track))

    def turn(self) -> None:
        """One round: hear the children, start what is due, let the tracks go on."""
        self.hear()
        now = time.monotonic()
        for worker in self.workers:
            if worker.pid:
                self.reap(worker)
            if not worker.pid and worker.host not in self.down and now >= worker.due:
                self.start(worker)
            elif worker.pid and now >= worker.ends and not (self.calm or self.quiet or self.hit):
                if self.at_risk(worker):
                    worker.ends = now + 0.3
                else:
                    self.kill(worker, "at random")
        tracks, self.tracks = self.tracks, []
        for due, track in tracks:
            if now < due:
                self.tracks.append((due, track))
            elif (pause := next(track, None)) is not None:
                self.tracks.append((time.monotonic() + pause, track))
        time.sleep(0.01)

    # Lives and deaths

    def scratch(self, host: str) -> Path:
        return self.place.directory / "hosts" / host / "scratch"

    def on(self, host: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.host == host]

    def start(self, worker: Worker, host: str = "") -> None:
        """A new life, with the three fail points that killed least before it; it dies at the first that it meets."""
        mine = sorted(points(worker.role), key=lambda point: (self.kills[point], self.random.random()))
        deaths = {point: self.random.randrange(PASSES) if self.kills[point] else 0 for point in mine[:3]}
        effect = ("", self.random.randrange(EFFECTS))
        if self.hit:
            deaths, effect = {}, self.hit(worker)
        worker.killed, worker.told, worker.code, worker.begun = "", "", None, {}
        worker.serves, worker.failed = False, None
        worker.ends = time.monotonic() + 1 + self.random.expovariate(1 / MEAN_LIFE)
        life = Life(worker.child, worker.role, host or worker.host, deaths, effect, worker.clock_hours)
        worker.clock_hours = 0.0
        worker.log = self.place.directory / f"{life.role}-{life.host}.log"
        worker.pid = self.place.nursery.fork(life)

    def kill(self, worker: Worker, why: str) -> None:
        if worker.pid:
            worker.killed = worker.killed or why
            os.kill(worker.pid, signal.SIGKILL)

    def ask_to_end(self, worker: Worker) -> None:
        if worker.pid:
            worker.killed = worker.killed or "asked"
            os.kill(worker.pid, signal.SIGTERM)

    def at_risk(self, *workers: Worker) -> bool:
        """Whether a kill could bury a healthy item that was hit often enough."""
        return any(self.place.board.get(Board.AT_RISK, worker.child) for worker in workers)

    def take_down(self, host: str) -> None:
        """Kill all that runs on a host, and start nothing there."""
        self.down.add(host)
        for worker in self.on(host):
            self.kill(worker, "with its host")
        while any(worker.pid for worker in self.on(host)):
            for worker in self.on(host):
                self.reap(worker)
            time.sleep(0.005)

    def reap(self, worker: Worker) -> None:
        """Notice a death, and what it was of."""
        if not worker.pid or not (found := os.waitpid(worker.pid, os.WNOHANG))[0]:
            return
        self.hear()
        who, why = f"{worker.role}@{worker.host}", worker.told or worker.killed
        said = last_words(worker.log)
        worker.pid, worker.due, worker.code = 0, time.monotonic(), os.waitstatus_to_exitcode(found[1])
        if worker.code == KILLED and why:
            self.note("death", who=who, why=why)
            (self.deaths if why == "poison" else self.kills)[why] += 1
            if why == "poison":
                self.excused |= worker.begun.keys()
            if why != "timed" and self.random.random() < LATE:
                worker.due += self.random.uniform(0, LATE_SECONDS)
        elif worker.role in (*TIMERS, "forget") and (worker.code == 0 or said.startswith("lab-audio: ")):
            self.ends[f"{worker.role} {'done' if worker.code == 0 else 'in vain'}"] += 1
            worker.due += TIMERS.get(worker.role, 0)
        elif worker.code in (0, -signal.SIGTERM) and worker.killed:
            self.ends["asked to end"] += 1
        elif worker.code == FATAL:
            self.ends["fatal"] += 1
            self.note("fatal", who=who, said=said)
            worker.due += 0.5
        else:
            self.odd(f"{who} ended with {worker.code}: {said}")
            worker.due += 1
        if worker.role == "forget":
            worker.due = float("inf")

    def hear(self) -> None:
        """What the children have told."""
        with suppress(BlockingIOError):
            while block := os.read(self.place.report, 1 << 16):
                self.unread += block
        *whole, self.unread = self.unread.split(b"\n")
        for line in whole:
            told = json.loads(line)
            worker = self.workers[told["child"]]
            if told["pid"] != worker.pid:
                continue
            if "died" in told:
                worker.told = told["died"]
            elif "serves" in told:
                worker.serves = True
            elif "failed" in told:
                worker.failed = worker.failed or time.monotonic()
            elif "begun" in told:
                item, attempts = told["begun"]
                worker.begun.setdefault(item, attempts - 1)
                self.begins[item] += 1
                if self.window is not None:
                    self.window[item] += 1
            else:
                worker.begun.pop(told["settled"], None)

    # The end

    def make_calm(self) -> None:
        """Everything works again, and nothing is killed any more."""
        self.calm = True
        self.place.board.set(Board.ARMED, False)
        for server in self.stopped:
            self.place.stack.start_one(server)
        self.stopped.clear()
        for store in self.place.proxies.at:
            self.note("passed", store=store, counts=self.place.proxies.set(store))
        if self.place.disk.broken:
            self.take_down(ON_LOOP)
            self.place.disk.repair()
        self.place.disk.empty()
        self.down.clear()
        self.tracks = []
        self.start_track(self.telling())
        self.note("calm")

    def drain(self) -> bool:
        """Until nothing is left to be done. False if nothing moves any more before that."""
        seen: Any = None
        moved = time.monotonic()
        while time.monotonic() - moved < self.options.stuck:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                self.turn()
            state = self.state()
            if state == (self.planted.items, 0, [], [], []):
                return True
            if state != seen:
                seen, moved = state, time.monotonic()
        self.note("stuck", state=seen)
        return False

    def state(self) -> tuple[Any, ...]:
        """Settled items, open batches, and what is left in Redis, on scratch and at the source."""
        settled = self.count_settled()
        open_ = self.stores.rows(
            "SELECT count(*) FROM batches WHERE state NOT IN ('complete', 'failed') OR host IS NOT NULL"
        )[0][0]
        with self.stores.queue() as client:
            keys = sorted(key for key in client.scan_iter(count=1000) if key != "dead")
        folders = [p.name for s in self.stores.scratches if s.exists() for p in s.iterdir() if p.name[0] != "."]
        files = [p.name for p in self.stores.source.rglob("*") if p.is_file()]
        return settled, open_, keys, sorted(folders), sorted(files)

    def count_settled(self) -> int:
        return int(self.stores.rows("SELECT count(*) FROM audio_files WHERE state <> 'pending'")[0][0])

    def end_workers(self) -> None:
        """Ask all to end; timers have a last run before."""
        for worker in self.workers:
            worker.due = float("inf")
        for role in TIMERS:
            for worker in (w for w in self.workers if w.role == role):
                while worker.pid:
                    self.reap(worker)
                self.start(worker)
                while worker.pid:
                    self.reap(worker)
                    time.sleep(0.01)
                worker.due = float("inf")
        for worker in self.workers:
            self.ask_to_end(worker)
        deadline = time.monotonic() + 20
        while any(worker.pid for worker in self.workers) and time.monotonic() < deadline:
            for worker in self.workers:
                self.reap(worker)
                worker.due = float("inf")
            time.sleep(0.01)
        for worker in self.workers:
            if worker.pid:
                self.odd(f"{worker.role}@{worker.host} does not end when asked to")
                self.kill(worker, "the end")

    # What is told

    def note(self, event: str, **more: Any) -> None:
        self.log.write(json.dumps({"t": round(time.monotonic() - self.began, 3), "event": event, **more}, default=str))
        self.log.write("\n")
        self.log.flush()

    def odd(self, what: str) -> None:
        """Something that no fault explains: the run has failed."""
        self.oddities.append(what)
        self.note("odd", what=what)
        print(f"\nodd: {what}", flush=True)

    def telling(self) -> Track:
        """One line that changes; where nobody watches, a line every ten seconds."""
        watched = sys.stdout.isatty()
        while True:
            if not self.stopped:
                self.settled = self.count_settled()
            left = max(0.0, self.deadline - time.monotonic())
            line = (
                f"{'draining' if self.calm else f'{left / 60:.1f} min left'}: {self.settled} of {self.planted.items}"
                f" recordings, {self.kills.total()} kills, {self.doses.total()} faults"
            )
            if not self.hit:
                print(f"\r\033[K{line}" if watched else line, end="" if watched else "\n", flush=True)
            yield 1 if watched else 10


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:400] if lines else ""
