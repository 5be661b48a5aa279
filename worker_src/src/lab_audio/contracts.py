"""Names that other programs rely on, of objects and in Redis, and what is handed from room to room."""

from __future__ import annotations

import hashlib
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_audio.errors import Permanent

BATCH_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
ITEM = re.compile(r"[0-9a-f]{16}")

UNPACK = "unpack"
TRANSCRIBE = "transcribe"
DEAD = "dead"
MAX_INTEGER = 2**63 - 1  # of the ledger's columns


def check_batch_id(batch_id: str) -> str:
    """The batch_id if it is `YYYYMMDD-HHMMSS-xxxxxx`, else raises Permanent. Paths and keys are made only of these."""
    if not BATCH_ID.fullmatch(batch_id):
        raise Permanent(f"batch_id {batch_id[:80]!r} is not YYYYMMDD-HHMMSS-xxxxxx")
    return batch_id


def archive_key(batch_id: str) -> str:
    return f"archives/{check_batch_id(batch_id)}.tar"


def processed_key(date: str, audio_id: int) -> str:
    return f"processed/{date}/{audio_id}.opus"


def transcribe_list(host: str) -> str:
    """The transcribe list of one host: scratch is local, so a job is of use only there."""
    return f"{TRANSCRIBE}:{host}"


def processing_list(host: str, kind: str, slot: int) -> str:
    return f"processing:{host}:{kind}:{slot}"


def batch_key(batch_id: str, field: str) -> str:
    """`batch:{id}:total`, `:processed` or `:s3_key`."""
    return f"batch:{check_batch_id(batch_id)}:{field}"


def item_of(member: str) -> str:
    """The name of a member on scratch and in jobs: 16 hex digits of the SHA-1 of its path in the archive."""
    return hashlib.sha1(member.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()[:16]


def opus_path(scratch_root: Path, batch_id: str, item: str) -> Path:
    return scratch_root / check_batch_id(batch_id) / f"{item}.opus"


def is_utf8(text: str) -> bool:
    """Whether a text can be stored: one with surrogates stands for bytes that are not UTF-8."""
    return text.encode(errors="ignore").decode() == text


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file at the source: its path relative to the source, size in bytes, mtime in nanoseconds since 1970.

    Bytes of a path that are not UTF-8 are kept as surrogates (`surrogateescape`).
    """

    path: str
    size: int
    mtime_ns: int

    @property
    def mtime(self) -> str:
        """Exact decimal seconds with nine places, as pax records and stat(1) write them."""
        seconds, rest = divmod(abs(self.mtime_ns), 10**9)
        return f"{'-' if self.mtime_ns < 0 else ''}{seconds}.{rest:09d}"

    @classmethod
    def from_tar(cls, info: tarfile.TarInfo) -> SourceFile:
        """What a tar's header says of a file: mtime exact where a pax record has it, 0 where it is garbled."""
        text = info.pax_headers.get("mtime")
        match = re.fullmatch(r"(-?)([0-9]{1,12})(?:\.([0-9]{1,9})[0-9]*)?", str(info.mtime) if text is None else text)
        sign, seconds, rest = match.groups() if match else ("", "0", None)
        mtime_ns = int(seconds) * 10**9 + int((rest or "").ljust(9, "0"))
        if mtime_ns > MAX_INTEGER:
            mtime_ns = 0
        return cls(info.name, info.size, -mtime_ns if sign else mtime_ns)


@dataclass(frozen=True)
class Transcript:
    """What was said. `segments`: dicts with start and end in seconds, text, and words where aligned.

    A segment with `doubt` (`repetition`, `no speech`) was hardly said; it is no part of the text.
    `speech` is False where nothing was said; text is then empty and is not classified.
    """

    text: str
    language: str
    segments: list[dict[str, Any]]
    speech: bool
    model: str


@dataclass(frozen=True)
class Classification:
    """One policy's verdict: `score` is P("1"), the probability that the content meets the policy's criteria.

    `label` is `violates` or `complies`. `chunks`: the score of each piece of a long transcript, in order.
    """

    policy: str
    policy_sha256: str
    label: str
    score: float
    model: str
    adapter: str
    chunks: list[float]


@dataclass(frozen=True)
class Result:
    """What the models made of one recording; kept as `{item}.json` beside the Opus until the ledger has it."""

    transcript: Transcript
    classifications: list[Classification]
