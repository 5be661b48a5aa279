"""Speech to text with WhisperX, from local directories only.

MODELS_ROOT/whisperx/[NAME/]model.bin      a Whisper model in CTranslate2's format
MODELS_ROOT/whisperx/align/{language}/     optional: a wav2vec2 CTC model in transformers' format
MODELS_ROOT/whisperx/nltk_data/            optional: NLTK's punkt_tab, which alignment needs
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_audio.contracts import Transcript
from lab_audio.errors import ConfigError
from lab_audio.log import get_logger
from lab_audio.models.revision import revision
from lab_audio.models.runtime import (
    gpu_errors_are_fatal,
    is_out_of_memory,
    loading,
    model_directories,
    offline_imports,
    select_device,
    the_one,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RATE = 16_000
WINDOW = 30  # seconds that Whisper hears at once
SHORTEST = RATE // 10  # samples; less than this is not speech
UNKNOWN_LANGUAGE = "und"
MAX_COMPRESSION, MAX_NO_SPEECH, MIN_LOGPROB = 2.4, 0.6, -1.0


class Transcriber:
    """A loaded Whisper model with its voice activity detector and aligners. Not thread-safe."""

    def __init__(self, models_root: Path, device: str, *, language: str | None, batch_size: int, align: bool) -> None:
        """Load from models_root/whisperx onto `cpu`, `cuda` or `cuda:N`.

        language: of all recordings; None detects it in each. batch_size: windows of 30 s decoded at once.
        Raises ConfigError where the models or the language do not fit, Fatal without lab-audio[gpu] or GPU.
        """
        self._root = models_root / "whisperx"
        whisper = find_whisper(models_root)
        with offline_imports(models_root):
            os.environ["NLTK_DATA"] = str(self._root / "nltk_data")
            import whisperx
            import whisperx.asr
        kind, index = select_device(device)
        self._device = kind if kind == "cpu" else f"{kind}:{index}"
        self._batch_size = batch_size
        self._align = align
        self._aligners: dict[str, tuple[Any, Any] | None] = {}
        with loading(whisper, device):
            self._pipeline = whisperx.load_model(
                str(whisper),
                kind,
                device_index=index,
                compute_type="float16" if kind == "cuda" else "int8",
                vad_method="pyannote",
                local_files_only=True,
                threads=len(os.sched_getaffinity(0)),
            )
        self._model = self._pipeline.model
        if not self._model.model.is_multilingual:
            if language not in (None, "en"):
                raise ConfigError(f"WHISPER_LANGUAGE: {language}, but the model in {whisper} knows only English (en)")
            language = "en"
        if language is not None:
            self._tokenizer(language)
        self._language = language
        self.revision = revision(whisper)

    def transcribe(self, samples: NDArray[np.float32]) -> Transcript:
        """What is said in mono 16 kHz samples of any length. Raises Fatal if the GPU fails."""
        import numpy as np
        import torch

        samples = np.require(samples, np.float32, ["C", "W"])  # a copy only where torch could not share it
        with torch.inference_mode(), gpu_errors_are_fatal(self._device):
            spans = self._speech(samples)
            if not spans:
                return self._silence()
            language = self._language or self._detect(samples[spans[0][0] :])
            segments = self._decode(samples, spans, language)
            text = " ".join(segment["text"] for segment in segments if "doubt" not in segment)
            if not text:
                return self._silence(segments)
            aligner = self._aligner(language) if self._align else None
            if aligner:
                segments = [
                    part
                    for segment in segments
                    for part in ([segment] if "doubt" in segment else self._aligned(segment, samples, *aligner))
                ]
        return Transcript(text=text, language=language, segments=segments, speech=True, model=self.revision)

    def _silence(self, doubtful: Sequence[dict[str, Any]] = ()) -> Transcript:
        return Transcript(
            text="",
            language=self._language or UNKNOWN_LANGUAGE,
            segments=list(doubtful),
            speech=False,
            model=self.revision,
        )

    def _speech(self, samples: NDArray[np.float32]) -> list[tuple[int, int]]:
        """Spans of speech as first and past-last sample, each at most a window long."""
        if samples.size < SHORTEST:
            return []
        vad = self._pipeline.vad_model
        scores = vad({"waveform": vad.preprocess_audio(samples), "sample_rate": RATE})
        thresholds = self._pipeline._vad_params
        chunks = vad.merge_chunks(scores, WINDOW, onset=thresholds["vad_onset"], offset=thresholds["vad_offset"])
        spans = [(max(0, int(c["start"] * RATE)), min(samples.size, int(c["end"] * RATE))) for c in chunks]
        return [(start, end) for start, end in spans if end > start]

    def _mel(self, samples: NDArray[np.float32]) -> Any:
        from whisperx.audio import N_SAMPLES, log_mel_spectrogram

        heard = samples[:N_SAMPLES]
        bands = self._model.model.n_mels
        return log_mel_spectrogram(heard, bands, padding=N_SAMPLES - heard.size, device=self._device).cpu()

    def _detect(self, samples: NDArray[np.float32]) -> str:
        """The language of the first window; give it speech, where whisperx would take the file's start."""
        best, _probability = self._model.model.detect_language(self._model.encode(self._mel(samples)))[0][0]
        return str(best).strip("<|>")

    def _tokenizer(self, language: str) -> Any:
        from whisperx.asr import Tokenizer

        try:
            return Tokenizer(
                self._model.hf_tokenizer,
                self._model.model.is_multilingual,
                task="transcribe",
                language=language,
            )
        except ValueError:
            raise ConfigError(f"WHISPER_LANGUAGE: Whisper does not know {language!r}") from None

    def _decode(
        self, samples: NDArray[np.float32], spans: list[tuple[int, int]], language: str
    ) -> list[dict[str, Any]]:
        import torch

        segments, freed = [], False
        while spans:
            batch, rest = spans[: self._batch_size], spans[self._batch_size :]
            try:
                said = self._listen([samples[start:end] for start, end in batch], language)
            except RuntimeError as error:
                if not is_out_of_memory(error) or (freed and len(batch) == 1):
                    raise
                freed = True
                torch.cuda.empty_cache()  # CTranslate2 cannot use what torch keeps for later
                self._batch_size = max(1, len(batch) // 2)
                get_logger().warning("GPU memory is short: smaller batches from now on", windows=self._batch_size)
                continue
            for (start, end), (words, logprob, no_speech) in zip(batch, said, strict=True):
                if words:
                    segment = {"start": round(start / RATE, 3), "end": round(end / RATE, 3), "text": words}
                    doubt = doubt_about(words, logprob, no_speech)
                    segments.append(_plain({**segment, "avg_logprob": logprob, "doubt": doubt}))
            spans = rest
        return segments

    def _listen(self, windows: list[NDArray[np.float32]], language: str) -> list[tuple[str, float, float]]:
        """For each window its text, the mean log probability of its tokens, and the probability of no speech."""
        import torch

        options, tokenizer = self._pipeline.options, self._tokenizer(language)
        prompt = self._model.get_prompt(tokenizer, [], without_timestamps=options.without_timestamps)
        results = self._model.model.generate(
            self._model.encode(torch.stack([self._mel(window) for window in windows])),
            [prompt] * len(windows),
            beam_size=options.beam_size,
            patience=options.patience,
            length_penalty=options.length_penalty,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            max_length=self._model.max_length,
            suppress_blank=options.suppress_blank,
            suppress_tokens=options.suppress_tokens,
            return_scores=True,
            return_no_speech_prob=True,
        )
        said = []
        for result in results:
            tokens = result.sequences_ids[0]
            text = tokenizer.tokenizer.decode([token for token in tokens if token < tokenizer.eot])
            # A score is the sum over the tokens, and their end, divided by their number to the power of the penalty.
            logprob = result.scores[0] * len(tokens) ** options.length_penalty / (len(tokens) + 1)
            # PostgreSQL's text cannot hold NUL, which Whisper's vocabulary can spell.
            said.append((text.replace("\x00", "").strip(), logprob, result.no_speech_prob))
        return said

    def _aligner(self, language: str) -> tuple[Any, Any] | None:
        """The aligner of a language, loaded once; None where its model or sentence splitter is missing."""
        if language not in self._aligners:
            import whisperx
            from whisperx.utils import PUNKT_LANGUAGES

            model = self._root / "align" / language
            punkt = self._root / "nltk_data/tokenizers/punkt_tab" / PUNKT_LANGUAGES.get(language, "english")
            missing = [str(path) for path in (model, punkt) if not path.is_dir()]
            if missing:
                get_logger().debug("words are not aligned", language=language, missing=missing)
                self._aligners[language] = None
            else:
                with loading(model, self._device):
                    self._aligners[language] = whisperx.load_align_model(
                        language, self._device, model_name=str(model), model_cache_only=True
                    )
        return self._aligners[language]

    def _aligned(
        self, segment: dict[str, Any], samples: NDArray[np.float32], model: Any, metadata: Any
    ) -> list[dict[str, Any]]:
        """The segment as sentences with words in time, or as it is if that would lose some of its text."""
        import whisperx

        parts = whisperx.align([segment], model, metadata, samples, self._device)["segments"]
        sentences = [_plain(part) for part in parts]
        whole = "".join(sentence["text"] for sentence in sentences)
        complete = "".join(whole.split()) == "".join(segment["text"].split())
        return sentences if complete and all("start" in s and "end" in s for s in sentences) else [segment]


def doubt_about(text: str, logprob: float, no_speech: float) -> str | None:
    """Why a window's text was hardly said: `repetition` or `no speech`, by the bounds of Whisper's authors.

    A text with more than 2.4 times as many characters as zlib makes bytes of it repeats itself; one of which the model
    thinks with more than 0.6 that nothing was said, and whose tokens are on average less likely than 1/e, is made up.
    Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (2022), section 4.5.
    """
    # Characters, where the authors count bytes: by those any text repeats itself whose letters take three each.
    if len(text) > MAX_COMPRESSION * len(zlib.compress(text.encode())):
        return "repetition"
    return "no speech" if no_speech > MAX_NO_SPEECH and logprob < MIN_LOGPROB else None


def find_whisper(models_root: Path) -> Path:
    """models_root/whisperx if it holds model.bin, else the one sub-directory that does, else ConfigError."""
    root = models_root / "whisperx"
    found = [path for path in model_directories(root) if (path / "model.bin").is_file()]
    return root if root in found else the_one(found, "directory with a Whisper model (model.bin)", root)


def _plain(value: Any) -> Any:
    """The same for JSON: floats of Python's own kind, and without keys that have no finite value."""
    if isinstance(value, dict):
        items = ((key, _plain(item)) for key, item in value.items())
        return {key: item for key, item in items if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
