"""Whether the campaign would notice: each atomic step is split or left out in turn, and nothing that heals runs."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "worker" / "protocol"))

from checker import counters_behind, wrongs
from driver import NEVER, Driver, Place, Track, Worker
from mutants import MUTANTS as BROKEN
from planting import arriving
from stack import BUCKET

ITEMS = 400
RECORDINGS = 10  # in a batch: many batches make many chances
MINUTES = 0.35
STUCK_SECONDS = 15
# Which of the campaign's processes take a step that a worker takes.
PROCESSES = {"transfer": ("transfer",), "unpack": ("unpack",), "gpu": ("slot", "gpu")}


def nothing() -> None:
    """No step is broken: what the campaign then finds is wrong with the campaign."""


MUTANTS = [("transfer", nothing, ""), ("unpack", nothing, ""), ("gpu", nothing, ""), *BROKEN]


def bites(place: Place, options: argparse.Namespace, role: str, mutant: Callable[[], None], hint: str) -> list[str]:
    """A short run with kills around the broken step: what is found to be wrong."""
    empty(place)
    place.nursery.mutant = mutant
    options = argparse.Namespace(**{**vars(options), "items": ITEMS, "stuck": STUCK_SECONDS})
    here = ("unpack", "gpu", "slot", *(("transfer",) if role == "transfer" else ()))
    driver = Driver(place, options, options.report / "teeth-run.jsonl", roles=lambda role: role in here)

    def hit(worker: Worker) -> tuple[str, int]:
        return (
            (hint, driver.random.randrange(2 ** driver.random.randrange(6)))
            if worker.role in PROCESSES[role]
            else ("", NEVER)
        )

    driver.hit = hit
    found: set[str] = set()
    driver.start_track(arriving(driver, RECORDINGS, "source" if role == "transfer" else "archives"))
    if role == "gpu":
        driver.start_track(counting(driver, found))
    try:
        rested = driver.run(MINUTES, enough=lambda: True)
        wrong = [] if rested else ["it does not come to rest"]
        wrong += [*wrongs(driver.planted, place.stores), *driver.oddities]
    finally:
        for worker in driver.workers:
            driver.kill(worker, "the end")
        for worker in driver.workers:
            while worker.pid:
                driver.reap(worker)
                time.sleep(0.01)
    return wrong + sorted(found)


def counting(driver: Driver, found: set[str]) -> Track:
    while True:
        found |= {f"Redis counts {batch} short" for batch in counters_behind(driver.stores)}
        yield 0.03


def empty(place: Place) -> None:
    """No rows, no objects, no lists, no files."""
    stores = place.stores
    stores.do("TRUNCATE classifications, transcripts, source_files, audio_files, batches, hosts RESTART IDENTITY")
    with stores.queue() as client:
        client.flushall()
    for upload in stores.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        stores.s3.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    for key in stores.objects():
        stores.s3.delete_object(Bucket=BUCKET, Key=key)
    for directory in [stores.source, *stores.scratches, place.directory / "tmp"]:
        shutil.rmtree(directory, ignore_errors=True)
    stores.source.mkdir()
