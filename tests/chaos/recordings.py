"""What a campaign plants: tiny real MP3s, what must become of each, archives of them. Knows nothing of lab_audio."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

HEALTHY = 40
POLICIES = ("hate", "threats")

ENCODE = (
    "-protocol_whitelist pipe -f mp3 -i pipe:0 -map 0:a:0 -vn -sn -dn -map_metadata -1 -map_chapters -1 -ac 1 -ar 16000"
    " -c:a libopus -b:a 24000 -application voip -fflags +bitexact -flags:a +bitexact -f ogg pipe:1"
)
DECODE = "-protocol_whitelist pipe -f ogg -i pipe:0 -map 0:a:0 -ac 1 -ar 16000 -c:a pcm_s16le -f s16le pipe:1"


@dataclass(frozen=True)
class Recording:
    """A file's bytes and its fate: `done`, or how it dies.

    `kills` and `raises`: in the models, each time; `refused`: by the models, for good; `noise`: in ffmpeg;
    `foreign`: not an .mp3. `opus` and `words`: what the store and the transcript must hold.
    """

    content: bytes
    fate: str
    opus: bytes = b""
    words: str = ""


@dataclass
class Planted:
    """Everything that was planted: files at the source by path, archives by batch, and payloads that are no jobs."""

    files: dict[str, Recording] = field(default_factory=dict)
    archives: dict[str, dict[str, Recording]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    nonsense: set[str] = field(default_factory=set)

    @property
    def items(self) -> int:
        good = (members for batch, members in self.archives.items() if batch not in self.damaged)
        return len(self.files) + sum(map(len, good))


def ffmpeg(arguments: str, data: bytes = b"") -> bytes:
    """What ffmpeg makes of `data`."""
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-loglevel", "error", *arguments.split()]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def make_recordings() -> dict[str, list[Recording]]:
    """Recordings by fate. The sounds are always the same, so that an encode can be compared with its like."""

    def sine(number: int) -> bytes:
        source = f"sine=frequency={200 + 37 * number}:duration={0.20 + 0.004 * number:.3f}"
        return ffmpeg(f"-f lavfi -i {source} -ac 1 -ar 16000 -b:a 16k -f mp3 pipe:1")

    def heard(number: int, fate: str) -> Recording:
        mp3 = sine(number)
        opus = ffmpeg(ENCODE, mp3)
        return Recording(mp3, fate, opus, hashlib.sha256(ffmpeg(DECODE, opus)).hexdigest())

    made = {"done": [heard(number, "done") for number in range(HEALTHY)]}
    for offset, fate in enumerate(("kills", "raises", "refused")):
        made[fate] = [heard(HEALTHY + 2 * offset + number, fate) for number in range(2)]
    # One is larger than a part, so that its archive is uploaded in parts.
    made["noise"] = [Recording(b"no sound " * times, "noise") for times in (600_000, 70, 0)]
    made["foreign"] = [Recording(b"not a recording", "foreign")]
    return made


def speaks(words: str) -> bool:
    """Whether the stand-in hears speech in a recording; one in eight has none."""
    return int(words[0], 16) >= 2


def score(words: str, policy: str) -> float:
    """The stand-in's score, exact in binary."""
    return hashlib.sha256(f"{words} {policy}".encode()).digest()[0] / 256


def tar_of(members: dict[str, Recording]) -> bytes:
    """An archive as another program would make it, with a directory entry."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        folder = tarfile.TarInfo("calls")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, recording in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(recording.content)
            archive.addfile(info, io.BytesIO(recording.content))
    return data.getvalue()


def unpack_job(batch_id: str, count: int) -> str:
    return json.dumps(
        {
            "batch_id": batch_id,
            "s3_key": f"archives/{batch_id}.tar",
            "file_count": count,
            "transferred_at": "2026-01-01T00:00:00Z",
        }
    )


def put_file(source: Path, name: str, content: bytes) -> None:
    """A file at the source, whole from its first moment."""
    path, part = source / name, source.with_name("arriving")
    path.parent.mkdir(exist_ok=True)
    part.write_bytes(content)
    part.replace(path)
