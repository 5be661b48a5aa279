"""A worker that fails on everything blames no recording; a recording on which a healthy one fails is set aside."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from lab_audio import ledger, metrics, s3_utils, scratch
from lab_audio.config import GpuSettings, UnpackSettings
from lab_audio.contracts import Classification, Result, Transcript
from lab_audio.errors import Fatal, Permanent, Retryable
from lab_audio.media import reader, transcode
from lab_audio.workers import gpu_worker, recognition, unpack_worker
from lab_audio.workers.host import open_host, open_inbox
from lab_audio.workers.loop import Stop, exit_code
from lab_audio.workers.recognition import Models

from models import POLICIES
from world import (
    MODELS,
    POISON,
    Idle,
    World,
    fake_classify,
    fake_decode,
    fake_encode,
    fake_transcribe,
    windows,
    world_client,
)

PROGRAM = Path(sys.executable).with_name("lab-audio")
NAMES = [f"{n}.mp3" for n in range(12)]
SICK, HUNG = 70, 1


def gpu_process(
    world: World, models: Models = MODELS, *, patch: Callable[[], None] = lambda: None, **settings: str
) -> int | None:
    """Run a GPU process until nothing is left for it; its exit code."""

    def process() -> None:
        sys.stderr = (world.directory / "gpu.log").open("a")
        transcode.decode = windows(fake_decode)
        gpu_worker.IDLE_SECONDS = 0
        patch()
        stop = Idle(world_client(world), "h1")
        sys.exit(exit_code(lambda: gpu_worker.work_slot(world.load(GpuSettings, **settings), lambda: models, stop)))

    child = multiprocessing.get_context("fork").Process(target=process)
    child.start()
    child.join(60)
    assert child.exitcode is not None, child.kill()
    return child.exitcode


def said(world: World) -> str:
    return (world.directory / "gpu.log").read_text()


def unpacked(world: World, names: Sequence[str] = NAMES) -> World:
    """A batch of recordings that is ready for the models."""
    world.plant_batch(1, names)
    world.run("unpack")
    return world


def failing_on(error: Exception, *names: str) -> Callable[[bytes], Transcript]:
    def transcribe(samples: bytes) -> Transcript:
        if samples.decode() in names:
            raise error
        return fake_transcribe(samples)

    return transcribe


class Sickens:
    """A function that works a few times, then fails on everything."""

    def __init__(self, act: Callable[[Any], Any], error: Exception, after: int) -> None:
        self.act, self.error, self.left = act, error, after

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.act(*arguments, **options)


def states(world: World) -> dict[str, tuple[str, int]]:
    return {m: (s, a) for m, s, a in world.rows("SELECT member, state, attempts FROM audio_files")}


def nothing_is_blamed(world: World) -> bool:
    """No attempt is counted but those that gave a result, which is entered, or lies on scratch to be sent."""
    blamed = []
    for state, attempts, batch_id, item in world.rows("SELECT state, attempts, batch_id, item FROM audio_files"):
        result = state == "done" or (world.scratch("h1") / batch_id / f"{item}.json").exists()
        if state == "dead" or attempts != result:
            blamed.append(item)
    return not blamed


def pending_jobs_are_on_the_list(world: World) -> bool:
    jobs = world.client.lrange("transcribe:h1", 0, -1)
    pending = {item for (item,) in world.rows("SELECT item FROM audio_files WHERE state = 'pending'")}
    return {Path(unpack_path(job)).stem for job in jobs} == pending and len(jobs) == len(pending)


def unpack_path(job: str) -> str:
    return gpu_worker.parse_transcribe_job(job).opus_path


def all_is_done_by_the_next_process(world: World) -> bool:
    assert gpu_process(world) == 0
    world.run("unpack")
    return world.snags() == [] and set(states(world).values()) == {("done", 1)}


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (RuntimeError("odd"), 0),
        (RuntimeError("odd"), 1),
        (RuntimeError("odd"), 6),
        (Permanent("too long"), 1),
        (Fatal("CUDA is gone"), 6),
    ],
)
def test_a_sick_transcriber_ends_its_process_and_blames_nothing(world: World, error: Exception, after: int) -> None:
    """The first call is the canary's; the process is sick from the start, or after some recordings."""
    unpacked(world)
    assert gpu_process(world, Models(Sickens(fake_transcribe, error, after), fake_classify), CLASSIFY_BATCH="2") == SICK
    assert str(error) in said(world)
    assert nothing_is_blamed(world)
    assert pending_jobs_are_on_the_list(world)
    assert all_is_done_by_the_next_process(world)


@pytest.mark.parametrize("after", [1, 3])
def test_a_sick_classifier_ends_its_process_and_blames_nothing(world: World, after: int) -> None:
    unpacked(world)
    models = Models(fake_transcribe, Sickens(fake_classify, RuntimeError("odd"), after))
    assert gpu_process(world, models, CLASSIFY_BATCH="3") == SICK
    assert nothing_is_blamed(world)
    assert pending_jobs_are_on_the_list(world)
    assert all_is_done_by_the_next_process(world)


@pytest.mark.parametrize("after", [0, 5])
def test_a_broken_ffmpeg_ends_its_process_and_blames_nothing(world: World, after: int) -> None:
    unpacked(world)

    def broken() -> None:
        transcode.decode = windows(Sickens(fake_decode, Permanent("ffmpeg: Invalid data"), after))

    assert gpu_process(world, patch=broken) == SICK
    assert "ffmpeg is broken" in said(world)
    assert nothing_is_blamed(world)
    assert all_is_done_by_the_next_process(world)


def test_what_came_through_after_a_failure_does_not_count_if_the_canary_fails(world: World) -> None:
    unpacked(world)
    failed: list[bytes] = []

    def transcribe(samples: bytes) -> Transcript:
        if failed and samples == b"canary":
            raise RuntimeError("odd")
        if not failed and samples == b"1.mp3":
            failed.append(samples)
            raise RuntimeError("odd")
        return Transcript("garbage", "en", [], True, "fake") if failed else fake_transcribe(samples)

    assert gpu_process(world, Models(transcribe, fake_classify)) == SICK
    assert all_is_done_by_the_next_process(world)
    assert world.rows("SELECT count(*) FROM transcripts WHERE text = 'garbage'") == [(0,)]


def deaf(samples: bytes) -> Transcript:
    return Transcript("", "en", [], False, "fake")


def undecided(texts: Sequence[str]) -> list[list[Classification]]:
    return [[Classification("p", "0" * 64, "complies", float("nan"), "fake", "fake", [])] for _ in texts]


@pytest.mark.parametrize(
    "models", [Models(deaf, fake_classify), Models(fake_transcribe, undecided), Models(fake_transcribe, lambda _: [[]])]
)
def test_models_that_answer_nonsense_claim_nothing_and_are_not_said_to_be_ready(world: World, models: Models) -> None:
    unpacked(world)
    jobs = world.client.lrange("transcribe:h1", 0, -1)
    world.sql("UPDATE hosts SET gpu_seen_at = NULL")
    assert gpu_process(world, models) == SICK
    assert "this worker is sick" in said(world)
    assert world.client.lrange("transcribe:h1", 0, -1) == jobs
    assert world.rows("SELECT gpu_seen_at FROM hosts WHERE host = 'h1'") == [(None,)]
    assert nothing_is_blamed(world)


def test_a_worker_whose_libraries_cannot_be_imported_ends(world: World) -> None:
    """Another process would do no better."""
    for path in ("models/whisperx/model.bin", "models/gemma/base/config.json", "models/gemma/cope/adapter_config.json"):
        (world.directory / path).parent.mkdir(parents=True)
        (world.directory / path).write_text("{}")
    broken = world.directory / "broken"
    broken.mkdir()
    (broken / "whisperx.py").write_text("raise ImportError('libcudnn is not here')")
    env = {
        **os.environ,
        "LAB_HOST": "h1",
        "SCRATCH_ROOT": str(world.scratch("h1")),
        "MODELS_ROOT": str(world.directory / "models"),
        "POLICIES_DIR": str(POLICIES),
        "DEVICES": "cpu",
        "ALLOW_UNSANDBOXED": "true",
        "PYTHONPATH": f"{broken}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [str(PROGRAM), "gpu-worker"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == SICK, done.stderr
    assert "the models' libraries cannot be imported (libcudnn is not here)" in done.stderr
    assert "GPU process died" not in done.stderr


def test_bad_recordings_in_a_row_are_all_set_aside_by_a_healthy_worker(world: World) -> None:
    unpacked(world)
    assert gpu_process(world, Models(failing_on(Permanent("too long"), *NAMES[:6]), fake_classify)) == 0
    assert {name: states(world)[name] for name in NAMES[:6]} == dict.fromkeys(NAMES[:6], ("dead", 1))
    assert {name: states(world)[name] for name in NAMES[6:]} == dict.fromkeys(NAMES[6:], ("done", 1))
    assert set(world.rows("SELECT host, reason FROM audio_files WHERE state = 'dead'")) == {("h1", "too long")}


def test_unknown_errors_in_a_row_are_tried_again_by_a_healthy_worker_and_set_aside(world: World) -> None:
    unpacked(world)
    models = Models(failing_on(ValueError("odd\0"), *NAMES[:4]), fake_classify)
    assert gpu_process(world, models, MAX_ATTEMPTS="2") == 0
    assert {name: states(world)[name] for name in NAMES[:4]} == dict.fromkeys(NAMES[:4], ("dead", 2))
    assert {name: states(world)[name] for name in NAMES[4:]} == dict.fromkeys(NAMES[4:], ("done", 1))


def test_what_a_healthy_ffmpeg_cannot_decode_is_set_aside_and_says_where(world: World) -> None:
    unpacked(world)
    bad = set(world.rows("SELECT item FROM audio_files WHERE member IN ('3.mp3', '4.mp3')"))

    def refusing() -> None:
        def decode(opus: Path) -> bytes:
            if (opus.stem,) in bad:
                raise Permanent("ffmpeg: Invalid data")
            return fake_decode(opus)

        transcode.decode = windows(decode)

    assert gpu_process(world, patch=refusing) == 0
    dead = world.rows("SELECT member, attempts, host, reason FROM audio_files WHERE state = 'dead' ORDER BY member")
    assert dead == [(name, 0, "h1", "ffmpeg: Invalid data") for name in ("3.mp3", "4.mp3")]
    assert set(states(world).values()) == {("dead", 0), ("done", 1)}


@pytest.mark.parametrize("error", [RuntimeError("wrong shape\0"), Fatal("device-side assert\0")])
@pytest.mark.parametrize("in_classifier", [False, True])
def test_a_recording_that_sickens_its_worker_ends_as_the_only_dead_one(
    world: World, error: Exception, in_classifier: bool
) -> None:
    """Its first failure counts for nothing, as the worker may have been sick: from then on it goes alone."""
    unpacked(world, NAMES[:5])
    models = sickening("2.mp3", error)
    models = Models(fake_transcribe, models.classify) if in_classifier else Models(models.transcribe, fake_classify)
    for _ in range(20):
        if (ended := gpu_process(world, models, MAX_ATTEMPTS="2", CLASSIFY_BATCH="4")) == 0:
            break
        assert ended == SICK
    assert states(world) == {**dict.fromkeys(NAMES[:5], ("done", 1)), "2.mp3": ("dead", 2)}
    assert "its worker turned sick" in world.rows("SELECT reason FROM audio_files WHERE state = 'dead'")[0][0]


def sickening(name: str, error: Exception) -> Models:
    """Models that fail on everything from one recording on, in a process that hears it."""
    sick: list[bool] = []

    def hear(text: str) -> None:
        if sick or text == name:
            sick.append(True)
            raise error

    def transcribe(samples: bytes) -> Transcript:
        hear(samples.decode())
        return fake_transcribe(samples)

    def classify(texts: Sequence[str]) -> list[list[Classification]]:
        for text in texts:
            hear(text)
        return fake_classify(texts)

    return Models(transcribe, classify)


def hang() -> None:
    """In C code that never gives Python a turn."""
    ctypes.PyDLL(None).sleep(600)


def hanging_on(name: str, times: int, directory: Path) -> Callable[[bytes], Transcript]:
    """A transcriber that hangs so often, over all processes."""

    def transcribe(samples: bytes) -> Transcript:
        marks = len(list(directory.glob("hung.*")))
        if samples.decode() == name and marks < times:
            (directory / f"hung.{marks}").touch()
            hang()
        return fake_transcribe(samples)

    return transcribe


def with_short_patience() -> None:
    recognition.HANG_SECONDS = 1.0


def test_a_hang_ends_the_process_and_its_recording_is_tried_again_alone(world: World) -> None:
    unpacked(world)
    models = Models(hanging_on("1.mp3", 1, world.directory), fake_classify)
    assert gpu_process(world, models, patch=with_short_patience, CLASSIFY_BATCH="3") == HUNG
    assert "Timeout" in said(world)
    assert "in hang" in said(world)
    assert gpu_process(world, models, patch=with_short_patience, CLASSIFY_BATCH="3") == 0
    world.run("unpack")
    assert world.snags() == []
    assert states(world)["1.mp3"] == ("done", 2)
    assert max(attempts for _, attempts in states(world).values()) == 2


def test_a_recording_on_which_the_models_always_hang_is_set_aside(world: World) -> None:
    unpacked(world, NAMES[:3])
    models = Models(hanging_on("1.mp3", 99, world.directory), fake_classify)
    codes = [gpu_process(world, models, patch=with_short_patience, MAX_ATTEMPTS="2") for _ in range(3)]
    assert codes == [HUNG, HUNG, 0]
    assert states(world)["1.mp3"] == ("dead", 2)
    assert {states(world)[name][0] for name in ("0.mp3", "2.mp3")} == {"done"}


def test_models_that_hang_on_the_canary_claim_nothing(world: World) -> None:
    unpacked(world)
    models = Models(hanging_on("canary", 99, world.directory), fake_classify)
    assert gpu_process(world, models, patch=with_short_patience) == HUNG
    assert set(states(world).values()) == {("pending", 0)}


@pytest.mark.parametrize(("seconds_of_sound", "code"), [(0, HUNG), (600, 0)])
def test_a_long_recording_may_take_long(
    monkeypatch: pytest.MonkeyPatch, seconds_of_sound: int, code: int, tmp_path: Path
) -> None:
    monkeypatch.setattr(recognition, "HANG_SECONDS", 0.2)

    def work() -> None:
        sys.stderr = (tmp_path / "log").open("w")
        with recognition.watchdog(seconds_of_sound * transcode.SAMPLE_RATE):
            time.sleep(1)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == code


def test_a_full_scratch_costs_nothing_but_the_copy_of_results(world: World) -> None:
    unpacked(world)

    def full() -> None:
        def write(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        scratch.write_atomic = write

    assert gpu_process(world, patch=full, CLASSIFY_BATCH="2") == 0
    world.run("unpack")
    assert world.snags() == []
    assert set(states(world).values()) == {("done", 1)}


@pytest.fixture
def slot(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A slot in this process, with a batch that is ready for it."""
    monkeypatch.setattr(transcode, "decode", windows(fake_decode))
    unpacked(world, NAMES[:3])
    settings, stop = world.load(GpuSettings), Stop()
    here = open_host(settings, stop)
    held, inbox = open_inbox(here, "gpu")
    yield gpu_worker.Slot(here, inbox, MODELS, settings, stop)
    held.release()


def test_an_attempt_counts_once_though_the_answer_was_lost(
    world: World, slot: gpu_worker.Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, lost = ledger.begin, []

    def beginning(*arguments: Any) -> int | None:
        answer = begin(*arguments)
        if len(lost) < 2:
            lost.append(answer)
            raise Retryable("the connection was cut after the commit")
        return answer

    monkeypatch.setattr(ledger, "begin", beginning)
    slot.stop = Idle(world_client(world), "h1")
    slot.run()
    assert lost == [1, 1]
    assert set(states(world).values()) == {("done", 1)}


def test_attempts_are_counted_from_what_was_known_and_noted_with_the_host(world: World) -> None:
    unpacked(world, ["a.mp3"])
    ((audio_id,),) = world.rows("SELECT audio_id FROM audio_files")
    assert [ledger.begin(world.engine, audio_id, "h1", known) for known in (0, 0, 1, 0, 1)] == [1, 1, 2, None, 2]
    assert world.rows("SELECT attempts, host FROM audio_files") == [(2, "h1")]
    for _ in range(2):
        ledger.hand_back(world.engine, audio_id, "h2", 1, "it is another's")
        ledger.hand_back(world.engine, audio_id, "h1", 1, "it rained")
        assert world.rows("SELECT attempts, reason FROM audio_files") == [(1, "it rained")]


def test_what_goes_wrong_at_the_very_end_is_handed_back(
    world: World, slot: gpu_worker.Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that cannot be entered when the worker is leaving: there is no time for the canary."""
    finish, shutdown, leaving = ledger.finish, slot.uploaders.shutdown, threading.Event()

    def finishing(engine: Any, audio_id: int, key: str, result: Result) -> Any:
        if result.transcript.text == "1.mp3":
            slot.stop.event.set()
            assert leaving.wait(60)
            raise ValueError("odd")
        return finish(engine, audio_id, key, result)

    def leave(**options: Any) -> None:
        leaving.set()
        shutdown(**options)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "finish", finishing)
        patch.setattr(slot.uploaders, "shutdown", leave)
        slot.run()
    assert states(world)["1.mp3"] == ("pending", 0)
    assert nothing_is_blamed(world)
    assert pending_jobs_are_on_the_list(world)
    assert all_is_done_by_the_next_process(world)


def unpack_here(world: World) -> None:
    stop = Stop()
    here = open_host(world.load(UnpackSettings), stop)
    ledger.beat(here.engine, "h1", gpu=True)
    held, inbox = open_inbox(here, "unpack")
    try:
        job = inbox.claim(0)
        assert job is not None
        unpack_worker.handle(here, inbox, job, unpack_worker.Encoding(24_000, 1), stop)
    finally:
        held.release()


def test_an_archive_whose_reader_is_killed_is_read_again_and_given_up_in_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.plant_batch(1, NAMES)
    read, kills = reader.read, [2]

    def killed(stream: Any, size: int, *, compressed: bool) -> Iterator[Any]:
        for number, member in enumerate(read(stream, size, compressed=compressed)):
            if number == 2 and kills[0]:
                kills[0] -= 1
                raise reader.Killed("what reads the archive was killed (SIGKILL)")
            yield member

    monkeypatch.setattr(reader, "read", killed)
    monkeypatch.setattr(transcode, "encode", fake_encode)
    for _ in range(3):
        unpack_here(world)
    assert world.rows("SELECT state, flags FROM batches") == [("ready", [])]
    assert set(states(world).values()) == {("pending", 0)} and len(states(world)) == len(NAMES)
    kills[0] = 99
    world.plant_batch(2, NAMES)
    for _ in range(5):
        unpack_here(world)
    ((state, reason),) = world.rows("SELECT state, reason FROM batches WHERE batch_id LIKE '%2'")
    assert (state, reason) == ("failed", "RuntimeError: what reads the archive was killed (SIGKILL)")


@pytest.mark.parametrize(
    ("error", "after"), [(Permanent("ffmpeg: Unknown encoder"), 0), (transcode.Unfinished("ffmpeg was killed"), 5)]
)
def test_a_broken_ffmpeg_seals_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int
) -> None:
    world.plant_batch(1, NAMES)
    monkeypatch.setattr(unpack_worker, "FFMPEG_PAUSES", (0, 0))
    monkeypatch.setattr(transcode, "encode", Sickens(fake_encode, error, after))
    with pytest.raises(Fatal, match="ffmpeg is broken on this host"):
        unpack_here(world)
    assert world.rows("SELECT state FROM batches") == [("unpacking",)]
    assert states(world) == {}
    world.finish()
    assert world.snags() == []


def test_a_healthy_ffmpeg_sets_aside_what_it_cannot_encode(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.plant_batch(1, NAMES)

    def encode(mp3: Any, opus: Path, **options: Any) -> transcode.Encoded:
        if mp3.read() in (b"3.mp3", b"4.mp3"):
            raise Permanent("ffmpeg: Invalid data")
        mp3.seek(0)
        return fake_encode(mp3, opus, **options)

    monkeypatch.setattr(transcode, "encode", encode)
    unpack_here(world)
    dead = dict(world.rows("SELECT member, reason FROM audio_files WHERE state = 'dead'"))
    assert dead == dict.fromkeys(("3.mp3", "4.mp3"), "ffmpeg: Invalid data")
    (folder,) = world.scratch("h1").glob("2*")
    assert {path.suffix for path in folder.iterdir()} == {".opus"}
    assert len(list(folder.iterdir())) == len(NAMES) - 2


def test_a_recording_counts_once_it_is_entered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that this host loses while it is unpacked, and gets again."""
    batch_id = world.plant_batch(1, [*NAMES[:2], "notes.txt"])
    losing = [batch_id]

    def encode(mp3: Any, opus: Path, **options: Any) -> transcode.Encoded:
        if losing:
            ledger.give_back(world.engine, losing.pop(), "h1")
        return fake_encode(mp3, opus, **options)

    def counted() -> list[float | None]:
        outcomes = ({"outcome": outcome} for outcome in ("encoded", "dead"))
        return [metrics.WORKER.get_sample_value("lab_audio_recordings_total", labels) or 0 for labels in outcomes]

    monkeypatch.setattr(transcode, "encode", encode)
    for outcome in ("encoded", "dead"):
        metrics.RECORDINGS.labels(outcome).reset()
    with capture_logs() as logs:
        unpack_here(world)
        assert (counted(), states(world)) == ([0, 0], {})
        world.client.rpush("unpack", world.job(batch_id, 3))
        unpack_here(world)
    assert counted() == [2, 1]
    told = [entry for entry in logs if entry["event"] in ("recording encoded", "recording set aside")]
    assert [entry["member"] for entry in told if "reason" in entry] == ["notes.txt"]
    assert all(entry["duration"] >= 0 for entry in told) and {entry["attempt"] for entry in told} == {1, 2}


def test_an_ffmpeg_that_did_not_end_by_itself_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or out of time on a disk that stood still: that may have been the host."""
    world.plant_batch(1, NAMES[:2])
    calls: list[Path] = []

    def encode(mp3: Any, opus: Path, **options: Any) -> transcode.Encoded:
        calls.append(opus)
        if len(calls) < 3:
            raise transcode.Unfinished("ffmpeg was not done with it in 60 seconds")
        return fake_encode(mp3, opus, **options)

    monkeypatch.setattr(transcode, "encode", encode)
    monkeypatch.setattr(unpack_worker, "FFMPEG_PAUSES", (0, 0))
    unpack_here(world)
    assert set(states(world).values()) == {("pending", 0)}


def unfinished_on(name: str, times: int, world: World) -> Callable[[], None]:
    """An ffmpeg that does not end with one recording, so often, over all processes."""

    def patch() -> None:
        def decode(opus: Path) -> bytes:
            samples = fake_decode(opus)
            marks = len(list(world.directory.glob("unfinished.*")))
            if samples == name.encode() and marks < times:
                (world.directory / f"unfinished.{marks}").touch()
                raise transcode.Unfinished("ffmpeg was killed")
            return samples

        transcode.decode = windows(decode)

    return patch


def test_a_recording_whose_decoding_did_not_end_is_tried_alone(world: World) -> None:
    unpacked(world)
    patch = unfinished_on("3.mp3", 1, world)
    assert gpu_process(world, patch=patch) == SICK
    assert nothing_is_blamed(world)
    assert pending_jobs_are_on_the_list(world)
    assert "is this host short of memory" in said(world)
    assert gpu_process(world, patch=patch) == 0
    assert set(states(world).values()) == {("done", 1)}


def test_a_recording_whose_decoding_never_ends_is_the_only_one_set_aside(world: World) -> None:
    unpacked(world)
    patch = unfinished_on("3.mp3", 99, world)
    codes = [gpu_process(world, patch=patch, MAX_ATTEMPTS="2") for _ in range(4)]
    assert codes == [SICK] * 3 + [0]
    assert states(world) == {**dict.fromkeys(NAMES, ("done", 1)), "3.mp3": ("dead", 2)}
    ((reason,),) = world.rows("SELECT reason FROM audio_files WHERE state = 'dead'")
    assert reason == "given up after 2 attempts: its worker turned sick: ffmpeg was killed"


def three_windows() -> None:
    def decode(opus: Path, **options: Any) -> Iterator[bytes]:
        if fake_decode(opus) != b"3.mp3":
            yield fake_decode(opus)
            return
        yield from (b"one", b"two", b"three")

    transcode.decode = decode


def test_a_long_recording_is_heard_window_by_window(world: World) -> None:
    unpacked(world)
    assert gpu_process(world, patch=three_windows) == 0
    assert set(states(world).values()) == {("done", 1)}
    ((text, segments),) = world.rows(
        "SELECT text, segments FROM transcripts JOIN audio_files USING (audio_id) WHERE member = '3.mp3'"
    )
    assert text == "one two three"
    assert [segment["text"] for segment in segments] == ["one", "two", "three"]
    starts = [segment["start"] for segment in segments]
    assert starts == [0, round(3 / transcode.SAMPLE_RATE, 3), round(6 / transcode.SAMPLE_RATE, 3)]


def test_one_that_is_asked_to_stop_does_not_wait_for_the_rest_of_a_long_recording(world: World) -> None:
    unpacked(world, ["3.mp3"])

    def transcribe(samples: bytes) -> Transcript:
        if samples == b"one":
            os.kill(os.getpid(), signal.SIGTERM)
        assert samples != b"two"
        return fake_transcribe(samples)

    assert gpu_process(world, Models(transcribe, fake_classify), patch=three_windows) == 0
    assert nothing_is_blamed(world)
    assert pending_jobs_are_on_the_list(world)
    assert gpu_process(world, patch=three_windows) == 0
    assert set(states(world).values()) == {("done", 1)}


def test_what_cannot_be_decoded_in_the_middle_is_the_only_one_set_aside(world: World) -> None:
    unpacked(world)

    def patch() -> None:
        def decode(opus: Path, **options: Any) -> Iterator[bytes]:
            yield fake_decode(opus)
            if fake_decode(opus) == b"3.mp3":
                raise Permanent("ffmpeg: Invalid data")

        transcode.decode = decode

    assert gpu_process(world, patch=patch) == 0
    assert states(world) == {**dict.fromkeys(NAMES, ("done", 1)), "3.mp3": ("dead", 1)}


def killing_as_it_is_decoded() -> None:
    def decode(opus: Path) -> bytes:
        samples = fake_decode(opus)
        if samples.startswith(POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        return samples

    transcode.decode = windows(decode)


def test_beside_a_recording_that_was_tried_none_is_decoded(world: World) -> None:
    """Else those that come after it could kill its process, and it would be blamed each time."""
    unpacked(world, ["0.mp3", "poison a.mp3", "poison b.mp3", "poison c.mp3"])
    jobs = world.client.lrange("transcribe:h1", 0, -1)
    late = [world.client.rpop("transcribe:h1") for _ in jobs[2:]]
    while gpu_process(world, patch=killing_as_it_is_decoded, MAX_ATTEMPTS="2") != 0:
        if late:
            world.client.rpush("transcribe:h1", late.pop())
    assert states(world)["0.mp3"] in (("done", 1), ("done", 2)), "at the first kill it may have been in hand"


def test_a_recording_that_kills_its_process_as_it_is_decoded_is_the_only_one_set_aside(world: World) -> None:
    unpacked(world, [*NAMES[:3], "poison.mp3"])

    codes = [gpu_process(world, patch=killing_as_it_is_decoded, MAX_ATTEMPTS="2", DECODE_THREADS="4") for _ in range(4)]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    assert states(world).pop("poison.mp3") == ("dead", 2)
    # At the first kill others may have been in hand; after it each is alone.
    assert all(state == "done" and attempts <= 2 for name, (state, attempts) in states(world).items() if name in NAMES)
    ((reason,),) = world.rows("SELECT reason FROM audio_files WHERE state = 'dead'")
    assert reason == "given up after 2 attempts: its worker died while it was in hand"


def test_a_result_that_is_only_in_memory_is_no_attempt_where_the_store_refuses_it(world: World) -> None:
    """Scratch is full, and so is the store."""
    unpacked(world)

    def patch() -> None:
        def full(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def refused(*arguments: Any, **options: Any) -> str:
            raise Fatal("PutObject: 403 EntityTooLarge; see whether a quota of the store is used up")

        scratch.write_atomic, s3_utils.upload_opus = full, refused

    for _ in range(3):
        assert gpu_process(world, patch=patch, CLASSIFY_BATCH="3") == SICK
        assert nothing_is_blamed(world)
        assert pending_jobs_are_on_the_list(world)
    assert all_is_done_by_the_next_process(world)


def test_an_opus_that_vanishes_before_it_is_sent_is_no_attempt(world: World) -> None:
    unpacked(world, NAMES[:2])

    def classify(texts: Sequence[str]) -> list[list[Classification]]:
        if texts != ["canary"]:
            shutil.rmtree(world.scratch("h1") / world.BATCH(1), ignore_errors=True)
        return fake_classify(texts)

    assert gpu_process(world, Models(fake_transcribe, classify)) == 0
    assert set(states(world).values()) == {("pending", 0)}
    assert world.rows("SELECT state, host FROM batches") == [("uploaded", None)]
    world.finish()
    assert world.snags() == []
    assert set(states(world).values()) == {("done", 1)}
