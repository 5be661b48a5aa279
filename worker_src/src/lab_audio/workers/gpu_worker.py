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
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lab_audio import ledger, log, queues, s3_utils, scratch
from lab_audio.config import GpuSettings
from lab_audio.contracts import (
    TRANSCRIBE,
    Classification,
    Result,
    Transcript,
    opus_path,
    parse_transcribe_job,
    processed_key,
    processing_list,
    transcribe_list,
)
from lab_audio.errors import ConfigError, Fatal, LabAudioError, Permanent
from lab_audio.ledger import Item
from lab_audio.media import transcode
from lab_audio.workers.host import (
    Host,
    attend,
    beat,
    drop_stale,
    open_host,
    open_inbox,
    return_batch,
    tidy_batch,
)
from lab_audio.workers.loop import Stop, Stopped, exit_code, in_background, patiently

IDLE_SECONDS = 2
WATCH_SECONDS = 1.0
STEADY_SECONDS = 600.0
PR_SET_PDEATHSIG = 1
RESULT: TypeAdapter[Result] = TypeAdapter(Result)


@dataclass(frozen=True)
class Models:
    """The models as functions: samples (float32, mono, 16 kHz) to transcript; transcripts' texts to verdicts."""

    transcribe: Callable[[Any], Transcript]
    classify: Callable[[Sequence[str]], list[list[Classification]]]


def load_models(settings: GpuSettings, device: str) -> Models:
    """Load both models onto a device. Raises ConfigError if their directories are not as they should be."""
    from lab_audio.models.classifier import Classifier, load_policies
    from lab_audio.models.transcriber import Transcriber

    policies = load_policies(settings.policies_dir)
    transcriber = Transcriber(
        settings.models_root,
        device,
        language=settings.whisper_language,
        batch_size=settings.whisper_batch,
        align=settings.align,
    )
    classifier = Classifier(settings.models_root, device)
    classifier.prepare(policies)
    return Models(transcriber.transcribe, lambda texts: classifier.classify(texts, policies))


@dataclass
class Work:
    """A claimed job on its way through the process. `samples` until it went through the models, `result` after.

    `blamed`: the attempt was the recording's own and stays counted.
    """

    job: str
    item: Item
    opus: Path
    samples: Any = None
    result: Result | None = None
    blamed: bool = False

    @property
    def result_path(self) -> Path:
        return self.opus.with_suffix(".json")


class Slot:
    """One process's work. `run` returns when asked to stop, with everything finished or handed back."""

    def __init__(self, host: Host, inbox: queues.Inbox, models: Models, settings: GpuSettings, stop: Stop) -> None:
        self.host = host
        self.inbox = inbox
        self.models = models
        self.settings = settings
        self.stop = stop
        self.decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self.uploaders = ThreadPoolExecutor(settings.upload_threads, thread_name_prefix="upload")
        self.ahead: deque[tuple[str, Future[Work | None]]] = deque()
        self.behind: deque[Future[None]] = deque()
        self.unfinished: list[str] = []

    def run(self) -> None:
        try:
            while not self.stop():
                self._fill()
                group = self._next_group()
                if group:
                    self._recognise(group)
                self._reap(4 * self.settings.upload_threads)
        except Stopped:
            pass
        finally:
            self._leave()

    def _fill(self) -> None:
        """Claim until enough is being prepared; wait for a job only if nothing is."""
        most = self.settings.classify_batch + self.settings.decode_threads
        while len(self.ahead) < most and not self.stop():
            wait = 0 if self.ahead else IDLE_SECONDS
            job = patiently(self.stop, self.inbox.claim, wait)
            if job is None:
                return
            self.ahead.append((job, self.decoders.submit(self._prepare, job)))

    def _prepare(self, job: str) -> Work | None:
        """Find what a job is about and decode it. None if nothing is to be done: the job is gone from the slot."""
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
        try:
            work.samples = transcode.decode(opus, timeout=60 + (item.seconds or 0))
        except FileNotFoundError:
            patiently(self.stop, return_batch, host, item.batch_id)
            patiently(self.stop, drop_stale, host, inbox, job, item.batch_id)
            return None
        except transcode.Killed as error:
            raise Fatal(f"{error}; is this host short of memory?") from error
        except OSError as error:
            raise Fatal(f"SCRATCH_ROOT {host.scratch}: {error}") from error
        except Permanent as error:
            self._bury(work, str(error))
            return None
        return work

    def _next_group(self) -> list[Work]:
        """What is ready for the models, in order; a recording that was tried before goes alone."""
        group: list[Work] = []
        while self.ahead and len(group) < self.settings.classify_batch:
            _, future = self.ahead[0]
            if group and not future.done():
                break
            work = future.result()
            tried = work is not None and work.result is None and work.item.attempts > 0
            if group and tried:
                break
            self.ahead.popleft()
            if work is not None and work.result is not None:
                self._send(work)
            elif work is not None:
                group.append(work)
            if tried:
                break
        return group

    def _recognise(self, group: list[Work]) -> None:
        """BEGIN each of a group, run the models over it, keep the results on disk and send them off."""
        if group[0].item.attempts:
            self._reap(0)  # alone in the process, so that a recording that kills it blames no other
        begun: list[Work] = []
        try:
            for work in group:
                if self._begin(work):
                    begun.append(work)
            self._transcribe_and_classify(begun)
        except (Fatal, Stopped) as error:
            self._hand_back(begun)
            self.unfinished = [work.job for work in group if work.result is None and not work.blamed]
            raise error
        for work in begun:
            if work.result is not None:
                self._send(work)

    def _begin(self, work: Work) -> bool:
        attempts = patiently(self.stop, ledger.begin, self.host.engine, work.item.audio_id, self.host.name)
        if attempts is None:
            patiently(self.stop, drop_stale, self.host, self.inbox, work.job, work.item.batch_id)
            return False
        if attempts > self.settings.max_attempts:
            last = work.item.reason or "its worker died each time"
            self._bury(work, f"given up after {self.settings.max_attempts} attempts: {last}")
            return False
        return True

    def _transcribe_and_classify(self, begun: list[Work]) -> None:
        transcripts: list[tuple[Work, Transcript]] = []
        for work in begun:
            try:
                transcripts.append((work, self.models.transcribe(work.samples)))
            except Exception as error:
                self._went_wrong(work, error)
            work.samples = None
        spoken = [(work, transcript) for work, transcript in transcripts if transcript.speech]
        try:
            verdicts = self.models.classify([transcript.text for _, transcript in spoken]) if spoken else []
        except Exception as error:
            for work, _ in spoken:
                self._went_wrong(work, error)
            verdicts, spoken = [], []
            transcripts = [(work, transcript) for work, transcript in transcripts if not transcript.speech]
        of_work = {work.job: verdict for (work, _), verdict in zip(spoken, verdicts, strict=True)}
        for work, transcript in transcripts:
            result = Result(transcript, of_work.get(work.job, []))
            try:
                scratch.write_atomic(work.result_path, json.dumps(asdict(result)).encode())
            except FileNotFoundError:
                pass  # the batch was taken away meanwhile; its result counts all the same
            except OSError as error:
                raise Fatal(f"SCRATCH_ROOT {self.host.scratch}: {error}") from error
            work.result = result

    def _went_wrong(self, work: Work, error: Exception) -> None:
        """A recording that the models refuse is set aside; after an unknown error it goes to the list's tail."""
        if isinstance(error, Permanent):
            work.blamed = True
            self._bury(work, str(error))
        elif isinstance(error, LabAudioError):
            raise error
        else:
            work.blamed = True
            log.get_logger().error("went wrong", audio_id=work.item.audio_id, exc_info=error)
            reason = f"{type(error).__name__}: {error}"[:500]
            patiently(self.stop, ledger.note_error, self.host.engine, work.item.audio_id, reason)
            patiently(self.stop, self.inbox.move, work.job, self.inbox.source)

    def _hand_back(self, begun: list[Work]) -> None:
        """Take the attempt of unfinished work back, as far as the ledger answers."""
        try:
            for work in begun:
                if work.result is None and not work.blamed:
                    ledger.hand_back(self.host.engine, work.item.audio_id)
        except LabAudioError as error:
            log.get_logger().warning("attempts stay counted", error=str(error))

    def _send(self, work: Work) -> None:
        self.behind.append(self.uploaders.submit(self._settle, work))

    def _settle(self, work: Work) -> None:
        """Bring a result home. After an unknown error it is forgotten, and the recording is tried again, counted."""
        try:
            self._bring_home(work)
        except (Fatal, Stopped):
            raise
        except Exception as error:
            work.result_path.unlink(missing_ok=True)
            self._went_wrong(work, error)

    def _bring_home(self, work: Work) -> None:
        """Upload the Opus, FINISH, ACK, and tidy if that was the batch's last."""
        item, host = work.item, self.host
        assert work.result is not None
        try:
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
            patiently(self.stop, return_batch, host, item.batch_id)
            patiently(self.stop, drop_stale, host, self.inbox, work.job, item.batch_id)
            return
        settled = patiently(self.stop, ledger.finish, host.engine, item.audio_id, key, work.result)
        if settled.state == "dead":
            patiently(self.stop, s3_utils.delete_opus, key, bucket=host.bucket)
        self._ack(work, settled)
        log.get_logger().info("recording done", audio_id=item.audio_id, batch_id=item.batch_id, member=item.member)

    def _bury(self, work: Work, reason: str) -> None:
        """BURY an item, then delete an object that an earlier attempt may have put."""
        item, host = work.item, self.host
        settled = patiently(self.stop, ledger.bury, host.engine, item.audio_id, reason)
        if settled.state == "dead":
            patiently(self.stop, s3_utils.delete_opus, processed_key(item.date, item.audio_id), bucket=host.bucket)
        self._ack(work, settled)
        log.get_logger().error("recording set aside", audio_id=item.audio_id, batch_id=item.batch_id, reason=reason)

    def _ack(self, work: Work, settled: ledger.Settled) -> None:
        if patiently(self.stop, self.inbox.ack, work.job, work.item.batch_id, settled.processed):
            patiently(self.stop, tidy_batch, self.host, work.item.batch_id)

    def _reap(self, most: int) -> None:
        """Wait until at most so many uploads are under way; raises what went wrong in one."""
        for future in [future for future in self.behind if future.done()]:
            self.behind.remove(future)
            future.result()
        while len(self.behind) > most:
            self.behind.popleft().result()

    def _leave(self) -> None:
        """Finish uploads, and put what did not go through the models back to the head of the list, in order."""
        self.stop.event.set()  # also where an error ends the slot: no thread waits for a store any longer
        self.decoders.shutdown(wait=True, cancel_futures=True)
        self.uploaders.shutdown(wait=True)
        failures = [future.exception() for future in self.behind]
        prepared = [
            job for job, future in self.ahead if future.cancelled() or future.exception() or future.result() is not None
        ]
        try:
            for job in reversed([*self.unfinished, *prepared]):
                self.inbox.move(job, self.inbox.source, "head")
        except LabAudioError as error:
            log.get_logger().warning("jobs stay in the slot's list", error=str(error))
        for failure in failures:
            if failure is not None and not isinstance(failure, Stopped):
                raise failure


def work_slot(settings: GpuSettings, models: Callable[[], Models], stop: Stop) -> None:
    """Serve this host's transcribe list in this process until asked to stop."""
    loaded = models()
    stop.on_signals()  # until here SIGTERM just ends the process
    host = open_host(settings, stop)
    slot, inbox = open_inbox(host, "gpu")
    beat(host, stop, gpu=True)
    log.get_logger().info("gpu slot ready", host=host.name, slot=slot.number)
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

    Stops with ConfigError if one finds the configuration wrong.
    """
    context = multiprocessing.get_context("spawn")
    children: list[BaseProcess | None] = [None] * len(devices)
    deaths = [0] * len(devices)
    due = [0.0] * len(devices)
    try:
        while not stop():
            for place, device in enumerate(devices):
                child, now = children[place], time.monotonic()
                if child is not None and not child.is_alive():
                    if child.exitcode == ConfigError.exit_code:
                        stop.fail(ConfigError(f"the GPU worker cannot work on {device}; its message stands above"))
                        break
                    lived = now - due[place]
                    deaths[place] = 1 if lived > STEADY_SECONDS else deaths[place] + 1
                    pause = min(60.0, 2.0 ** min(deaths[place] - 1, 6) - 1)
                    due[place], children[place] = now + pause, None
                    log.get_logger().error("GPU process died", device=device, exit_code=child.exitcode, pause=pause)
                elif child is None and now >= due[place]:
                    due[place] = now
                    child = context.Process(target=_child, args=(settings, device, os.getpid()), name=f"gpu {device}")
                    child.start()
                    children[place] = child
            sentinels = [child.sentinel for child in children if child is not None]
            multiprocessing.connection.wait(sentinels, timeout=WATCH_SECONDS) if sentinels else stop.wait(WATCH_SECONDS)
    finally:
        alive = [child for child in children if child is not None]
        for child in alive:
            child.terminate()
        for child in alive:
            child.join()


def _child(settings: GpuSettings, device: str, parent: int) -> None:
    """A GPU process: it dies with its parent, also where that is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    log.configure(settings.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to pass on
    sys.exit(exit_code(lambda: work_slot(settings, lambda: load_models(settings, device), Stop())))
