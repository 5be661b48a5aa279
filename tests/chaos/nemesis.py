"""What goes wrong. Each fault is a track, which does it, lasts, and undoes it."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from random import Random

from driver import FATAL, HOSTS, KILLED, ON_LOOP, Driver, Track, Worker
from proxies import BYTES_FAULTS, S3_FAULTS
from workers import ROLES, Board, not_killed

Fault = Callable[[Driver, Random], Track]  # its own dice, so that other tracks do not change what they show
STORES = ("s3", "redis", "postgres")
WHOLE_SECONDS = 120  # from FLUSHALL until Redis is whole again, by reconcile
SICK_SECONDS = 30  # until a sick worker ends, from the first failure of its models
# Faults that bring a step about: they go on until it was killed.
BRINGS = {
    "scratch lost": "RETURN",
    "disk full": "FULL",
    "host destroyed": "LOST",
    "host falsely forgotten": "LOST-PUSH",
    "redis emptied": "RECONCILE-PUBLISH",
}
AFTERMATH_SECONDS = 3.0  # of what went wrong before: workers still wait for a store, recordings come once more
SETTLED_SECONDS = 60  # after an outage, for which what was begun is watched
RECOVERY_SECONDS = 60  # until what a dead worker had begun runs again; longer is no measurement


def nemesis(name: str, driver: Driver, kinds: dict[str, Fault], doses: dict[str, int]) -> Track:
    """One fault after the other, always one that is furthest from its dose. Those without a dose do not happen, and
    what takes long as often as its dose says.
    """
    random = Random(f"{driver.options.seed} {name}")
    kinds = {name: kind for name, kind in kinds.items() if doses.get(name)}
    while True:
        while driver.quiet:
            yield 0.1
        missing = {point.split()[1] for point in not_killed(ROLES, driver.kills)}
        given = {name: driver.doses[name] / doses[name] for name in kinds}
        given = {name: share for name, share in given.items() if share < 1 or name not in LONG}
        given |= {name: 0.99 for name, share in given.items() if share >= 1 and BRINGS.get(name) in missing}
        if not given:
            return
        name = min(given, key=lambda name: (given[name], random.random()))
        driver.faulty += 1
        driver.note("fault", what=name)
        yield from kinds[name](driver, random)
        driver.doses[name] += 1
        driver.note("over", what=name)
        driver.faulty -= 1
        yield random.uniform(0.5, 2.5)


# Stores


def broken_way(store: str, fault: str, driver: Driver, random: Random) -> Track:
    """What passes between all workers and a store is hit, some of it or all."""
    rate = 1.0 if fault in ("away", "silent") else random.uniform(0.1, 0.4)
    driver.place.proxies.set(store, fault, rate)
    yield random.uniform(2, 5)
    driver.note("passed", store=store, counts=driver.place.proxies.set(store))


def restarted(server: str, driver: Driver, random: Random) -> Track:
    """kill -9, and a new start."""
    driver.stopped.add(server)
    driver.place.stack.stop_one(server)
    yield random.uniform(0.1, 2)
    driver.place.stack.start_one(server)
    driver.stopped.clear()


def emptied(driver: Driver, random: Random) -> Track:
    """FLUSHALL; reconcile runs every few seconds."""
    open_before = open_batches(driver)
    with driver.stores.queue() as client:
        client.flushall()
    began = time.monotonic()
    while missing := [batch for batch in open_before if not is_whole(driver, batch)]:
        open_before = missing
        if time.monotonic() - began > WHOLE_SECONDS:
            driver.odd(f"Redis is not whole {WHOLE_SECONDS} s after FLUSHALL: {missing[:3]}")
            return
        yield 0.5
    driver.figures.setdefault("seconds until Redis was whole", []).append(time.monotonic() - began)


def open_batches(driver: Driver) -> list[str]:
    return [row[0] for row in driver.stores.rows("SELECT batch_id FROM batches WHERE state IN ('uploaded', 'ready')")]


def is_whole(driver: Driver, batch: str) -> bool:
    """Whether Redis has a job for each thing that is to be done in a batch, or it has ended."""
    state, pending = driver.stores.rows(
        "SELECT b.state, count(a.audio_id) FILTER (WHERE a.state = 'pending')"
        f" FROM batches b LEFT JOIN audio_files a USING (batch_id) WHERE b.batch_id = '{batch}' GROUP BY b.state"
    )[0]
    with driver.stores.queue() as client:
        look = client.pipeline(transaction=True)
        for name in [n for n in client.scan_iter(count=1000) if client.type(n) == "list" and n != "dead"]:
            look.lrange(name, 0, -1)
        jobs = {job for some in look.execute() for job in some if batch in job}
    transcribe = {job for job in jobs if "opus_path" in json.loads(job)}
    return state in ("complete", "failed", "unpacking") or len(transcribe if state == "ready" else jobs) >= pending


def only_this(driver: Driver) -> Track:
    """Wait until nothing else goes wrong, and see that it stays so until `driver.quiet` is taken back."""
    driver.quiet = True
    while driver.faulty > 1:
        yield 0.1
    driver.place.board.set(Board.ARMED, False)
    yield AFTERMATH_SECONDS


def over(driver: Driver) -> None:
    driver.quiet = False
    driver.place.board.set(Board.ARMED, True)


def long_outage(
    stores: tuple[str, ...], fault: str, rate: float, seconds: float, driver: Driver, random: Random
) -> Track:
    """Stores are hit for long, and nothing else is. What was begun before or meanwhile is begun no second time until
    it is settled.
    """
    yield from only_this(driver)
    while not busy_slot(driver, random):
        yield 0.01
    driver.window = Counter(item for worker in driver.workers if worker.pid for item in worker.begun)
    for store in stores:
        driver.place.proxies.set(store, fault, rate)
    yield seconds
    counts = {store: driver.place.proxies.set(store) for store in stores}
    begun, over_since = {item for item in driver.window if is_healthy(driver, item)}, time.monotonic()
    while pending(driver, begun) and time.monotonic() - over_since < SETTLED_SECONDS:
        yield 0.5
    told = {item: times for item, times in driver.window.items() if item not in driver.excused}
    redone = sum(is_healthy(driver, item) for item, times in told.items() if times > 1)
    driver.note("passed", stores=counts, begun=len(begun), told=len(told), redone=redone, seconds=seconds)
    driver.figures.setdefault("model work redone in an outage", []).append(redone)
    driver.window = None
    over(driver)


def is_healthy(driver: Driver, item: int) -> bool:
    """Whether a recording is none that fails in the models, and so is tried again."""
    ((batch, member),) = driver.stores.rows(f"SELECT batch_id, member FROM audio_files WHERE audio_id = {item}")
    members = driver.planted.archives.get(batch, driver.planted.files)
    return members[member].fate == "done"


# Hosts


def a_host(driver: Driver, random: Random) -> Generator[float, None, str]:
    """Wait for a host that may be hit: no item there was hit too often."""
    while True:
        host = random.choice(HOSTS)
        if host not in driver.down and not driver.at_risk(*driver.on(host)):
            return host
        yield 0.1


def destroyed(driver: Driver, random: Random) -> Track:
    """All its processes die, its disk is wiped. It comes back with an empty one: soon, or when it was given up."""
    host = yield from a_host(driver, random)
    driver.take_down(host)
    shutil.rmtree(driver.scratch(host), ignore_errors=True)
    how = ("given up", "soon", "forgotten")[driver.doses["host destroyed"] % 3]
    if how == "forgotten":
        yield from forget(driver, host)
    if how == "given up":
        yield from given_up(driver, host)
    yield random.uniform(0, 3)
    driver.down.discard(host)


def without_power(driver: Driver, random: Random) -> Track:
    """All its processes die at once; it comes back with its disk: soon, or so late that it was given up."""
    host = yield from a_host(driver, random)
    driver.take_down(host)
    if driver.doses["host without power"] % 2:
        yield from given_up(driver, host)
    yield random.uniform(0, 1)
    driver.down.discard(host)


def given_up(driver: Driver, host: str) -> Track:
    """Until reconcile takes a silent host for lost."""
    while driver.stopped or driver.stores.rows(f"SELECT 1 FROM hosts WHERE host = '{host}' AND seen_at IS NOT NULL"):
        yield 0.3


def falsely_forgotten(driver: Driver, random: Random) -> Track:
    """`hosts forget` of a host that lives and works."""
    host = yield from a_host(driver, random)
    yield from forget(driver, host)


def forget(driver: Driver, host: str) -> Track:
    """`hosts forget`, again where it was killed or a store was away."""
    (operator,) = driver.on("operator")
    while True:
        driver.start(operator, host)
        while operator.pid:
            yield 0.05
        if operator.code == 0:
            return
        yield 0.3


def scratch_lost(driver: Driver, random: Random) -> Track:
    """Somebody removes a folder that is in use."""
    for _ in range(100):
        while driver.stopped:
            yield 0.1
        rows = driver.stores.rows(
            "SELECT batch_id, host FROM batches b WHERE state = 'ready' AND"
            " (SELECT count(*) FROM audio_files a WHERE a.batch_id = b.batch_id AND a.state = 'pending') > 8"
        )
        if rows:
            batch, host = random.choice(rows)
            shutil.rmtree(driver.scratch(host) / batch, ignore_errors=True)
            query = f"SELECT audio_id FROM audio_files WHERE batch_id = '{batch}' AND state = 'pending'"
            driver.excused |= {item for (item,) in driver.stores.rows(query)}
            return
        yield 0.1


def disk_full(driver: Driver, random: Random) -> Track:
    """In the middle of unpacking, if some comes in the next seconds."""
    query = f"SELECT 1 FROM batches WHERE state = 'unpacking' AND host = '{ON_LOOP}'"
    for _ in range(100):
        if not driver.stopped and driver.stores.rows(query):
            break
        yield 0.1
    driver.place.disk.fill()
    yield random.uniform(2, 5)
    driver.place.disk.empty()


def disk_read_only(driver: Driver, random: Random) -> Track:
    """The disk takes no more writes, while it is in use; then the host is started anew."""
    driver.place.disk.break_down()
    yield random.uniform(2, 4)
    while driver.at_risk(*driver.on(ON_LOOP)):
        yield 0.1
    driver.take_down(ON_LOOP)
    driver.place.disk.repair()
    driver.down.discard(ON_LOOP)


# Workers


def clock_jumped(driver: Driver, random: Random) -> Track:
    """A worker starts again with a clock that is hours wrong."""
    worker = random.choice([w for w in driver.workers if w.role in ("transfer", "unpack", "gpu", "slot")])
    while driver.at_risk(worker):
        yield 0.1
    worker.clock_hours = random.choice((-1, 1)) * random.uniform(0.5, 48)
    driver.kill(worker, "at random")
    yield 1.0


def asked_to_end(driver: Driver, random: Random) -> Track:
    """SIGTERM, as at an upgrade."""
    worker = random.choice([w for w in driver.workers if w.role in ("transfer", "unpack", "gpu", "slot")])
    driver.ask_to_end(worker)
    yield 1.0


def busy_slot(driver: Driver, random: Random) -> Worker | None:
    some = [w for w in driver.workers if w.role == "slot" and w.pid and w.begun and not driver.at_risk(w)]
    return random.choice(some) if some else None


def sick(driver: Driver, random: Random) -> Track:
    """From now on the models fail in one process, on everything. It is to end soon; no attempt is spent in the end.

    Measured anew where it does not ask them: it may have nothing to do, or wait for uploads.
    """
    while not (worker := busy_slot(driver, random)):
        yield 0.02
    pid, began, failed = worker.pid, time.monotonic(), worker.failed
    others = processes(driver, worker)
    before: dict[int, tuple[int, int]] = {}  # attempts of each item, and BEGINs of it so far
    driver.place.board.set(Board.SICK, True, worker.child)
    worker.ends = float("inf")
    while worker.pid == pid:
        fresh = {item: attempts for item, attempts in worker.begun.items() if item not in before}
        before |= {item: (attempts, driver.begins[item]) for item, attempts in fresh.items()}
        failed = worker.failed or failed
        if time.monotonic() - (failed or began) > SICK_SECONDS:
            driver.place.board.set(Board.SICK, False, worker.child)
            worker.ends = time.monotonic()
            if failed:
                driver.odd(f"{worker.role}@{worker.host} is sick and does not end within {SICK_SECONDS} s")
                return
            break
        yield 0.01
    ended, failed = time.monotonic(), worker.failed or failed
    if worker.code == KILLED or not failed:  # something else befell it, or nothing
        driver.anew["worker sick"] += 1
        yield from sick(driver, random)
        return
    driver.figures.setdefault("seconds until a sick worker ended", []).append(ended - failed)
    if worker.code not in (FATAL, None):
        driver.odd(f"a sick worker ended with {worker.code}")
    spent = 0
    while driver.stopped:
        yield 0.1
    for item, (attempts, begins) in before.items():
        query = f"SELECT state, attempts, batch_id, item FROM audio_files WHERE audio_id = {item}"
        ((state, now, batch, name),) = driver.stores.rows(query)
        driver.hear()
        since = driver.begins[item] - begins  # by others, who may have died of it meanwhile
        has_result = (driver.scratch(worker.host) / batch / f"{name}.json").exists()
        spent += state == "pending" and now > attempts + since and not has_result
    if spent and processes(driver, worker) != others:  # one that died had begun some, perhaps, and not told
        driver.anew["worker sick"] += 1
        yield from sick(driver, random)
        return
    driver.figures.setdefault("attempts spent by a sick worker", []).append(spent)


def processes(driver: Driver, sick: Worker) -> set[int]:
    """Of the GPU worker of the same host, the others."""
    return {other.pid for other in driver.on(sick.host) if other.role == sick.role and other is not sick}


def death_timed(driver: Driver, random: Random) -> Track:
    """A process dies with recordings at its models, and nothing else goes wrong: how long until the first of them is
    begun again, and until the process that comes in its place takes jobs (0 where another had begun one before).

    Measured anew where one of them killed a process, or lay twice in a list: that is what others do to it.
    """
    yield from only_this(driver)
    seconds = None
    while seconds is None:
        while not (worker := busy_slot(driver, random)):
            yield 0.01
        begun = set(worker.begun)
        driver.kill(worker, "timed")
        since, restart, driver.window = time.monotonic(), None, Counter()
        while worker.pid:
            yield 0.0
        items = at_models(driver, worker.host, begun)
        while seconds is None and (items := items - driver.excused):
            passed = time.monotonic() - since
            if restart is None and worker.pid and worker.serves:
                restart = passed
            if items & driver.window.keys() or passed > RECOVERY_SECONDS:
                seconds = passed
            elif not pending(driver, items):  # the dead one had settled them
                break
            yield 0.02
        if seconds is None:
            driver.note("measured anew", what="death timed", begun=len(begun), after=round(time.monotonic() - since, 3))
            driver.anew["death timed"] += 1
    driver.window = None
    over(driver)
    if seconds > RECOVERY_SECONDS:
        driver.odd(f"no recording of a dead worker is begun again within {RECOVERY_SECONDS} s")
    driver.figures.setdefault("seconds until a recording of a dead worker was begun again", []).append(seconds)
    driver.figures.setdefault("seconds until the process in its place took jobs", []).append(restart or 0.0)
    driver.note("begun again", who=f"{worker.role}@{worker.host}", seconds=seconds, restart=restart)


def at_models(driver: Driver, host: str, begun: set[int]) -> set[int]:
    """Of these items, those without a result: neither in the ledger nor on that host's scratch."""
    if not begun:
        return set()
    some = ",".join(map(str, begun))
    rows = driver.stores.rows(
        f"SELECT audio_id, batch_id, item FROM audio_files WHERE state = 'pending' AND audio_id IN ({some})"
    )
    scratch = driver.scratch(host)
    return {audio_id for audio_id, batch, item in rows if not (scratch / batch / f"{item}.json").exists()}


def pending(driver: Driver, items: set[int]) -> set[int]:
    if not items:
        return set()
    some = ",".join(map(str, items))
    return {
        item
        for (item,) in driver.stores.rows(
            f"SELECT audio_id FROM audio_files WHERE state = 'pending' AND audio_id IN ({some})"
        )
    }


STORE_FAULTS: dict[str, Fault] = {
    **{f"s3 {fault}": partial(broken_way, "s3", fault) for fault in (*S3_FAULTS, "away")},
    **{
        f"{store} {fault}": partial(broken_way, store, fault)
        for store in STORES[1:]
        for fault in (*BYTES_FAULTS, "away")
    },
    **{f"{server} restarted": partial(restarted, server) for server in ("valkey", "postgres", "seaweedfs")},
    "redis emptied": emptied,
    "s3 errors for a while": partial(long_outage, ("s3",), "error", 0.2, 10),
    "s3 away for a while": partial(long_outage, ("s3",), "away", 1.0, 10),
    "s3 errors for 10 min": partial(long_outage, ("s3",), "error", 0.2, 600),
    **{f"{store} away for 5 min": partial(long_outage, (store,), "away", 1.0, 300) for store in STORES},
    "all stores away for 5 min": partial(long_outage, STORES, "away", 1.0, 300),
}
HOST_FAULTS: dict[str, Fault] = {
    "host destroyed": destroyed,
    "host without power": without_power,
    "host falsely forgotten": falsely_forgotten,
    "scratch lost": scratch_lost,
    "disk full": disk_full,
    "disk read-only": disk_read_only,
    "clock jumped": clock_jumped,
    "asked to end": asked_to_end,
    "worker sick": sick,
    "death timed": death_timed,
}
LONG = ("s3 errors for 10 min", *(f"{store} away for 5 min" for store in STORES), "all stores away for 5 min")
SMALL = {
    **{name: 1 for name in (*STORE_FAULTS, *HOST_FAULTS) if name not in LONG},
    "host destroyed": 3,
    "host without power": 2,
    "scratch lost": 4,
    "disk full": 3,
    "redis emptied": 2,
    "host falsely forgotten": 2,
    "death timed": 3,
}
# A third of the table's doses, so that three runs make it full; in one of them also what takes long.
FULL = {
    **dict.fromkeys(SMALL, 6),
    "s3 errors for a while": 2,
    "s3 away for a while": 2,
    "host destroyed": 34,
    "host falsely forgotten": 34,
    "disk full": 17,
    "disk read-only": 17,
    "valkey restarted": 17,
    "postgres restarted": 17,
    "worker sick": 17,
    "death timed": 34,
}
LEAST = {"recordings": 10_000, "kills": 1_000}  # in a run with these doses
DOSES = {
    "small": SMALL,
    "full": FULL,
    "long": {**FULL, **dict.fromkeys(LONG, 1)},
    "outages": dict.fromkeys(LONG, 1),
    "deaths": {"death timed": 100},
}
ONLY = ("outages", "deaths")  # doses by which one thing is measured, and not every step killed
