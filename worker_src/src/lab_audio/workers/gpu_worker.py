"""The GPU worker: one process per GPU under one parent.

In each process recordings are decoded ahead in threads, go through the models one group after the other, and are
uploaded and entered behind them, so that the models do not wait:

    claim -> prepare (threads) -> recognise (models) -> settle (threads)
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lab_audio import ledger, log, metrics, notify, queues, s3_utils, scratch
from lab_audio.config import GpuSettings
from lab_audio.contracts import (
    TRANSCRIBE,
    Result,
    Transcript,
    opus_path,
    processed_key,
    processing_list,
    transcribe_list,
)
from lab_audio.errors import ConfigError, Fatal, LabAudioError, Permanent, Retryable
from lab_audio.jobs import parse_transcribe_job
from lab_audio.ledger import Item
from lab_audio.media import transcode
from lab_audio.models.runtime import MissingLibrary
from lab_audio.workers.host import (
    Host,
    attend,
    beat,
    delete_dead_object,
    drop_stale,
    note_deaths,
    open_host,
    open_inbox,
    return_batch,
    tidy_batch,
)
from lab_audio.workers.loop import Stop, Stopped, exit_code, in_background, patiently, say_last
from lab_audio.workers.recognition import Models, joined, load_models, prove, watchdog

IDLE_SECONDS = 2
WATCH_SECONDS = 1.0
REPORT_SECONDS = 5.0
LOAD_SECONDS = 1800.0
HAND_BACK_SECONDS, HAND_BACK_PAUSE = 10.0, 0.5
STEADY_SECONDS = 600.0
TURNED_SICK = "its worker turned sick"
PR_SET_PDEATHSIG = 1
NO_LIBRARIES = 69
HOPELESS = {ConfigError.exit_code: ConfigError, NO_LIBRARIES: Fatal}  # by a process's exit code: another ends alike
RESULT: TypeAdapter[Result] = TypeAdapter(Result)


@dataclass(eq=False)
class Work:
    """A claimed job on its way through the process: `samples` until the models heard it, then `result` or `failure`.

    A long recording is decoded in `windows`, of which `samples` is the one at hand. `begun`: an attempt was counted
    for it here. `refused`: what failed will fail again.
    """

    job: str
    item: Item
    opus: Path
    begun: bool = False
    windows: Generator[Any, None, None] | None = None
    samples: Any = None
    result: Result | None = None
    failure: str | None = None
    refused: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Any:
        """A logger that names the recording, how often it was begun, and how long it has been here."""
        item = self.item
        return log.get_logger().bind(
            batch_id=item.batch_id,
            item=self.opus.stem,
            audio_id=item.audio_id,
            member=item.member,
            attempt=item.attempts + self.begun,
            duration=round(time.monotonic() - self.since, 3),
        )

    @property
    def result_path(self) -> Path:
        return self.opus.with_suffix(".json")

    @property
    def tried(self) -> bool:
        """Whether something went wrong before, in it or while it was in hand."""
        return self.item.attempts > 0 or self.item.reason is not None

    def is_kept(self) -> bool:
        """Whether its result lies on scratch, where the next process finds it."""
        try:
            return self.result_path.exists()
        except OSError:
            return False

    def forget_sound(self) -> None:
        self.samples = None
        if self.windows is not None:
            self.windows.close()

    def went_wrong(self, error: Exception) -> None:
        """Note what failed, as text: the error itself would keep memory of the models from being used again."""
        self.refused = isinstance(error, Permanent)
        self.failure = plain(str(error) if self.refused else f"{type(error).__name__}: {error}")
        if not self.refused:
            self.log.error("went wrong", exc_info=error)


def plain(text: str) -> str:
    """Text as a reason for the ledger, which takes no NUL and nothing that is not UTF-8; 500 characters at most."""
    return "".join(c if c.isprintable() else " " for c in text[:500])


class Slot:
    """One process's work. `run` returns when asked to stop, with everything finished or handed back.

    ahead     claimed and being prepared
    hand      with the models
    suspects  went wrong: the recording or this worker is bad. Nothing is blamed on it before the canary came through
    behind    results on their way home
    """

    def __init__(self, host: Host, inbox: queues.Inbox, models: Models, settings: GpuSettings, stop: Stop) -> None:
        self.host = host
        self.inbox = inbox
        self.models = models
        self.settings = settings
        self.stop = stop
        self.decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self.uploaders = ThreadPoolExecutor(settings.upload_threads, thread_name_prefix="upload")
        self.ahead: deque[tuple[str, Future[Work | None]]] = deque()
        self.hand: list[Work] = []
        self.suspects: deque[Work] = deque()
        self.behind: deque[tuple[Work, Future[None]]] = deque()
        self.sickness: str | None = None
        self.full = False
        self.accounted = 0.0

    def run(self) -> None:
        try:
            patiently(self.stop, note_deaths, self.host.engine, self.inbox)
            while not self.stop():
                began, self.accounted = time.monotonic(), 0.0
                self._fill()
                self._take_in_hand()
                self._recognise()
                self._judge()
                self._send_results()
                self._reap(4 * self.settings.upload_threads)
                metrics.MODELS.labels("wait").inc(max(0.0, time.monotonic() - began - self.accounted))
        except Stopped:
            pass
        except LabAudioError:
            raise
        except Exception as error:  # unforeseen: what was in hand may have done it
            self.sickness = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._leave()

    def _fill(self) -> None:
        """Claim until enough is being prepared; wait for a job only if nothing is."""
        most = self.settings.classify_batch + self.settings.decode_threads
        while len(self.ahead) < most and not self.stop():
            if self.ahead:
                job = patiently(self.stop, self.inbox.claim, 0)
            else:
                with self._accounting("idle"):
                    job = patiently(self.stop, self.inbox.claim, IDLE_SECONDS)
            if job is None:
                return
            self.ahead.append((job, self.decoders.submit(self._prepare, job)))

    @contextmanager
    def _accounting(self, doing: str) -> Iterator[None]:
        """Count this time for what the process does; what is counted for nothing else is waited."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self.accounted += seconds
            metrics.MODELS.labels(doing).inc(seconds)

    def _prepare(self, job: str) -> Work | None:
        """Find what a job is about, and decode it unless it was tried before. None if nothing is to be done: the job
        is gone from the slot.
        """
        inbox, host = self.inbox, self.host
        try:
            wanted = parse_transcribe_job(job)
            item = patiently(self.stop, ledger.find_item, host.engine, wanted.batch_id, wanted.item)
            if item is None:
                raise Permanent("its batch and item are unknown to the ledger")
            opus = opus_path(host.scratch, wanted.batch_id, wanted.item)
            if item.host == host.name and wanted.opus_path != str(opus):
                raise Permanent(f"opus_path is not {opus}")
        except Permanent as error:
            log.get_logger().error("transcribe job set aside", reason=str(error), job=job[:200])
            patiently(self.stop, inbox.bury, job)
            return None
        work = Work(job, item, opus)
        if item.state != "pending":
            self._ack(work, patiently(self.stop, ledger.count_settled, host.engine, item.audio_id))
            return None
        elsewhere = item.host not in (None, host.name) and wanted.opus_path != str(opus)
        if elsewhere:
            patiently(self.stop, inbox.move, job, transcribe_list(str(item.host)))
            return None
        if item.host != host.name or item.batch_state != "ready":
            patiently(self.stop, drop_stale, host, inbox, job, item.batch_id)
            return None
        try:
            work.result = RESULT.validate_json(work.result_path.read_bytes())
            return work
        except (FileNotFoundError, ValidationError):
            pass
        except OSError as error:
            raise Fatal(f"SCRATCH_ROOT {host.scratch}: {error}") from error
        return work if work.tried or self._decode(work) else None

    def _decode(self, work: Work) -> bool:
        """Decode a window of its Opus, if there is one more, or note what is wrong with it. False if the file is not
        there: the job is gone from the slot.

        Raises Fatal where that may be the host's fault. Then the recording is alone next time, and its attempt counts.
        """
        try:
            work.samples = None
            if work.windows is None:
                longest = None if work.item.seconds is None else 60 + work.item.seconds
                work.windows = transcode.decode(work.opus, timeout=longest or 60, longest=longest)
            with metrics.stage("decode"):
                work.samples = next(work.windows, None)
        except FileNotFoundError:
            self._give_up_scratch(work)
            return False
        except transcode.Unfinished as error:
            if not work.begun:
                note = f"{TURNED_SICK}: {error}"
                patiently(self.stop, ledger.note_error, self.host.engine, work.item.audio_id, note)
            raise Fatal(f"{error}: {work.opus}; is this host short of memory, or its disk slow?") from error
        except OSError as error:
            raise Fatal(f"SCRATCH_ROOT {self.host.scratch}: {error}") from error
        except Fatal:
            raise
        except Exception as error:
            work.went_wrong(error)
        return True

    def _give_up_scratch(self, work: Work) -> None:
        """Return the batch of a recording whose Opus is missing; that is no attempt of its own.

        Raises Fatal if the rest of it cannot be removed.
        """
        known = work.item.attempts if work.begun else work.item.attempts - 1  # an earlier process had begun it
        if work.begun or work.result:
            patiently(self.stop, ledger.hand_back, self.host.engine, work.item.audio_id, self.host.name, known)
        try:
            patiently(self.stop, return_batch, self.host, work.item.batch_id)
        except OSError as error:
            raise Fatal(f"SCRATCH_ROOT {self.host.scratch}: {error}") from error
        patiently(self.stop, drop_stale, self.host, self.inbox, work.job, work.item.batch_id)

    def _take_in_hand(self) -> None:
        """Take what is ready for the models, in order; a recording that was tried before goes alone."""
        while self.ahead and len(self.hand) < self.settings.classify_batch:
            future = self.ahead[0][1]
            if self.hand and not future.done():
                return
            work = future.result()
            if self.hand and work and work.tried and not (work.failure or work.result):
                return
            self.ahead.popleft()
            if work is None:
                continue
            if work.failure:
                self.suspects.append(work)
            elif work.result:
                self._send(work)
            else:
                self.hand.append(work)
                if work.tried:
                    return

    def _recognise(self) -> None:
        """BEGIN each recording in hand and give it to the models; what fails is suspect.

        One that was tried before is alone in the process, so that it blames no other if it kills it; and it is decoded
        only now that its attempt is counted, for that may be what kills it. Results that lie on scratch are uploaded
        meanwhile: they would be sent again, and nobody blamed.
        """
        if self.hand and self.hand[0].tried:
            wait([future for work, future in self.behind if not work.is_kept()])
            self._reap(len(self.behind))
            wait([future for _job, future in self.ahead])
        self.hand = [work for work in self.hand if self._begin(work)]
        with self._noting_sickness():
            self.hand = [work for work in self.hand if work.samples is not None or self._decode(work)]
            self._ask_models()
        self.suspects.extend(work for work in self.hand if work.failure)
        self.hand = [work for work in self.hand if not work.failure]

    def _begin(self, work: Work) -> bool:
        """Count an attempt; one too many buries the recording instead."""
        known, most = work.item.attempts, self.settings.max_attempts
        if known >= most:
            self._bury(work, f"given up after {most} attempts: {work.item.reason or 'its worker died each time'}")
            return False
        work.begun = True
        if patiently(self.stop, ledger.begin, self.host.engine, work.item.audio_id, self.host.name, known) is None:
            patiently(self.stop, drop_stale, self.host, self.inbox, work.job, work.item.batch_id)
            return False
        return True

    def _ask_models(self) -> None:
        """Give each recording in hand its result, or its failure. Raises Fatal if the models are sick."""
        heard = 0
        spoken: list[tuple[Work, Transcript]] = []
        for work in [work for work in self.hand if work.samples is not None]:
            try:
                windows = self._hear(work)
                heard += sum(samples for samples, _transcript in windows)
                transcript = joined(windows)
                if transcript.speech and not work.failure:
                    spoken.append((work, transcript))
                elif not work.failure:
                    work.result = Result(transcript, [])
            except Fatal as error:
                work.failure = str(error)
                raise
            except Stopped:
                raise
            except Exception as error:
                work.went_wrong(error)
            finally:
                work.forget_sound()
        if not spoken:
            return
        try:
            with watchdog(heard), self._accounting("work"), metrics.stage("classify"):
                verdicts = self.models.classify([transcript.text for _work, transcript in spoken])
            for (work, transcript), verdict in zip(spoken, verdicts, strict=True):
                work.result = Result(transcript, verdict)
        except Fatal:
            raise
        except Exception as error:
            for work, _transcript in spoken:
                work.went_wrong(error)

    def _hear(self, work: Work) -> list[tuple[int, Transcript]]:
        """Number of samples and transcript of each window. Raises Stopped if asked to stop with hours to come."""
        windows: list[tuple[int, Transcript]] = []
        while work.samples is not None:
            if windows and self.stop():
                raise Stopped
            with watchdog(len(work.samples)), self._accounting("work"), metrics.stage("transcribe"):
                windows.append((len(work.samples), self.models.transcribe(work.samples)))
            metrics.AUDIO.inc(len(work.samples) / transcode.SAMPLE_RATE)
            self._decode(work)
        return windows

    def _judge(self) -> None:
        """Blame what went wrong on the recordings, once the canary has come through the same ffmpeg and models."""
        proven = len(self.suspects)  # a thread may add others meanwhile
        if proven:
            with self._noting_sickness():
                prove(self.models)
        for _suspect in range(proven):
            self._blame(self.suspects[0])
            self.suspects.popleft()

    def _blame(self, work: Work) -> None:
        """A recording that is refused is set aside; after an unknown error it goes to the list's tail, counted."""
        assert work.failure is not None
        if work.refused:
            self._bury(work, work.failure)
        elif work.begun or self._begin(work):
            patiently(self.stop, ledger.note_error, self.host.engine, work.item.audio_id, work.failure)
            patiently(self.stop, self.inbox.move, work.job, self.inbox.source)
            metrics.RETRIES.labels("models").inc()

    @contextmanager
    def _noting_sickness(self) -> Iterator[None]:
        try:
            yield
        except Fatal as error:
            self.sickness = str(error)
            raise

    def _send_results(self) -> None:
        """Keep the results in hand on scratch and send them off."""
        while self.hand:
            self._keep(self.hand[0])
            self._send(self.hand.pop(0))

    def _keep(self, work: Work) -> None:
        """Write a result to scratch: if this process dies, it is only sent. While that is full, memory must do."""
        assert work.result is not None
        try:
            scratch.write_atomic(work.result_path, json.dumps(asdict(work.result)).encode())
        except FileNotFoundError:
            pass  # the batch was taken away meanwhile; its result counts all the same
        except OSError as error:
            if not scratch.is_full(error):
                raise Fatal(f"SCRATCH_ROOT {self.host.scratch}: {error}") from error
            if not self.full:
                log.get_logger().warning("scratch is full: results are sent from memory", error=str(error))
            self.full = True

    def _send(self, work: Work) -> None:
        self.behind.append((work, self.uploaders.submit(self._settle, work)))

    def _settle(self, work: Work) -> None:
        """Bring a result home. After an unknown error it is forgotten, and the recording is suspect."""
        try:
            self._bring_home(work)
        except (Fatal, Stopped):
            raise
        except Exception as error:
            work.result_path.unlink(missing_ok=True)
            work.went_wrong(error)
            work.refused = False  # a store's word against a recording proves nothing
            self.suspects.append(work)

    def _bring_home(self, work: Work) -> None:
        """Upload the Opus, FINISH, ACK, and tidy if that was the batch's last."""
        item, host = work.item, self.host
        assert work.result is not None
        try:
            with metrics.stage("upload"):
                key = patiently(
                    self.stop,
                    s3_utils.upload_opus,
                    work.opus,
                    item.audio_id,
                    item.date,
                    bucket=host.bucket,
                    batch_id=item.batch_id,
                    member=item.member,
                )
        except FileNotFoundError:
            self._give_up_scratch(work)
            return
        with metrics.stage("enter"):
            settled = patiently(self.stop, ledger.finish, host.engine, item.audio_id, key, work.result)
        if settled.state == "dead":
            patiently(self.stop, delete_dead_object, host.engine, host.bucket, item.audio_id, key)
        self._ack(work, settled)
        metrics.RECORDINGS.labels(settled.state).inc(settled.changed)
        work.log.info("recording done", state=settled.state, seconds=item.seconds)

    def _bury(self, work: Work, reason: str) -> None:
        """BURY an item, then delete an object that an earlier attempt may have put."""
        item, host = work.item, self.host
        settled = patiently(self.stop, ledger.bury, host.engine, item.audio_id, host.name, reason)
        if settled.state == "pending":
            patiently(self.stop, drop_stale, host, self.inbox, work.job, item.batch_id)
            return
        if settled.state == "dead":
            key = processed_key(item.date, item.audio_id)
            patiently(self.stop, delete_dead_object, host.engine, host.bucket, item.audio_id, key)
        self._ack(work, settled)
        metrics.RECORDINGS.labels(settled.state).inc(settled.changed)
        work.log.error("recording set aside", reason=reason)

    def _ack(self, work: Work, settled: ledger.Settled) -> None:
        if patiently(self.stop, self.inbox.ack, work.job, work.item.batch_id, settled.processed):
            patiently(self.stop, tidy_batch, self.host, work.item.batch_id)

    def _reap(self, most: int) -> None:
        """Wait until at most so many uploads are under way. Raises what went wrong in one, which stays `behind`."""
        for sent in [sent for sent in self.behind if sent[1].done()]:
            sent[1].result()
            self.behind.remove(sent)
        while len(self.behind) > most:
            self.behind[0][1].result()
            self.behind.popleft()

    def _leave(self) -> None:
        """Finish uploads; what did not come through goes uncounted back to the head of the list, in order."""
        self.stop.event.set()  # also where an error ends the slot: no thread waits for a store any longer
        self.decoders.shutdown(wait=True, cancel_futures=True)
        # A sick worker ends soon: results that wait for their turn lie on scratch, and the next process sends them.
        self.uploaders.shutdown(wait=True, cancel_futures=self.sickness is not None)
        unsent = [work for work, future in self.behind if future.cancelled() or future.exception()]
        failures = [future.exception() for _work, future in self.behind if not future.cancelled()]
        left = [*self.suspects, *self.hand]
        prepared = [
            job for job, future in self.ahead if future.cancelled() or future.exception() or future.result() is not None
        ]
        self._hand_back([*left, *(work for work in unsent if not work.is_kept())])
        try:
            for job in reversed([*(work.job for work in (*unsent, *left)), *prepared]):
                self.inbox.move(job, self.inbox.source, "head")
        except LabAudioError as error:
            log.get_logger().warning("jobs stay in the slot's list", error=str(error))
        for failure in failures:
            if failure is not None and not isinstance(failure, Stopped):
                raise failure

    def _hand_back(self, left: Sequence[Work]) -> None:
        """Take attempts back. Where the worker turned sick, the first that failed is noted, and goes alone next time.

        If the worker turns sick over it again, then it may be the recording that does it: that attempt stays counted.
        """
        begun = [work for work in left if work.begun]
        suspects = [work for work in begun if work.result is None]
        first = next((work for work in suspects if work.failure), suspects[0] if suspects else None)
        until = time.monotonic() + HAND_BACK_SECONDS
        for work in begun:
            note = plain(f"{TURNED_SICK}: {self.sickness}") if self.sickness and work is first else None
            again = note is not None and (work.item.reason or "").startswith(TURNED_SICK)
            if not again and not self._take_back(work, note, until):
                log.get_logger().warning("attempts stay counted: the ledger is away")
                return

    def _take_back(self, work: Work, note: str | None, until: float) -> bool:
        """Take one attempt back; a ledger that is away is waited for, but not for long."""
        while True:
            try:
                ledger.hand_back(self.host.engine, work.item.audio_id, self.host.name, work.item.attempts, note)
                return True
            except Retryable:
                if time.monotonic() > until:
                    return False
                time.sleep(HAND_BACK_PAUSE)


def work_slot(settings: GpuSettings, models: Callable[[], Models], stop: Stop) -> None:
    """Serve this host's transcribe list in this process until asked to stop. Raises Fatal if the canary fails first."""
    loaded = models()
    prove(loaded)
    stop.on_signals()  # until here SIGTERM just ends the process
    host = open_host(settings, stop)
    slot, inbox = open_inbox(host, "gpu")
    patiently(stop, ledger.note_models, host.engine, host.name, loaded.revisions)
    beat(host, stop, gpu=True)
    log.get_logger().info("gpu slot ready", host=host.name, slot=slot.number)
    for model, revision in loaded.revisions.items():
        metrics.MODEL.labels(model, revision).set(1)
    notify.progress()
    try:
        Slot(host, inbox, loaded, settings, stop).run()
    finally:
        slot.release()
    stop.check()


def route(host: Host, stop: Stop) -> None:
    """Drain the plain `transcribe` list: each job goes to the list of the host that has its batch."""
    slot = scratch.take_slot(host.scratch, "route")
    if slot is None:
        return
    inbox = queues.Inbox(host.client, TRANSCRIBE, processing_list(host.name, "route", slot.number))
    try:
        while not stop():
            job = patiently(stop, inbox.claim, IDLE_SECONDS)
            if job is not None:
                patiently(stop, route_job, host, inbox, job)
    finally:
        slot.release()


def route_job(host: Host, inbox: queues.Inbox, job: str) -> None:
    """Move one job to its host's list; to `dead` if nobody knows it; drop it if its batch is nobody's for now."""
    try:
        wanted = parse_transcribe_job(job)
        item = ledger.find_item(host.engine, wanted.batch_id, wanted.item)
        if item is None:
            raise Permanent("its batch and item are unknown to the ledger")
    except Permanent as error:
        log.get_logger().error("transcribe job set aside", reason=str(error), job=job[:200])
        inbox.bury(job)
        return
    if item.state == "pending" and item.host is not None:
        inbox.move(job, transcribe_list(item.host))
    else:
        inbox.drop(job)


def run(settings: GpuSettings, stop: Stop) -> None:
    """Keep a process for each device, and do the host's duties, until asked to stop."""
    host = open_host(settings, stop)
    attend(host, ("gpu", "route"), stop)
    in_background(stop, "route", lambda: route(host, stop))
    supervise(settings, settings.devices or present_devices(), stop)
    stop.check()


def present_devices() -> tuple[str, ...]:
    """Every GPU of this machine, else its CPU."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is None:
        count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    else:
        count = len([gpu for gpu in gpus.split(",") if gpu.strip()])
    return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)


def supervise(settings: GpuSettings, devices: Sequence[str], stop: Stop) -> None:
    """Keep a process for each device: one that dies is started again, ever later if it keeps dying.

    Stops with ConfigError if one finds the configuration wrong, with Fatal if it cannot import the models' libraries.
    """
    context = multiprocessing.get_context("spawn")
    children: list[BaseProcess | None] = [None] * len(devices)
    deaths = [0] * len(devices)
    due = [0.0] * len(devices)
    pulses: list[notify.Pulse] = [context.Value("d", 0.0, lock=False) for _device in devices]
    names = [device if devices.count(device) == 1 else f"{device} {place}" for place, device in enumerate(devices)]
    reports: dict[str, Connection] = {}
    metrics.DEVICES.labels("wanted").set(len(devices))
    notify.status(f"loading the models on {', '.join(devices)}")
    try:
        while not stop():
            for place, device in enumerate(devices):
                child, now = children[place], time.monotonic()
                if child is not None and not child.is_alive():
                    if hopeless := HOPELESS.get(child.exitcode or 0):
                        stop.fail(hopeless(f"the GPU worker cannot work on {device}; its message stands above"))
                        break
                    lived = now - due[place]
                    deaths[place] = 1 if lived > STEADY_SECONDS else deaths[place] + 1
                    pause = min(60.0, 2.0 ** min(deaths[place] - 1, 6) - 1)
                    due[place], children[place] = now + pause, None
                    how, why = cause_of_death(child.exitcode or 0)
                    metrics.DEATHS.labels(how).inc()
                    notify.status(f"the process for {device} died: {why}")
                    log.get_logger().error(
                        "GPU process died", device=device, why=why, exit_code=child.exitcode, pause=pause
                    )
                elif child is None and now >= due[place]:
                    due[place] = now
                    pulses[place].value = 0.0
                    reports[names[place]], theirs = context.Pipe(duplex=False)
                    args = (settings, device, os.getpid(), pulses[place], theirs)
                    child = context.Process(target=_child, args=args, name=f"gpu {device}")
                    child.start()
                    theirs.close()
                    children[place] = child
            tell(devices, children, pulses, due)
            sentinels = [child.sentinel for child in children if child is not None]
            if sentinels:
                multiprocessing.connection.wait([*sentinels, *reports.values()], timeout=WATCH_SECONDS)
            else:
                stop.wait(WATCH_SECONDS)
            hear(reports)
    finally:
        alive = [child for child in children if child is not None]
        for child in alive:
            child.terminate()
        for child in alive:
            child.join()


def tell(
    devices: Sequence[str], children: Sequence[BaseProcess | None], pulses: Sequence[notify.Pulse], due: Sequence[float]
) -> None:
    """Tell systemd that the worker is ready once a process is; and as long as no process is silent, that it goes on."""
    living = [place for place, child in enumerate(children) if child is not None]
    serving = [devices[place] for place in living if pulses[place].value]
    metrics.DEVICES.labels("serving").set(len(serving))
    if serving:
        notify.ready(f"serves {', '.join(serving)}, {len(serving)} of {len(devices)} devices")
    if all(time.monotonic() < (pulses[place].value or due[place] + LOAD_SECONDS) for place in living):
        notify.progress()


def hear(reports: dict[str, Connection]) -> None:
    """Keep what each process has said of itself last, and forget it once the process has ended."""
    for name, report in list(reports.items()):
        try:
            while report.poll():
                metrics.WORKER.reports[name] = report.recv()
        except (EOFError, OSError):
            report.close()
            del reports[name]
            metrics.WORKER.reports.pop(name, None)


def cause_of_death(exit_code: int) -> tuple[str, str]:
    """What the exit code of a GPU process says: in a word, and with where to look."""
    if exit_code < 0:
        return "killed", f"killed by {signal.Signals(-exit_code).name}"
    if exit_code == 0:
        return "killed", "asked to end from outside"
    if exit_code == Fatal.exit_code:
        return "sick", "it could not work; its message stands above"
    why = "a call of the models hung (Timeout), or an unforeseen error; the traceback stands above"
    return "crashed", why


def _report(to: Connection) -> None:
    """Tell the parent again and again how this process does; the parent serves it."""
    notify.aside()
    with suppress(OSError):  # the parent is gone, and so are we
        while True:
            to.send(list(metrics.WORKER.collect()))
            time.sleep(REPORT_SECONDS)


def _load(settings: GpuSettings, device: str) -> Models:
    """The models; the parent learns by the exit code where their libraries cannot be imported."""
    try:
        return load_models(settings, device)
    except MissingLibrary as error:
        error.exit_code = NO_LIBRARIES
        raise


def _child(settings: GpuSettings, device: str, parent: int, pulse: notify.Pulse, reports: Connection) -> None:
    """A GPU process: it dies with its parent, also where that is killed."""
    notify.report_to(pulse)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    log.configure(settings.log_level, settings.lab_host)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to pass on
    threading.Thread(target=_report, args=(reports,), name="report", daemon=True).start()
    sys.exit(exit_code(lambda: work_slot(settings, lambda: _load(settings, device), Stop()), say_last))
