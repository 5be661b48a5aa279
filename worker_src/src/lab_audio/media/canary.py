"""A recording of our own that always works. Where it does not the worker is sick, and no other recording is to blame.

tests/stack/make_sounds.py makes canary.mp3, and canary.opus of it.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lab_audio.errors import Fatal, Permanent
from lab_audio.media import transcode

MP3 = Path(__file__).with_name("canary.mp3")
OPUS = Path(__file__).with_name("canary.opus")
BITRATE = 24_000  # bits per second
SECONDS = 20  # that ffmpeg may take; it needs a tenth of one


def decode() -> Any:
    """The canary's samples: the one window that `transcode.decode` gives. Raises Fatal if ffmpeg is broken here."""
    try:
        (samples,) = transcode.decode(OPUS, timeout=SECONDS)
        return samples
    except (Permanent, OSError) as error:
        raise _broken("decode", OPUS, error) from error


def encode(folder: Path) -> None:
    """Encode the canary in a folder, leaving nothing there. Raises Fatal if ffmpeg is broken here."""
    with MP3.open("rb") as mp3, TemporaryDirectory(prefix="canary-", dir=folder) as place:
        try:
            transcode.encode(mp3, Path(place) / OPUS.name, bitrate=BITRATE, timeout=SECONDS)
        except Permanent as error:
            raise _broken("encode", MP3, error) from error


def _broken(what: str, path: Path, error: Exception) -> Fatal:
    return Fatal(f"ffmpeg is broken on this host, no recording is to blame: it cannot {what} {path}, either: {error}")
