"""The models as the GPU worker uses them: a watchdog bounds each call, and a canary proves that they are well."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lab_audio import notify
from lab_audio.config import GpuSettings
from lab_audio.contracts import Classification, Transcript
from lab_audio.errors import Fatal
from lab_audio.media import canary
from lab_audio.media.transcode import SAMPLE_RATE

# A call of the models that takes longer than this hangs; healthy ones need a small part of it.
HANG_SECONDS = 180.0
HANG_SECONDS_PER_SECOND = 4.0  # of sound


@dataclass(frozen=True)
class Models:
    """The models as functions: samples (float32, mono, 16 kHz) to transcript; transcripts' texts to verdicts.

    `revisions`: of each model's weights.
    """

    transcribe: Callable[[Any], Transcript]
    classify: Callable[[Sequence[str]], list[list[Classification]]]
    revisions: Mapping[str, str] = field(default_factory=dict)


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
    return Models(
        transcriber.transcribe,
        lambda texts: classifier.classify(texts, policies),
        {"whisper": transcriber.revision, "gemma": classifier.model_revision, "adapter": classifier.adapter_revision},
    )


@contextmanager
def watchdog(samples: int) -> Iterator[None]:
    """End this process with code 1, its threads' tracebacks on stderr, if this takes too long for so many samples.

    It is ended by a thread that needs nothing from Python, also where C code hangs and holds the interpreter's lock.
    """
    limit = HANG_SECONDS + HANG_SECONDS_PER_SECOND * samples / SAMPLE_RATE
    notify.progress(within=limit + notify.PATIENCE_SECONDS)
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def joined(windows: Sequence[tuple[int, Transcript]]) -> Transcript:
    """One transcript of those of a recording's windows, each with its number of samples; the first's language."""
    spoken = [transcript for _samples, transcript in windows if transcript.speech]
    segments, start = [], 0.0
    for samples, transcript in windows:
        segments += [_later(segment, start) for segment in transcript.segments]
        start += samples / SAMPLE_RATE
    text = " ".join(transcript.text for transcript in spoken)
    return replace((spoken or [windows[0][1]])[0], text=text, segments=segments)


def _later(segment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A segment, and the words in it, so many seconds later."""
    later = dict(segment)
    for key in later.keys() & {"start", "end"}:
        later[key] = round(segment[key] + seconds, 3)
    if "words" in later:
        later["words"] = [_later(word, seconds) for word in segment["words"]]
    return later


def prove(models: Models) -> None:
    """Run the canary through ffmpeg and both models. Raises Fatal if this worker is sick."""
    samples = canary.decode()
    try:
        with watchdog(len(samples)):
            transcript = models.transcribe(samples)
            verdicts = models.classify([transcript.text])
    except Fatal:
        raise
    except Exception as error:
        raise _sick(f"the models fail on it: {type(error).__name__}: {error}") from error
    if not transcript.speech or not transcript.text.strip():
        raise _sick("nothing is heard in it")
    if len(verdicts) != 1 or not verdicts[0] or not all(math.isfinite(verdict.score) for verdict in verdicts[0]):
        raise _sick("it is given no verdicts, or some that are not numbers")


def _sick(why: str) -> Fatal:
    return Fatal(f"this worker is sick, no recording is to blame: {canary.OPUS.name} is known to be good, but {why}")
