"""The corpus through the real unpack worker, ffmpeg and sandbox: each refusal is told, and nothing else suffers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hostile import FIRST, LAST, Case, cases
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
    if problem := sandbox.problem():
        missing(problem)
    corpus = {world.BATCH(number): case for number, case in enumerate(cases())}
    assert len({case.name for case in corpus.values()}) == len(corpus) >= 150
    for batch_id, case in corpus.items():
        world.bucket.client.put_object(Bucket=world.bucket.name, Key=archive_key(batch_id), Body=case.data)
        world.client.rpush("unpack", world.job(batch_id, 0))
    before = set(outside())
    unpack_all(world)
    wrong = [f"{case.name}: {what}" for batch_id, case in corpus.items() for what in wrongs(world, batch_id, case)]
    assert wrong == []
    assert_only_opus_lies_there(world)
    assert set(outside()) == before


def unpack_all(world: World) -> None:
    stop = Stop()
    here = open_host(world.load(UnpackSettings), stop)
    held, inbox = open_inbox(here, "unpack")
    ledger.beat(here.engine, "h1", gpu=True)
    while job := inbox.claim(0):
        assert unpack_worker.handle(here, inbox, job, unpack_worker.Encoding(24_000, 2), stop) is None
        ledger.beat(here.engine, "h1", gpu=True)
    held.release()


def wrongs(world: World, batch_id: str, case: Case) -> Iterator[str]:
    ((state, reason, flags),) = world.rows(f"SELECT state, reason, flags FROM batches WHERE batch_id = '{batch_id}'")
    rows = world.rows(f"SELECT member, state, reason FROM audio_files WHERE batch_id = '{batch_id}'")
    processed = {row.member for row in rows if row.state == "pending"}
    dead = {row.member: row.reason for row in rows if row.state == "dead"}
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


def outside() -> Iterator[str]:
    """What lies where the names in the corpus would lead a reader that believes them."""
    for place in map(Path, ("/", "/etc", "/etc/cron.d", "/tmp", Path.cwd(), Path.cwd().parent)):
        if place.is_dir():
            yield from (str(path) for path in place.iterdir() if path.suffix in (".mp3", ".opus"))
