#!/usr/bin/env python3
"""Make the corpus of synthetic speech in tests/stack/sounds, with its true text, and the workers' canary.

Needs espeak-ng, lame and ffmpeg, and lab_audio (run it by .venv/bin/python).

Each sentence is encoded alone, at a constant bit rate without a bit reservoir, so that recordings can be cut
and joined at sentences by bytes alone (see corpus.py). Run it only to change the corpus: that is committed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from lab_audio.media import canary, transcode

SOUNDS = Path(__file__).parent / "sounds"

# recording: (voice, words per minute, sentences)
RECORDINGS: dict[str, tuple[str, int, list[str]]] = {
    "garden.mp3": (
        "en-us+m3",
        140,
        [
            "The tomatoes in the garden are almost ready to be picked.",
            "Every evening we carry two buckets of water up the hill.",
            "My neighbor says that the summer has been far too dry.",
        ],
    ),
    "library.mp3": (
        "en-us+f2",
        140,
        [
            "The library closes at six, but the reading room stays open all night.",
            "Please return the three books that you borrowed last month.",
            "A new shelf for old maps was built beside the entrance.",
        ],
    ),
    "kitchen.mp3": (
        "en-gb",
        150,
        [
            "First cut the onions and cook them slowly in butter.",
            "Add a little salt, some pepper and a glass of water.",
            "The soup is done when the carrots are soft.",
        ],
    ),
    "calls/monday/call.mp3": (
        "en-us+m3",
        150,
        [
            "Good morning, I am calling about the broken printer on the second floor.",
            "It makes a loud noise and then it stops.",
            "Could somebody come and look at it before noon?",
        ],
    ),
    "calls/tuesday/call.mp3": (
        "en-us+f2",
        150,
        [
            "Hello, this is the repair service.",
            "We looked at your printer and found a small piece of paper inside.",
            "It works again, and there is nothing to pay.",
        ],
    ),
    "calls/tuesday/Second Call.MP3": (
        "en-gb",
        140,
        [
            "Thank you for your quick help.",
            "I will tell my colleagues that the machine is working.",
        ],
    ),
    "field notes/Café Zürich.mp3": (
        "en-us+m3",
        145,
        [
            "We recorded this conversation in a crowded coffee house.",
            "People at the next table were talking about the election.",
            "Somebody dropped a plate and everybody laughed.",
        ],
    ),
    "field notes/river.mp3": (
        "en-us",
        140,
        [
            "The river is very high after four days of rain.",
            "A wooden bridge near the village was carried away.",
            "The farmers moved their animals to the upper fields.",
            "Nobody was hurt.",
        ],
    ),
    "archive/2024/winter/train.mp3": (
        "en-us+f2",
        145,
        [
            "The train to the coast leaves from platform nine in twenty minutes.",
            "Passengers with bicycles should use the last carriage.",
        ],
    ),
    "archive/2024/winter/REC_0007.MP3": (
        "en-gb",
        140,
        [
            "The committee agreed to build a new school in the old harbor.",
            "Work will begin in March and should take about two years.",
            "The mayor promised that no trees would be cut down.",
        ],
    ),
    "archive/2024/summer/astronomy.mp3": (
        "en-gb",
        155,
        [
            "Tonight the moon will pass in front of a bright planet.",
            "You can see it without a telescope if the sky is clear.",
            "The next time will be in eleven years.",
        ],
    ),
    "archive/2023/market.mp3": (
        "en-us+m3",
        145,
        [
            "Fresh bread, warm bread, come and buy some bread!",
            "Six eggs and a bag of apples cost less than a cup of coffee.",
            "The market is held every Saturday in front of the church.",
        ],
    ),
}


def encode(sentence: str, voice: str, speed: int) -> bytes:
    """One sentence as MP3 frames only: 22.05 kHz, mono, 32 kb/s."""
    wave = subprocess.run(
        ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", sentence], stdout=subprocess.PIPE, check=True
    ).stdout
    return subprocess.run(
        ["lame", "--quiet", "-r", "-s", "22.05", "-m", "m", "-b", "32", "--nores", "-t", "-", "-"],
        input=wave[44:],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    ).stdout


def main() -> None:
    shutil.rmtree(SOUNDS, ignore_errors=True)
    truth = {}
    for name, (voice, speed, sentences) in RECORDINGS.items():
        pieces = [encode(sentence, voice, speed) for sentence in sentences]
        path = SOUNDS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(pieces))
        truth[name] = [{"text": s, "bytes": len(p)} for s, p in zip(sentences, pieces, strict=True)]
    transcripts = SOUNDS / "transcripts.json"
    transcripts.write_text(json.dumps(truth, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    make_canary()


def make_canary() -> None:
    canary.MP3.write_bytes(encode("The soup is done when the carrots are soft.", "en-gb", 150))
    with canary.MP3.open("rb") as mp3:
        transcode.encode(mp3, canary.OPUS, bitrate=canary.BITRATE)


if __name__ == "__main__":
    main()
