"""Two at once: the second is held in the middle of the first, until the first's transaction ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event

from lab_audio import ledger, queues, scratch
from lab_audio.config import GpuSettings, UnpackSettings
from lab_audio.contracts import Result, item_of
from lab_audio.ledger import Archive, NewItem, Refused, Taken
from lab_audio.workers.host import Host, tidy_batch

from world import ROOM, World, eventually, fake_classify, fake_transcribe, register

ARCHIVE = Archive("0" * 64, 1, 2)


def in_the_middle(
    world: World, engine: Engine, statement: str, first: Callable[[], Any], second: Callable[[], Any]
) -> list[Any]:
    """Begin `second` in a thread when `first` is about to execute a statement, and go on once it waits for a lock or is
    through. Returns what both returned."""
    answers: list[Any] = [None, None]
    threads: list[threading.Thread] = []

    def run_second() -> None:
        answers[1] = second()

    def before(_c: Any, _k: Any, sql: str, *_: Any) -> None:
        if sql.startswith(statement) and not threads:
            threads.append(threading.Thread(target=run_second))
            threads[0].start()
            eventually(lambda: waiting(world) or not threads[0].is_alive())

    event.listen(engine, "before_cursor_execute", before)
    answers[0] = first()
    assert threads, f"never came to {statement}"
    threads[0].join()
    return answers


def waiting(world: World) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return world.rows(query)[0][0] > 0


def engine(world: World) -> Engine:
    return ledger.open_ledger(world.load(UnpackSettings))


def ready_batch(world: World, names: list[str]) -> tuple[str, list[int]]:
    """A sealed batch of host h1, and its audio_ids."""
    batch_id = world.plant_batch(1, names)
    register(world.engine, "h1", "disk")
    ledger.beat(world.engine, "h1", gpu=True)
    ledger.adopt(world.engine, batch_id, world.job(batch_id, len(names)), ARCHIVE)
    assert isinstance(ledger.take(world.engine, batch_id, "h1", ROOM), Taken)
    items = [NewItem(name, item_of(name), name, 1.0) for name in names]
    assert ledger.seal(world.engine, batch_id, "h1", items, ARCHIVE, []) == "ready"
    return batch_id, [row[0] for row in world.rows("SELECT audio_id FROM audio_files ORDER BY audio_id")]


def result(text: str) -> Result:
    return Result(fake_transcribe(text.encode()), fake_classify([text])[0])


def test_one_of_two_hosts_takes_a_batch(world: World) -> None:
    batch_id = world.plant_batch(1, ["a.mp3"])
    ledger.adopt(world.engine, batch_id, "{}", ARCHIVE)
    for host in ("h1", "h2"):
        register(world.engine, host, host)
        ledger.beat(world.engine, host, gpu=True)
    mine, other = engine(world), engine(world)
    answers = in_the_middle(
        world,
        mine,
        "UPDATE batches",
        lambda: ledger.take(mine, batch_id, "h1", ROOM),
        lambda: ledger.take(other, batch_id, "h2", ROOM),
    )
    assert [type(answer) for answer in answers] == [Taken, Refused]
    assert world.rows("SELECT host FROM batches") == [("h1",)]


def test_two_unpack_workers_of_a_host_do_not_give_away_the_same_room(world: World) -> None:
    register(world.engine, "h1", "disk")
    ledger.beat(world.engine, "h1", gpu=True)
    first, second = world.plant_batch(1, ["a.mp3"]), world.plant_batch(2, ["b.mp3"])
    for batch_id in (first, second):
        ledger.adopt(world.engine, batch_id, world.job(batch_id, 1), Archive(None, 10_000_000, 1))
    room = 50_000_000  # each batch is given nearly half of it; for the second, other data has taken a third since
    mine, other = engine(world), engine(world)
    answers = in_the_middle(
        world,
        mine,
        "UPDATE batches",
        lambda: ledger.take(mine, first, "h1", room),
        lambda: ledger.take(other, second, "h1", room // 3 * 2),
    )
    assert [type(answer) for answer in answers] == [Taken, Refused]


def test_the_last_two_items_finished_at_once_complete_the_batch(world: World) -> None:
    _, (a, b) = ready_batch(world, ["a.mp3", "b.mp3"])
    mine, other = engine(world), engine(world)
    answers = in_the_middle(
        world,
        mine,
        "SELECT max(state)",
        lambda: ledger.finish(mine, a, "processed/x/1.opus", result("a")),
        lambda: ledger.finish(other, b, "processed/x/2.opus", result("b")),
    )
    assert [answer.processed for answer in answers] == [1, 2]
    assert world.rows("SELECT state FROM batches") == [("complete",)]


def test_an_item_finished_twice_at_once_has_one_set_of_rows(world: World) -> None:
    _, (a, _) = ready_batch(world, ["a.mp3", "b.mp3"])
    mine, other = engine(world), engine(world)
    answers = in_the_middle(
        world,
        mine,
        "INSERT INTO transcripts",
        lambda: ledger.finish(mine, a, "processed/x/1.opus", result("a")),
        lambda: ledger.finish(other, a, "processed/x/1.opus", result("a")),
    )
    assert [answer.changed for answer in answers] == [True, False]
    assert len(world.rows("SELECT 1 FROM transcripts")) == len(world.rows("SELECT 1 FROM classifications")) == 1


def test_an_item_finished_and_buried_at_once_is_one_of_them(world: World) -> None:
    _, (a, _) = ready_batch(world, ["a.mp3", "b.mp3"])
    mine, other = engine(world), engine(world)
    answers = in_the_middle(
        world,
        mine,
        "SELECT max(state)",
        lambda: ledger.bury(mine, a, "h1", "bad"),
        lambda: ledger.finish(other, a, "processed/x/1.opus", result("a")),
    )
    assert [(answer.state, answer.changed) for answer in answers] == [("dead", True), ("dead", False)]
    assert world.rows("SELECT 1 FROM transcripts") == []


def test_a_batch_that_is_finished_while_it_is_published_leaves_no_keys(world: World) -> None:
    batch_id, (a, b) = ready_batch(world, ["a.mp3", "b.mp3"])
    settings = world.load(GpuSettings)
    scratch.prepare(settings.scratch_root)
    here = Host("h1", settings.scratch_root, engine(world), world.client, world.bucket)
    ledger.finish(world.engine, a, "processed/x/1.opus", result("a"))

    def finish_and_tidy() -> None:
        ledger.finish(here.engine, b, "processed/x/2.opus", result("b"))
        tidy_batch(here, batch_id)

    last = threading.Thread(target=finish_and_tidy)
    with ledger.publishing(world.engine, batch_id, "h1") as batch:
        assert batch is not None
        last.start()
        eventually(lambda: waiting(world) or not last.is_alive())
        queues.publish(world.client, "h1", batch_id, batch.total, batch.processed, ["job"])
    last.join()
    assert world.client.keys("batch:*") == []
    assert world.rows("SELECT state, host FROM batches") == [("complete", None)]


def test_two_mints_at_once_take_each_file_once(world: World) -> None:
    from lab_audio.contracts import SourceFile

    files = [SourceFile(f"{n}.mp3", 1, n) for n in range(4)]
    mine, other = engine(world), engine(world)
    minted = []
    for one in (mine, other):
        minted.append(ledger.mint(one, "s", files, most_files=3, most_bytes=10**9))
    assert [[file.path for file in mint.files] for mint in minted] == [["0.mp3", "1.mp3", "2.mp3"], ["3.mp3"]]
    assert ledger.mint(mine, "s", files, most_files=3, most_bytes=10**9) is None


def test_one_worker_holds_a_source(world: World) -> None:
    with ledger.lock_source(world.engine, "s") as mine, ledger.lock_source(world.engine, "s") as other:
        assert mine is not None
        assert other is None
        with ledger.lock_source(world.engine, "t") as elsewhere:
            assert elsewhere is not None
    with ledger.lock_source(world.engine, "s") as again:
        assert again is not None
