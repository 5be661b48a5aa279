"""What both models share: imports that stay off the network, devices, and errors of the GPU."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab_audio.errors import ConfigError, Fatal, LabAudioError

_GPU_ERROR = re.compile(r"cuda|cublas|cudnn|device-side assert|hip error", re.IGNORECASE)


class MissingLibrary(Fatal):
    """A library of the models cannot be imported here."""


@contextmanager
def offline_imports(models_root: Path) -> Iterator[None]:
    """Import the models' libraries inside this: they then load local files only and report to nobody.

    Raises MissingLibrary.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["PYANNOTE_METRICS_ENABLED"] = "false"
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # whisperx insists on making torch's cache directory; one that is there already need not be writable.
    os.environ.setdefault("TORCH_HOME", str(models_root))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        for chatty in ("lightning", "lightning.pytorch", "pytorch_lightning", "whisperx"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        raise MissingLibrary(
            f"the models' libraries cannot be imported ({error}): install the package with its extra [gpu]"
        ) from error


def check_libraries(models_root: Path, devices: Sequence[str]) -> None:
    """Raises Fatal where a library cannot be imported or a device is not there, ConfigError for another name."""
    with offline_imports(models_root):
        import peft  # noqa: F401
        import transformers  # noqa: F401
        import whisperx  # noqa: F401
    for device in devices:
        select_device(device)


@contextmanager
def gpu_errors_are_fatal(device: str) -> Iterator[None]:
    """Turn an error of the GPU into Fatal: after one, nothing that this process computes can be trusted."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        # Out of memory is no sickness: less is tried at once, at last the recording alone.
        if _GPU_ERROR.search(str(error)) and not is_out_of_memory(error):
            raise Fatal(f"the GPU failed ({device}): {str(error).strip().splitlines()[0]}") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU's memory did not do."""
    return any(words in str(error).lower() for words in ("out of memory", "alloc_failed"))


@contextmanager
def loading(directory: Path, device: str) -> Iterator[None]:
    """Load a model inside this: damaged or half-copied files raise ConfigError, errors of the GPU Fatal."""
    try:
        with gpu_errors_are_fatal(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LabAudioError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"MODELS_ROOT: {directory} cannot be loaded: {reason}") from error


def select_device(device: str) -> tuple[str, int]:
    """`cpu`, `cuda` or `cuda:N` as kind and index; a GPU becomes this process's own.

    Raises ConfigError for another name, Fatal where that GPU is not there.
    """
    match = re.fullmatch(r"(cpu|cuda)(?::([0-9]+))?", device)
    if not match:
        raise ConfigError(f"DEVICES: {device!r} is not cpu, cuda or cuda:N")
    kind, index = match[1], int(match[2] or 0)
    if kind == "cuda":
        import torch

        if index >= torch.cuda.device_count():
            raise Fatal(f"DEVICES: {device}, but torch finds {torch.cuda.device_count()} GPUs here: see nvidia-smi")
        with gpu_errors_are_fatal(device):
            torch.cuda.set_device(index)
    return kind, index


def model_directories(root: Path) -> list[Path]:
    """The directory and its visible sub-directories; ConfigError naming MODELS_ROOT if it cannot be read."""
    try:
        return [root, *sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))]
    except OSError as error:
        raise ConfigError(f"MODELS_ROOT: {root} cannot be read: {error.strerror}") from None


def the_one(found: list[Path], what: str, root: Path) -> Path:
    """The only one found; none or several raise ConfigError naming MODELS_ROOT and what was found."""
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or "none"
        raise ConfigError(f"MODELS_ROOT: {root} must hold exactly one {what}; found: {names}")
    return found[0]
