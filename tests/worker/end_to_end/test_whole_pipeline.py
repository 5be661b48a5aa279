"""One host, all workers: recordings go the whole way, from a source directory and from another S3 client."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import corpus
from lab import Host, Lab, Program, wait_for

FILES = [
    "garden.mp3",
    "field notes/Café Zürich.mp3",
    "calls/tuesday/Second Call.MP3",
    "calls/monday/call.mp3",
    "calls/tuesday/call.mp3",
]
# As the reference prints it, spaces and all.
BATCH = "20250622-143052-a1b2c3"
PAYLOAD = b"""{
    "batch_id": "20250622-143052-a1b2c3",
    "s3_key": "archives/20250622-143052-a1b2c3.tar",
    "file_count": 847,
    "transferred_at": "2025-06-22T14:30:52Z"
}"""
FOREIGN = {
    "a/river.mp3": "field notes/river.mp3",
    "b/train.mp3": "archive/2024/winter/train.mp3",
    "kitchen.mp3": "kitchen.mp3",
}


class Workers(NamedTuple):
    host: Host
    gpu: Program
    unpack: Program
    transfer: Program


@pytest.fixture(scope="module")
def workers(lab: Lab) -> Iterator[Workers]:
    """All workers, as services run them; five recordings of the corpus lie at the source."""
    for name in FILES:
        path = lab.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(corpus.SOUNDS / name, path)
    host = lab.host("h1")
    gpu, unpack = lab.start(host, "gpu-worker"), lab.start(host, "unpack-worker")
    transfer = lab.start(host, "transfer-worker")
    yield Workers(host, gpu, unpack, transfer)


@pytest.fixture(scope="module")
def transferred(lab: Lab, workers: Workers) -> None:
    lab.wait_ended(1, *workers[1:])
    lab.account(len(FILES), workers.host)


@pytest.fixture(scope="module")
def pushed(lab: Lab, workers: Workers, transferred: None) -> None:
    """An archive and a job by programs that know nothing of this one."""
    lab.put_archive(BATCH, {name: (corpus.SOUNDS / of).read_bytes() for name, of in FOREIGN.items()})
    url = urlsplit(lab.env["REDIS_URL"])
    with socket.create_connection((url.hostname, url.port)) as wire:

        def ask(*words: bytes) -> bytes:
            wire.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words))
            return wire.recv(100)

        assert ask(b"AUTH", (url.password or "").encode()) == b"+OK\r\n"
        assert ask(b"SELECT", url.path.strip("/").encode()) == b"+OK\r\n"
        assert ask(b"RPUSH", b"unpack", PAYLOAD).startswith(b":")
    lab.wait_ended(2, *workers[1:])


def test_five_recordings_come_through_once(lab: Lab, transferred: None) -> None:
    assert [row[0] for row in lab.rows('SELECT member FROM audio_files ORDER BY member COLLATE "C"')][:5] == sorted(
        FILES
    )
    names = dict(lab.rows("SELECT member, original_filename FROM audio_files"))
    assert {name: names[name] for name in FILES} == {name: Path(name).name for name in FILES}


def test_what_was_said_is_heard(lab: Lab, transferred: None) -> None:
    heard = dict(lab.rows("SELECT member, text FROM audio_files JOIN transcripts USING (audio_id)"))
    truth = corpus.true_texts()
    assert corpus.word_error_rate((truth[name], heard[name]) for name in FILES) <= 0.20
    assert lab.rows("SELECT DISTINCT language, speech FROM transcripts") == [("en", True)]
    for policy, digest, label, score in lab.rows("SELECT policy, policy_sha256, label, score FROM classifications"):
        text = Path(lab.settings["POLICIES_DIR"], f"{policy}.txt").read_bytes()
        assert digest == hashlib.sha256(text).hexdigest()
        assert 0 <= score <= 1
        assert label == ("violates" if score >= 0.5 else "complies")


def test_each_object_says_what_it_is(lab: Lab, transferred: None) -> None:
    found = lab.rows(
        "SELECT s3_opus_path, audio_id, date::text, batch_id, member FROM audio_files WHERE member = ANY(%s)", FILES
    )
    assert len(found) == len(FILES)
    for key, audio_id, date, batch_id, member in found:
        assert key == f"processed/{date}/{audio_id}.opus"
        stored = lab.s3.get_object(Bucket=lab.bucket, Key=key)
        body, metadata = stored["Body"].read(), stored["Metadata"]
        assert body.startswith(b"OggS") and b"OpusHead" in body[:64]
        assert metadata["batch_id"] == batch_id
        assert unquote(metadata["member"]) == member
        assert metadata["member-sha1"] == hashlib.sha1(member.encode()).hexdigest()
        assert metadata["sha256"] == hashlib.sha256(body).hexdigest()


def test_status_tells_hosts_queues_and_no_open_batch(lab: Lab, workers: Workers, transferred: None) -> None:
    view = json.loads(lab.run(workers.host, "status", "--json"))
    assert view["batches"] == []
    (host,) = view["hosts"]
    assert (host["host"], host["paused"]) == ("h1", False)
    assert host["silent_seconds"] < 60 and host["gpu_silent_seconds"] < 60
    assert view["queues"] == {"unpack": 0, "transcribe": 0, "dead": 0}
    assert view["oldest_seconds"] == dict.fromkeys(view["queues"])


def test_an_archive_of_another_client_is_processed_and_flagged(lab: Lab, workers: Workers, pushed: None) -> None:
    state, flags, job, size, digest = lab.rows(
        "SELECT state, flags, job, size, sha256 FROM batches WHERE batch_id = %s", BATCH
    )[0]
    assert state == "complete"
    assert len(flags) == 1 and re.search(r"file_count.*847.*\b3\b", flags[0])
    assert job.encode() == PAYLOAD
    body = lab.s3.get_object(Bucket=lab.bucket, Key=f"archives/{BATCH}.tar")["Body"].read()
    assert (size, digest) == (len(body), hashlib.sha256(body).hexdigest())
    heard = dict(
        lab.rows("SELECT member, text FROM audio_files JOIN transcripts USING (audio_id) WHERE batch_id = %s", BATCH)
    )
    truth = corpus.true_texts()
    assert corpus.word_error_rate((truth[of], heard[name]) for name, of in FOREIGN.items()) <= 0.20
    lab.account(len(FILES) + len(FOREIGN), workers.host)


def test_a_new_file_is_taken_and_what_is_known_is_not(lab: Lab, workers: Workers, pushed: None) -> None:
    shutil.copyfile(corpus.SOUNDS / "library.mp3", lab.source / "library.mp3")
    lab.wait_ended(3, *workers[1:])
    lab.account(len(FILES) + len(FOREIGN) + 1, workers.host)
    assert sorted(corpus.recordings(lab.source)) == sorted([*FILES, "library.mp3"])


def test_sigterm_ends_each_worker_with_0_and_leaves_no_process(lab: Lab, workers: Workers, pushed: None) -> None:
    children = workers.gpu.children()
    assert len(children) == 1
    for program in workers[1:]:
        assert program.terminate() == 0, program.tail()
        assert "Traceback" not in program.log.read_text()
    wait_for("the GPU process to end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10)
    assert list((workers.host.directory / "tmp" / "transfer").rglob("*")) == []
