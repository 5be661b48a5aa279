"""`lab-audio migrate` on a fresh database, and on older ones with rows in them as the older system left them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from lab_audio import ledger
from lab_audio.config import LedgerSettings, load
from lab_audio.contracts import Classification, Result, Transcript, item_of
from lab_audio.errors import Fatal
from lab_audio.ledger import Archive, NewItem

PROGRAM = Path(sys.executable).with_name("lab-audio")
BATCH = "20260101-000000-abcdef"


@dataclass(frozen=True)
class Older:
    """An older database: how it calls the keys of its tables, and what else is in its audio_files."""

    key: str = "id"
    foreign: str = "audio_id"
    columns: str = ""
    values: str = ""

    def statements(self) -> list[str]:
        return [
            f"CREATE TABLE audio_files ({self.key} serial PRIMARY KEY, original_filename text NOT NULL,"
            f" opus_path text NOT NULL, file_size bigint NOT NULL{self.columns})",
            f"CREATE TABLE transcripts (id serial PRIMARY KEY,"
            f" {self.foreign} integer NOT NULL REFERENCES audio_files({self.key}), text text NOT NULL)",
            f"CREATE TABLE classifications (id serial PRIMARY KEY,"
            f" {self.foreign} integer NOT NULL REFERENCES audio_files({self.key}), label text NOT NULL, score real)",
            # The same name twice: the older system kept them so.
            *(
                f"INSERT INTO audio_files VALUES (DEFAULT, '{name}', '/mnt/shared/{place}.opus', {place}{self.values})"
                for place, name in enumerate(["call.mp3", "call.mp3", "garden.mp3"], 1)
            ),
            f"INSERT INTO transcripts ({self.foreign}, text) VALUES (1, 'one'), (2, 'two'), (2, 'two again')",
            f"INSERT INTO classifications ({self.foreign}, label, score)"
            " VALUES (1, 'violates', 0.75), (2, 'complies', NULL), (2, 'complies', 0.25)",
        ]


OLDER = {
    "as the reference implies": Older(),
    "key called audio_id": Older(key="audio_id"),
    "foreign keys called audio_file_id": Older(foreign="audio_file_id"),
    "with s3_opus_path": Older(columns=", s3_opus_path text", values=", 'processed/old.opus'"),
    "with a date and a state of its own kind": Older(
        columns=", created_at timestamp NOT NULL DEFAULT now(), duration real, UNIQUE (opus_path)", values=""
    ),
}


@pytest.fixture
def database(env: dict[str, str]) -> Iterator[Any]:
    """Of this test alone; statements commit at once."""
    with contextlib.closing(psycopg2.connect(env["DATABASE_URL"])) as connection:
        connection.autocommit = True
        yield connection


@pytest.fixture(params=OLDER.values(), ids=OLDER)
def older(request: pytest.FixtureRequest, database: Any) -> Older:
    for statement in request.param.statements():
        rows(database, statement)
    return request.param


def rows(database: Any, query: str) -> list[tuple[Any, ...]]:
    with database.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall() if cursor.description else []


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(PROGRAM), *argv], env={**os.environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def migrate() -> str:
    process = start("migrate")
    said, complained = process.communicate(timeout=60)
    assert (process.returncode, complained) == (0, ""), complained
    return said


def shape(database: Any) -> list[Any]:
    """Every column, index and constraint, and every row."""
    found: list[Any] = rows(
        database,
        "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
        " WHERE table_schema = 'public' ORDER BY 1, 2",
    )
    found += rows(database, "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1")
    found += rows(
        database,
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2",
    )
    for table in ("audio_files", "transcripts", "classifications", "batches", "hosts", "source_files"):
        found.append((table, sorted(map(repr, rows(database, f"SELECT * FROM {table}")))))
    return found


def use(database: Any) -> None:
    """Bring two recordings through the ledger, one with the name of an older one, as the workers do."""
    engine = ledger.open_ledger(load(LedgerSettings))
    try:
        ledger.check_migrated(engine)
        with ledger.registering(engine, "h1", "disk", Path("/data/scratch")):
            pass
        ledger.beat(engine, "h1", gpu=True)
        ledger.adopt(engine, BATCH, "{}", Archive(None, 10, 2))
        taken = ledger.take(engine, BATCH, "h1", 1 << 30)
        assert isinstance(taken, ledger.Taken)
        assert (taken.archive, taken.settled, taken.attempts) == (Archive(None, 10, 2), frozenset(), 1)
        members = ["a/call.mp3", "b/call.mp3"]
        items = [NewItem(member, item_of(member), "call.mp3", 1.5) for member in members]
        assert ledger.seal(engine, BATCH, "h1", items, Archive("0" * 64, 10, 2), []) == "ready"
        verdicts = [
            Classification(policy, "0" * 64, "complies", 0.25, "gemma", "cope-a", [0.25]) for policy in ("p", "q")
        ]
        for place, member in enumerate(members, 1):
            item = ledger.find_item(engine, BATCH, item_of(member))
            assert item is not None and item.state == "pending"
            assert ledger.begin(engine, item.audio_id, "h1", 0) == 1
            result = Result(Transcript("hello", "en", [], True, "whisper"), verdicts)
            settled = ledger.finish(engine, item.audio_id, f"processed/{item.date}/{item.audio_id}.opus", result)
            assert settled == ledger.Settled("done", place, 2, True)
        assert ledger.find_batch(engine, BATCH) == ledger.Batch(BATCH, "complete", "h1", None)
        assert [(b.done, b.pending, b.dead) for b in ledger.open_batches(engine)] == [(2, 0, 0)]
        ledger.release(engine, BATCH, "h1")
        assert ledger.open_batches(engine) == []
    finally:
        engine.dispose()
    assert rows(
        database,
        "SELECT member, original_filename, state, s3_opus_path = 'processed/' || date || '/' || audio_id || '.opus',"
        " (SELECT count(*) FROM transcripts t WHERE t.audio_id = a.audio_id),"
        " (SELECT count(*) FROM classifications c WHERE c.audio_id = a.audio_id)"
        f" FROM audio_files a WHERE batch_id = '{BATCH}' ORDER BY member",
    ) == [(member, "call.mp3", "done", True, 1, 2) for member in members]


def test_a_fresh_database_is_ready_for_work(database: Any) -> None:
    assert "was not there" in migrate()
    use(database)


def test_an_older_database_keeps_every_row_and_goes_on(database: Any, older: Older) -> None:
    before = {
        table: rows(database, f"SELECT * FROM {table} ORDER BY 1")
        for table in ("audio_files", "transcripts", "classifications")
    }
    migrate()
    for table, kept in before.items():
        now = rows(database, f"SELECT * FROM {table} ORDER BY 1")
        assert [row[: len(kept[0])] for row in now] == kept, table
    assert rows(database, "SELECT state, count(*) FROM audio_files GROUP BY state") == [("done", 3)]
    assert rows(
        database,
        "SELECT a.audio_id, opus_path, string_agg(text, ', ' ORDER BY text) FROM audio_files a"
        " JOIN transcripts t USING (audio_id) GROUP BY 1, 2 ORDER BY 1",
    ) == [(1, "/mnt/shared/1.opus", "one"), (2, "/mnt/shared/2.opus", "two, two again")]
    use(database)
    assert rows(database, "SELECT state, count(*) FROM audio_files GROUP BY state") == [("done", 5)]
    assert rows(database, "SELECT array_agg(audio_id ORDER BY audio_id) FROM audio_files") == [([1, 2, 3, 4, 5],)]


def test_older_rows_never_look_like_work(database: Any, older: Older) -> None:
    migrate()
    engine = ledger.open_ledger(load(LedgerSettings))
    try:
        with ledger.registering(engine, "h1", "disk", Path("/data/scratch")):
            pass
        assert ledger.open_batches(engine) == []
        assert ledger.held_batches(engine, "h1") == set()
        assert [ledger.begin(engine, audio_id, "h1", 0) for audio_id in (1, 2, 3)] == [None] * 3
    finally:
        engine.dispose()


def test_a_second_migrate_changes_nothing(database: Any, older: Older) -> None:
    migrate()
    use(database)
    before = shape(database)
    assert "was" not in migrate()
    assert shape(database) == before


def test_migrates_at_once_do_no_harm(database: Any) -> None:
    for statement in Older().statements():
        rows(database, statement)
    racing = [start("migrate") for _ in range(3)]
    said = [process.communicate(timeout=60) for process in racing]
    assert [process.returncode for process in racing] == [0, 0, 0], said
    assert sum("was not there" in out for out, _ in said) == 1
    use(database)
    assert rows(database, "SELECT state, count(*) FROM audio_files GROUP BY state") == [("done", 5)]


def test_a_migration_that_cannot_be_done_leaves_the_database_as_it_was(database: Any) -> None:
    """An audio_files without a primary key: nothing tells its rows apart."""
    rows(database, "CREATE TABLE audio_files (original_filename text NOT NULL, opus_path text NOT NULL)")
    rows(database, "INSERT INTO audio_files VALUES ('call.mp3', '/mnt/shared/1.opus')")
    process = start("migrate")
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 70, complained
    (line,) = complained.splitlines()
    assert line.startswith("lab-audio: ") and "primary key" in line
    assert rows(database, "SELECT * FROM audio_files") == [("call.mp3", "/mnt/shared/1.opus")]
    assert rows(database, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'") == [
        ("audio_files",)
    ]


def test_tables_of_a_newer_release_are_worked_on_and_left_as_they_are(database: Any) -> None:
    """Hosts are upgraded one after the other, and may go back."""
    migrate()
    rows(database, "UPDATE alembic_version SET version_num = '9999'")
    before = shape(database)
    said = migrate()
    assert said.startswith("ledger at revision 9999, newer than this release's") and "was" not in said
    assert shape(database) == before
    use(database)


def test_tables_of_an_older_release_are_refused(database: Any) -> None:
    migrate()
    rows(database, "UPDATE alembic_version SET version_num = '0001'")
    engine = ledger.open_ledger(load(LedgerSettings))
    with pytest.raises(Fatal, match="`lab-audio migrate`"):
        ledger.check_migrated(engine)
    engine.dispose()


@pytest.mark.parametrize("worker", ["transfer-worker", "unpack-worker", "gpu-worker"])
@pytest.mark.parametrize("tables", ["none", "older"])
def test_a_worker_says_that_the_database_is_not_migrated(
    worker: str, tables: str, database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tables == "older":
        for statement in Older().statements():
            rows(database, statement)
    monkeypatch.setenv("SOURCE", str(tmp_path))
    monkeypatch.setenv("SCRATCH_ROOT", str(tmp_path / "scratch"))
    monkeypatch.setenv("TRANSFER_TMP", str(tmp_path / "tmp"))
    process = start(worker)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 70, complained
    (line,) = complained.splitlines()
    assert "`lab-audio migrate`" in json.loads(line)["reason"]
    assert list(tmp_path.iterdir()) == []
