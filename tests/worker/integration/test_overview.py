"""What metrics, check-health and status ask of the ledger costs no more for what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from lab_audio import ledger
from lab_audio.config import LedgerSettings, load

OLD = "20250101-000000-000001"
QUESTIONS: dict[str, Callable[[Engine], object]] = {
    "open batches": ledger.open_batches,
    "dead letters": ledger.count_dead,
    "archives that are needed": lambda engine: ledger.unsettled_archives(engine, 6),
    "archives that should be gone": lambda engine: ledger.expired_archives(engine, 7),
    "how long jobs wait": lambda engine: ledger.waiting_seconds(engine, [OLD]),
}


@pytest.fixture
def engine(env: dict[str, str]) -> Iterator[Engine]:
    opened = ledger.open_ledger(load(LedgerSettings))
    ledger.migrate(opened)
    yield opened
    opened.dispose()


def sql(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def fill(engine: Engine) -> None:
    """Many finished batches, one in ten with a flag that does no harm."""
    sql(
        engine,
        "INSERT INTO batches (batch_id, state, uploaded_at, complete_at, flags) SELECT '20250101-000000-'"
        " || lpad(to_hex(n), 6, '0'), 'complete', now() - interval '1 day', now(), CASE WHEN n % 10 = 0"
        " THEN ARRAY['file_count: x'] ELSE '{}' END FROM generate_series(1, 20000) n",
        "INSERT INTO audio_files (batch_id, member, item, state) SELECT batch_id, 'a.mp3', '0', 'done' FROM batches",
        "ANALYZE batches",
        "ANALYZE audio_files",
    )


def test_no_question_reads_what_is_finished(engine: Engine) -> None:
    fill(engine)
    for name, ask in QUESTIONS.items():
        asked: list[tuple[str, Any]] = []

        def note(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any, to: list[Any] = asked) -> None:
            to.append((statement, values))

        event.listen(engine, "before_cursor_execute", note)
        ask(engine)
        event.remove(engine, "before_cursor_execute", note)
        assert asked
        for statement, values in asked:
            with engine.begin() as connection:
                plan = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", values)]
            assert not [line for line in plan if "Seq Scan on" in line], "\n".join([name, *plan])


def test_archives_that_are_needed_are_those_of_open_failed_and_partly_dead_batches(engine: Engine) -> None:
    states = ["uploaded", "unpacking", "ready", "failed", "failed", *["complete"] * 3, "uploaded", "complete"]
    for number, state in enumerate(states):
        sql(
            engine,
            f"INSERT INTO batches (batch_id, state, uploaded_at) VALUES ('20250101-00000{number}-000000', '{state}',"
            f" now() - interval '10 days' + interval '{number} minutes')",
        )
    sql(
        engine,
        "UPDATE batches SET dropped_at = now() WHERE batch_id LIKE '%4-000000'",
        "INSERT INTO audio_files (batch_id, member, item, state) SELECT batch_id, 'a.mp3', '0', 'dead' FROM batches"
        " WHERE batch_id LIKE '%5-000000' OR batch_id LIKE '%6-000000'",
        "UPDATE audio_files SET dropped_at = now() WHERE batch_id LIKE '%6-000000'",
        "UPDATE batches SET uploaded_at = now() WHERE batch_id LIKE '%8-000000'",
        "UPDATE batches SET flags = ARRAY['archive: cut short'] WHERE batch_id LIKE '%9-000000'",
    )
    assert [batch_id[14] for batch_id in ledger.unsettled_archives(engine, 6)] == ["0", "1", "2", "3", "5", "9"]
