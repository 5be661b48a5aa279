"""The corpus through the real unpack worker, ffmpeg and sandbox: each refusal is told, and nothing else suffers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from hostile import FIRST, LAST, Case, cases, unpacked
from needed import missing

from lab_audio import ledger
from lab_audio.config import UnpackSettings
from lab_audio.contracts import archive_key
from lab_audio.media import sandbox
from lab_audio.workers import unpack_worker
from lab_audio.workers.host import open_host, open_inbox
from lab_audio.workers.loop import Stop

from world import World


def test_what_is_to_become_of_each_becomes_of_it(world: World) -> None:
    """All cases, each a batch of its own, unpacked by one worker that none of them stops."""
    assert assert_all(world, cases()) >= 150


def test_compressed_archives_where_they_are_taken(world: World) -> None:
    assert_all(world, unpacked(), compressed=True)


def assert_all(world: World, taken: Iterable[Case], *, compressed: bool = False) -> int:
    """How many there are."""
    if problem := sandbox.problem():
        missing(problem)
    corpus = {world.BATCH(number): case for number, case in enumerate(taken)}
    assert len({case.name for case in corpus.values()}) == len(corpus)
    for batch_id, case in corpus.items():
        world.bucket.client.put_object(Bucket=world.bucket.name, Key=archive_key(batch_id), Body=case.data)
        world.client.rpush("unpack", world.job(batch_id, 0))
    names = {
        part for case in corpus.values() for name in (*case.good, *case.dead) for part in PurePosixPath(name).parts
    }
    names -= corpus.keys()  # one of them is that of a folder of ours
    before = set(outside(world, names))
    unpack_all(world, compressed)
    wrong = [f"{case.name}: {what}" for batch_id, case in corpus.items() for what in wrongs(world, batch_id, case)]
    assert wrong == []
    assert_only_opus_lies_there(world)
    assert set(outside(world, names)) == before
    return len(corpus)


def unpack_all(world: World, compressed: bool) -> None:
    stop = Stop()
    here = open_host(world.load(UnpackSettings), stop)
    held, inbox = open_inbox(here, "unpack")
    ledger.beat(here.engine, "h1", gpu=True)
    while job := inbox.claim(0):
        why = unpack_worker.handle(here, inbox, job, unpack_worker.Encoding(24_000, 2, compressed), stop)
        assert why is None or (compressed and "needs more than" in why), why  # it comes again, with more room
        ledger.beat(here.engine, "h1", gpu=True)
    held.release()


def wrongs(world: World, batch_id: str, case: Case) -> Iterator[str]:
    ((state, reason, flags),) = world.rows(f"SELECT state, reason, flags FROM batches WHERE batch_id = '{batch_id}'")
    rows = world.rows(f"SELECT member, state, reason FROM audio_files WHERE batch_id = '{batch_id}'")
    processed = {row.member for row in rows if row.state == "pending"}
    dead = {row.member: row.reason for row in rows if row.state == "dead"}
    for name, why in dead.items():
        if "was not done" in why or "was killed" in why:
            yield f"{name} kept ffmpeg at work: {why}"
    broken = "; ".join(flag for flag in flags if flag.startswith("archive: "))
    if (state, reason) != ("ready" if processed else "complete", None):
        yield f"the batch is {state}: {reason}"
    if case.lenient:
        if FIRST not in processed or not (broken or LAST in processed):
            yield f"{processed} are processed, and nothing is said"
        return
    if processed != case.processed:
        yield f"{processed} are processed, and not {case.processed}"
    if (case.flag or "") not in broken or bool(broken) != (case.flag is not None):
        yield f"it is flagged with {broken!r}, and not with {case.flag!r}"
    for name, why in case.dead.items():  # a name that is too long is cut
        found = name if name in dead else next((member for member in dead if member.startswith(name)), "")
        if why not in dead.pop(found, "it is not dead") or not found:
            yield f"{name} is not dead for {why!r}"
    if dead:
        yield f"dead are also {dead}"


def assert_only_opus_lies_there(world: World) -> None:
    """On scratch, for each recording that is processed; and nothing else is left anywhere below."""
    root = world.scratch("h1")
    folders = {path for path in root.iterdir() if path.name not in (".id", ".locks")}
    assert all(re.fullmatch(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", folder.name) for folder in folders)
    files = [path for folder in folders for path in folder.iterdir()]
    kept = sorted(row.item for row in world.rows("SELECT item FROM audio_files WHERE state = 'pending'"))
    assert sorted(path.stem for path in files) == kept
    assert {path.suffix for path in files} == {".opus"}


def outside(world: World, names: set[str]) -> Iterator[str]:
    """What lies where the names in the corpus would lead a reader that believes them."""
    around = [world.scratch("h1"), Path.cwd()]
    places = {Path(place) for place in ("/etc/cron.d", "/tmp", *around, *(p for one in around for p in one.parents))}
    for place in places:
        with suppress(OSError):
            yield from (f"{place} {path.name}" for path in place.iterdir() if path.name in names)
