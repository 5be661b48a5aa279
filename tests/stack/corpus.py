"""The corpus of synthetic speech: its true text, many recordings made of it, and the word error rate."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SOUNDS = Path(__file__).parent / "sounds"

_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


def recordings(directory: Path) -> list[str]:
    """Paths, relative to the directory, of the MP3 files in it and below."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.suffix.lower() == ".mp3" and path.is_file()
    )


def true_texts() -> dict[str, str]:
    """What is said in each recording of the corpus, by its path in it."""
    return {name: " ".join(s["text"] for s in sentences) for name, sentences in _sentences().items()}


def make_many(directory: Path, count: int, *, sentences: int = 1, seed: int = 0) -> dict[str, str]:
    """Write `count` different speech MP3s of 2 to 5 seconds a sentence; return their true texts by path.

    Sentences of the corpus are joined by bytes alone: thousands take a second, and no encoder is needed.
    """
    pieces = [
        (piece["text"], (SOUNDS / name).read_bytes()[start : start + piece["bytes"]])
        for name, parts in _sentences().items()
        for start, piece in zip(_starts(parts), parts, strict=True)
    ]
    chance = random.Random(seed)
    texts: dict[str, str] = {}
    made: set[tuple[int, ...]] = set()
    directory.mkdir(parents=True, exist_ok=True)
    while len(texts) < count:
        chosen = tuple(chance.sample(range(len(pieces)), sentences))
        if chosen in made and len(made) < len(pieces):
            continue
        made.add(chosen)
        name = f"{len(texts):04d}.mp3"
        # A comment frame with the name keeps recordings of the same words apart as files.
        tag = b"TXXX" + (len(name) + 2).to_bytes(4, "big") + b"\0\0\0\0" + name.encode()
        header = b"ID3\3\0\0" + len(tag).to_bytes(4, "big")
        (directory / name).write_bytes(header + tag + b"".join(pieces[i][1] for i in chosen))
        texts[name] = " ".join(pieces[i][0] for i in chosen)
    return texts


def word_errors(truth: str, heard: str) -> tuple[int, int]:
    """Words wrong, missing or too many, and words in the truth. Neither case nor punctuation counts."""
    wanted, got = _words(truth), _words(heard)
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1], len(wanted)


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Word errors over all words, of (truth, heard) pairs."""
    errors, words = map(sum, zip(*(word_errors(*pair) for pair in pairs), strict=True))
    return errors / words


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", re.sub(r"['’]", "", text.casefold()))
    spoken = dict(zip(map(str, range(21)), _NUMBERS.split(), strict=True))
    return [spoken.get(word, word) for word in words]


def _sentences() -> dict[str, list[dict[str, Any]]]:
    result: dict[str, list[dict[str, Any]]] = json.loads((SOUNDS / "transcripts.json").read_bytes())
    return result


def _starts(parts: list[dict[str, Any]]) -> list[int]:
    return [sum(int(p["bytes"]) for p in parts[:i]) for i in range(len(parts))]
