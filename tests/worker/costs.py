"""What looking costs: python tests/worker/costs.py prints the figures of docs/operations.md.

`status`, `check-health` and `metrics` with many finished and many open batches; and the part of a GPU worker's CPU time
that metrics and log lines take, over 1,000 recordings with stand-in models.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "stack"), str(Path(__file__).parent / "protocol")]

from lab_audio import log, metrics  # noqa: E402
from lab_audio.operations import health  # noqa: E402

from stack import Stack  # noqa: E402
from world import World  # noqa: E402

ITEMS, RUNS = 1000, 5
health.DEADLINE_SECONDS = 60.0
FILL = """
INSERT INTO batches (batch_id, state, job, file_count, uploaded_at, unpacking_at, ready_at, complete_at)
SELECT to_char(n, 'FM00000000') || :mark, :state, '', 10, now(), now(), now(),
    CASE WHEN :state = 'complete' THEN now() END FROM generate_series(1, :count) n
"""
FILL_ITEMS = """
INSERT INTO audio_files (batch_id, member, item, original_filename, state, date, settled_at)
SELECT to_char(n, 'FM00000000') || :mark, m || '.mp3', lpad(to_hex(m), 16, '0'), m || '.mp3',
    CASE WHEN :state = 'complete' OR m < 5 THEN 'done' ELSE 'pending' END, now(), now()
FROM generate_series(1, :count) n, generate_series(1, 10) m
"""


def fill(world: World, state: str, count: int) -> None:
    mark = {"complete": "-000000-000000", "ready": "-000000-ffffff"}[state]
    for statement in (FILL, FILL_ITEMS):
        world.sql(statement, mark=mark, state=state, count=count)
    with world.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


def best(world: World, *command: str) -> float:
    """Seconds of a command, within a process whose imports are done; the best of a few."""
    found = []
    for _ in range(RUNS):
        began = time.perf_counter()
        world.command(*command, code=1 if command[0] == "check-health" else 0, SCRATCH_ROOT="/nonexistent")
        found.append(time.perf_counter() - began)
    return min(found)


def looking(world: World) -> None:
    print("finished   open   status   check-health   metrics   (seconds)")
    for finished, active in ((10, 10), (10_000, 10), (10_000, 100), (10_000, 1000)):
        world.reset()
        fill(world, "complete", finished)
        fill(world, "ready", active)
        took = [best(world, *command) for command in (("status",), ("check-health",), ("metrics",))]
        print(f"{finished:8} {active:6} {took[0]:8.2f} {took[1]:14.2f} {took[2]:9.2f}", flush=True)


def cpu_of_worker(world: World) -> float:
    """CPU seconds of a GPU slot, over all recordings."""
    world.reset()
    world.plant_batch(1, [f"{number}.mp3" for number in range(ITEMS)])
    world.run("unpack")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    world.run("gpu")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def tell_one() -> None:
    """What a GPU worker tells of one recording."""
    for name in ("decode", "transcribe", "classify", "upload", "enter"):
        with metrics.stage(name):
            pass
    for doing in ("work", "work", "wait"):
        metrics.MODELS.labels(doing).inc(0.1)
    metrics.AUDIO.inc(2.0)
    metrics.BYTES.labels("opus", "out").inc(1000)
    metrics.RECORDINGS.labels("done").inc()
    said = {"batch_id": World.BATCH(1), "item": "0123456789abcdef", "audio_id": 1, "attempt": 1, "duration": 1.0}
    log.get_logger().bind(**said).info("recording done", member="a.mp3", state="done", seconds=2.0)


def telling(world: World) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        log.configure("INFO", "h1")
        began = time.process_time()
        for _ in range(ITEMS):
            tell_one()
        told = time.process_time() - began
    whole = cpu_of_worker(world)
    print(
        f"{ITEMS} recordings cost a GPU worker {whole:.1f} s of CPU beside the models;"
        f" to tell of them {told:.2f} s, {told / whole:.1%} of it"
    )


def main() -> None:
    with Stack() as stack, stack.fresh() as env, tempfile.TemporaryDirectory() as directory:
        os.environ.update(env)
        world = World(Path(directory) / "lab", env)
        looking(world)
        telling(world)


if __name__ == "__main__":
    main()
