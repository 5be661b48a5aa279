"""Jobs that are wrong end in `dead` or as a failed batch, touch nothing else, and do not stop the workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine

from lab_audio import ledger, queues
from lab_audio.config import LedgerSettings
from lab_audio.contracts import item_of
from lab_audio.ledger import Archive, NewItem
from lab_audio.media import transcode

import corpus
from lab import Host, Lab, Program, wait_for

OTHER = "20260101-000000-00000a"  # whole: its archive is stored, its recordings are done
HELD = "20260101-000000-00000b"  # open on this host, with one recording to do
NOWHERE = "20260101-000000-00000c"  # nobody has it
SPEECH = corpus.SOUNDS / "calls/tuesday/Second Call.MP3"
MEMBER = "second call.mp3"
ITEM = item_of(MEMBER)


class Bench(NamedTuple):
    lab: Lab
    host: Host
    engine: Engine
    programs: tuple[Program, Program]
    outside: Path

    def push(self, name: str, payload: bytes | str) -> None:
        self.lab.redis.rpush(name, payload)

    def wait_dead(self, *payloads: bytes) -> None:
        """Until `dead` holds these and no list holds anything else; then empties it."""

        def there() -> bool:
            for program in self.programs:
                program.check_running()
            return sorted(self.lab.redis.lrange("dead", 0, -1)) == sorted(payloads)

        try:
            wait_for("the payload in dead", there, 30)
            wait_for(
                "all other lists to be empty", lambda: list(self.lab.redis.scan_iter(_type="list")) == [b"dead"], 30
            )
        except AssertionError as error:
            state = {key: self.lab.redis.lrange(key, 0, -1) for key in self.lab.redis.scan_iter(_type="list")}
            tails = "\n".join(program.tail()[-1500:] for program in self.programs)
            raise AssertionError(f"{error}; lists: {state}\n{tails}") from None
        finally:
            self.lab.redis.delete("dead")

    def everything(self) -> dict[str, Any]:
        """All that a bad job might touch."""
        tables = ("batches", "audio_files", "transcripts", "classifications", "source_files")
        roots = (self.outside, self.host.scratch)
        files = [path for root in roots for path in sorted(root.rglob("*")) if ".locks" not in path.parts]
        return {
            "objects": self.lab.objects(),
            "files": {path: path.read_bytes() if path.is_file() else None for path in files},
            **{table: sorted(map(repr, self.lab.rows(f"SELECT * FROM {table}"))) for table in tables},
        }

    def do_a_good_job(self, batch_id: str) -> None:
        """A batch that comes next is done as ever."""
        key = self.lab.put_archive(batch_id, {"good.mp3": SPEECH.read_bytes()})
        self.push("unpack", unpack_job(batch_id, s3_key=key))

        def done() -> bool:
            for program in self.programs:
                program.check_running()
            found = self.lab.rows("SELECT state, host FROM batches WHERE batch_id = %s", batch_id)
            return found == [("complete", None)]

        wait_for("the next good job", done, 60)
        assert self.lab.rows("SELECT state FROM audio_files WHERE batch_id = %s", batch_id) == [("done",)]


def unpack_job(batch_id: str, **changes: Any) -> bytes:
    job = {
        "batch_id": batch_id,
        "s3_key": f"archives/{batch_id}.tar",
        "file_count": 1,
        "transferred_at": "2026-01-01T00:00:00Z",
    }
    return json.dumps({**job, **changes}).encode()


def transcribe_job(batch_id: str, opus_path: object, name: str = MEMBER) -> bytes:
    return json.dumps({"batch_id": batch_id, "opus_path": str(opus_path), "original_filename": name}).encode()


@pytest.fixture(scope="module")
def bench(lab: Lab) -> Iterator[Bench]:
    """A host at work: one batch of it is done and one is open; beside it lie files that are none of its business."""
    host = lab.host("h1")
    programs = (lab.start(host, "gpu-worker"), lab.start(host, "unpack-worker"))
    lab.wait_ready(host, *programs)
    engine = ledger.open_ledger(LedgerSettings(database_url=lab.env["DATABASE_URL"]))
    outside = lab.directory / "outside"
    bench = Bench(lab, host, engine, programs, outside)
    bench.do_a_good_job(OTHER)

    # The open batch: taken, sealed and published by the workers' own functions, but for its one job.
    lab.put_archive(HELD, {MEMBER: SPEECH.read_bytes()})
    ledger.adopt(engine, HELD, unpack_job(HELD).decode(), Archive(None, None, 1))
    assert isinstance(ledger.take(engine, HELD, host.name, 1 << 30), ledger.Taken)
    folder = host.scratch / HELD
    folder.mkdir()
    with SPEECH.open("rb") as mp3:
        seconds = transcode.encode(mp3, folder / f"{ITEM}.opus", bitrate=24_000).seconds
    sealed = [NewItem(MEMBER, ITEM, MEMBER, seconds)]
    assert ledger.seal(engine, HELD, host.name, sealed, Archive(None, None, 1), []) == "ready"
    queues.publish(lab.redis, host.name, HELD, 1, 0, [])

    for batch_id in (HELD, OTHER, NOWHERE):
        stray = outside / batch_id / f"{ITEM}.opus"
        stray.parent.mkdir(parents=True)
        stray.write_bytes((folder / f"{ITEM}.opus").read_bytes())
    lab.s3.put_object(Bucket=lab.bucket, Key="secrets.tar", Body=b"not for you")
    yield bench
    engine.dispose()


BAD_UNPACK_JOBS = {
    "empty": b"",
    "not-json": b"hello",
    "half-json": b'{"batch_id": "',
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "empty-object": b"{}",
    "binary": bytes(range(256)),
    "not-utf8-in-json": unpack_job(NOWHERE).replace(b"2026-01-01T", b"\xff\xfe"),
    "nul-bytes": b"\0" * 16,
    "oversized": unpack_job(OTHER, extra="x" * 70_000),
    "key-of-another-batch": unpack_job(NOWHERE, s3_key=f"archives/{OTHER}.tar"),
    "key-climbs-out": unpack_job(NOWHERE, s3_key="archives/../secrets.tar"),
    "batch-climbs-out": unpack_job("../secrets", s3_key="archives/../secrets.tar"),
    "batch-climbs-in-scratch": unpack_job(f"../outside/{OTHER}"),
    "batch-with-newline": unpack_job(OTHER + "\n"),
    "count-negative": unpack_job(NOWHERE, file_count=-1),
    "count-is-text": unpack_job(NOWHERE, file_count="1"),
    "no-such-archive": unpack_job(NOWHERE),
}


@pytest.mark.parametrize("payload", BAD_UNPACK_JOBS.values(), ids=BAD_UNPACK_JOBS)
def test_a_bad_unpack_job_ends_in_dead_as_it_came(bench: Bench, payload: bytes) -> None:
    before = bench.everything()
    bench.push("unpack", payload)
    bench.wait_dead(payload)
    assert bench.everything() == before


def wrong_paths(bench: Bench) -> dict[str, bytes]:
    scratch = bench.host.scratch
    return {
        "another batch's folder": transcribe_job(HELD, scratch / OTHER / f"{ITEM}.opus"),
        "another batch": transcribe_job(OTHER, scratch / HELD / f"{ITEM}.opus"),
        "outside scratch": transcribe_job(HELD, bench.outside / HELD / f"{ITEM}.opus"),
        "climbs out": transcribe_job(HELD, f"{scratch}/../../outside/{HELD}/{ITEM}.opus"),
        "climbs out of the batch": transcribe_job(HELD, f"{scratch}/{HELD}/../{OTHER}/{ITEM}.opus"),
        "the same by a detour": transcribe_job(HELD, f"{scratch}/{OTHER}/../{HELD}/{ITEM}.opus"),
        "not absolute": transcribe_job(HELD, f"{HELD}/{ITEM}.opus"),
        "not an opus": transcribe_job(HELD, f"{scratch}/{HELD}/{ITEM}.json"),
        "unknown item": transcribe_job(HELD, f"{scratch}/{HELD}/{'0' * 16}.opus"),
        "unknown batch": transcribe_job(NOWHERE, f"{scratch}/{NOWHERE}/{ITEM}.opus"),
        "bad batch": transcribe_job("..", f"{scratch}/../{ITEM}.opus"),
        "NUL in the path": transcribe_job(HELD, f"{scratch}/{HELD}/\0/{HELD}/{ITEM}.opus"),
        "not JSON": b"hello",
        "not an object": b"[]",
        "binary": bytes(range(256)),
        "oversized": transcribe_job(HELD, f"{scratch}/{HELD}/{ITEM}.opus", "x" * 70_000),
    }


@pytest.mark.parametrize("name", ["transcribe:h1", "transcribe"])
def test_bad_transcribe_jobs_end_in_dead_as_they_came(bench: Bench, name: str) -> None:
    before = bench.everything()
    for why, payload in wrong_paths(bench).items():
        bench.push(name, payload)
        try:
            bench.wait_dead(payload)
        except AssertionError as error:
            raise AssertionError(f"{why}: {error}") from None
        assert bench.everything() == before, why


def failed(bench: Bench, batch_id: str) -> str:
    """The reason for which a batch failed, once its host has let go of it."""

    def ended() -> Any:
        for program in bench.programs:
            program.check_running()
        return bench.lab.rows(
            "SELECT reason FROM batches WHERE batch_id = %s AND state = 'failed' AND host IS NULL", batch_id
        )

    reason: str = wait_for("the batch to fail", ended, 30)[0][0]
    assert not (bench.host.scratch / batch_id).exists()
    assert bench.lab.rows("SELECT FROM audio_files WHERE batch_id = %s", batch_id) == []
    assert list(bench.lab.redis.scan_iter(f"batch:{batch_id}:*")) == []
    return reason


def without(batch_id: str, everything: dict[str, Any]) -> dict[str, Any]:
    return {**everything, "batches": [row for row in everything["batches"] if batch_id not in row]}


def test_a_known_batch_whose_archive_is_gone_fails(bench: Bench) -> None:
    batch_id = "20260101-000000-0000d1"
    job = unpack_job(batch_id)
    ledger.adopt(bench.engine, batch_id, job.decode(), Archive(None, None, 1))
    before = bench.everything()
    bench.push("unpack", job)
    assert "archive missing" in failed(bench, batch_id)
    assert without(batch_id, bench.everything()) == without(batch_id, before)


def test_an_archive_that_is_not_the_one_uploaded_fails(bench: Bench) -> None:
    batch_id, promised = "20260101-000000-0000d2", "0" * 64
    key = bench.lab.put_archive(batch_id, {"call.mp3": SPEECH.read_bytes()}, sha256=promised)
    before = bench.everything()
    bench.push("unpack", unpack_job(batch_id))
    reason = failed(bench, batch_id)
    found = hashlib.sha256(bench.lab.s3.get_object(Bucket=bench.lab.bucket, Key=key)["Body"].read()).hexdigest()
    assert promised in reason and found in reason
    assert without(batch_id, bench.everything()) == without(batch_id, before)


def test_the_workers_go_on_with_the_next_good_jobs(bench: Bench) -> None:
    """Bad jobs lie before a good one in each list; the recording that they named is done in the end."""
    bad_paths = list(wrong_paths(bench).values())
    bad_archives = list(BAD_UNPACK_JOBS.values())
    bench.lab.redis.rpush("transcribe:h1", *bad_paths)
    bench.push("transcribe:h1", transcribe_job(HELD, bench.host.scratch / HELD / f"{ITEM}.opus"))
    bench.lab.redis.rpush("unpack", *bad_archives)
    bench.do_a_good_job("20260101-000000-0000e1")
    wait_for(
        "the open batch",
        lambda: bench.lab.rows("SELECT state, host FROM batches WHERE batch_id = %s", HELD) == [("complete", None)],
        60,
    )
    key, audio_id, text = bench.lab.rows(
        "SELECT s3_opus_path, audio_id, text FROM audio_files JOIN transcripts USING (audio_id) WHERE batch_id = %s",
        HELD,
    )[0]
    assert corpus.word_error_rate([(corpus.true_texts()["calls/tuesday/Second Call.MP3"], text)]) <= 0.20
    assert key.endswith(f"/{audio_id}.opus") and key in bench.lab.objects("processed/")
    bench.wait_dead(*bad_paths, *bad_archives)
    bench.lab.redis_is_empty()
    bench.lab.scratch_is_empty(bench.host)
    for program in bench.programs:
        assert program.terminate() == 0, program.tail()
        assert "Traceback" not in program.log.read_text()
