"""Recordings arrive: half at the source, half in archives of another program, with poison and nonsense among them."""

from __future__ import annotations

import json
from random import Random
from typing import Literal

from driver import Driver, Track
from recordings import Recording, put_file, tar_of, unpack_job
from stack import BUCKET

BATCH_FILES = 20
BACKLOG = 500
POISON = ("kills", "raises", "refused", "noise", "")  # of one batch after the other
DAMAGED_EACH, ODD_COUNT_EACH, NONSENSE_EACH, FIRST_EACH = 8, 4, 6, 3


def arriving(driver: Driver, count: int = BATCH_FILES, only: Literal["", "source", "archives"] = "") -> Track:
    """As fast as they are worked off, so many at a time, until enough was planted."""
    number, random = 0, Random(f"{driver.options.seed} planting")
    while not (driver.options.items and driver.planted.items >= driver.options.items):
        while driver.stopped:
            yield 0.1
        if driver.planted.items - driver.settled < BACKLOG:
            number += 1
            some = [random.choice(driver.place.recordings["done"]) for _ in range(count)]
            fate = POISON[number % len(POISON)]
            if fate:
                poison = random.choice(driver.place.recordings[fate])
                some[random.randrange(count)] = poison
            if only == "source" or (number % 2 and only != "archives"):
                plant_files(driver, number, some)
            else:
                plant_archive(driver, number, some, healthy=not fate)
            if number % NONSENSE_EACH == 0:
                plant_nonsense(driver, number)
        if random.random() < 0.1:
            double_jobs(driver)
        if driver.on("timer") and random.random() < 0.03:  # reconcile finds them
            plant_remains(driver)
        yield 0.2


def plant_files(driver: Driver, number: int, some: list[Recording]) -> None:
    for place, recording in enumerate(some):
        name = f"{number:05d}/{place:03d}.mp3"
        driver.planted.files[name] = recording
        put_file(driver.stores.source, name, recording.content)


def plant_archive(driver: Driver, number: int, some: list[Recording], *, healthy: bool) -> None:
    """An archive and its job, as another program puts them. Some promise another count, or other bytes.

    Some jobs go before all others: where many wait, reconcile has entered the archive before its job's turn comes.
    """
    batch = f"20260101-{number // 3600 % 24:02d}{number // 60 % 60:02d}{number % 60:02d}-{number:06x}"
    members = {f"calls/{place:03d}.mp3": recording for place, recording in enumerate(some)}
    if not healthy:
        members["calls/notes.txt"] = driver.place.recordings["foreign"][0]
    metadata = {}
    if number % DAMAGED_EACH == 0:
        metadata = {"sha256": "0" * 64}
        driver.planted.damaged.add(batch)
    driver.planted.archives[batch] = members
    driver.stores.s3.put_object(Bucket=BUCKET, Key=f"archives/{batch}.tar", Body=tar_of(members), Metadata=metadata)
    with driver.stores.queue() as client:
        job = unpack_job(batch, len(members) + (number % ODD_COUNT_EACH == 0))
        (client.lpush if number % FIRST_EACH == 0 else client.rpush)("unpack", job)


def plant_nonsense(driver: Driver, number: int) -> None:
    """Payloads that are no jobs: they belong into `dead`."""
    with driver.stores.queue() as client:
        for name, payload in (
            ("unpack", f"no json {number}"),
            ("unpack", unpack_job(f"20250101-000000-{number:06x}", 1)),
            ("transcribe", json.dumps({"batch_id": "../..", "opus_path": f"/etc/{number}", "original_filename": "x"})),
        ):
            driver.planted.nonsense.add(payload)
            client.rpush(name, payload)


def double_jobs(driver: Driver) -> None:
    """Jobs that are there already, once more on the plain list, as somebody might push them by hand."""
    rows = driver.stores.rows(
        "SELECT audio_id, batch_id, item, original_filename, b.host FROM audio_files a JOIN batches b USING (batch_id)"
        " WHERE a.state = 'pending' AND b.state = 'ready' LIMIT 3"
    )
    with driver.stores.queue() as client:
        for audio_id, batch, item, name, host in rows:
            driver.excused.add(audio_id)
            path = f"{driver.scratch(host)}/{batch}/{item}.opus"
            client.rpush("transcribe", json.dumps({"batch_id": batch, "opus_path": path, "original_filename": name}))


def plant_remains(driver: Driver) -> None:
    """An object of a dead recording, as an upload leaves it that was on its way when the recording was buried.

    Of one that died long ago reconcile would not believe that, and report it.
    """
    rows = driver.stores.rows(
        "SELECT date::text, audio_id FROM audio_files"
        " WHERE state = 'dead' AND settled_at > now() - interval '10 minutes' ORDER BY random() LIMIT 1"
    )
    for date, audio_id in rows:
        driver.stores.s3.put_object(Bucket=BUCKET, Key=f"processed/{date}/{audio_id}.opus", Body=b"remains")
