"""In ffmpeg's place a program tries what a hostile recording could make it do: it fails, and the next one runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from needed import missing

from lab_audio import ledger, notify
from lab_audio.contracts import item_of
from lab_audio.media import canary, sandbox, transcode
from lab_audio.workers import unpack_worker

PERL = "/usr/bin/perl"  # essential on Debian and Ubuntu, and all it needs is below /usr/lib
NAME = "a.mp3"
FAILS = 3  # what a program ends with that could not do it
SECRET = "xyzzy"


@pytest.fixture(autouse=True)
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    if problem := sandbox.problem():
        missing(problem)
    monkeypatch.setattr(unpack_worker, "FFMPEG_PAUSES", (0, 0), raising=False)


def encode(tmp_path: Path) -> ledger.NewItem:
    row = ledger.NewItem(NAME, item_of(NAME), NAME)
    with canary.MP3.open("rb") as mp3:
        return unpack_worker.encode(row, mp3, tmp_path, 24_000, 1)


def attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, *arguments: object, seconds: float = 60
) -> str | None:
    """Encode a recording with this Perl program in ffmpeg's place: why it is dead. The next one, by ffmpeg, is not."""
    enclosed, argv = sandbox.enclosed, [PERL, "-e", program, *map(str, arguments)]
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "enclosed", lambda _ffmpeg, cpu_seconds: enclosed(argv, cpu_seconds))
        patch.setattr(canary, "encode", lambda folder: None)
        patch.setattr(unpack_worker, "encode_bounds", lambda mp3, bitrate: (seconds, 1 << 20))
        reason = encode(tmp_path).reason
    assert encode(tmp_path).reason is None
    return reason


COULD_NOT = f"ffmpeg: ended with {FAILS}"


def test_it_reaches_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "use Socket; socket(my $s, AF_INET, SOCK_STREAM, 0) or exit 3; "
        'connect($s, sockaddr_in($ARGV[0], inet_aton("127.0.0.1"))) or exit 3; syswrite($s, "in")'
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        assert attempt(tmp_path, monkeypatch, program, server.getsockname()[1]) == COULD_NOT
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "program",
    [
        'open(my $f, "<", $ARGV[0]) or exit 3',
        "opendir(my $d, $ARGV[1]) or exit 3",
        "exit 3 unless grep { /xyzzy/ } %ENV",
        'for my $e (glob("/proc/*/environ")) { open(my $f, "<", $e) and exit 0 } exit 3',
        "kill(0, $ARGV[2]) or exit 3",
        'open(my $f, "<", "/etc/passwd") or exit 3',
        'exit 3 if join(",", glob("/dev/*")) eq "/dev/null"',
    ],
)
def test_it_sees_nothing_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """A secret, another batch's folder, the environment, other processes, files of the system, disks."""
    other = tmp_path / "20260101-000000-000002"
    other.mkdir()
    secret = tmp_path / "database_url"
    secret.write_text(SECRET)
    monkeypatch.setenv("DATABASE_URL", SECRET)
    assert attempt(tmp_path, monkeypatch, program, secret, other, os.getpid()) == COULD_NOT


def test_it_writes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = 'for my $d (@ARGV) { open(my $f, ">", "$d/x") and exit 0; mkdir("$d/y") and exit 0 } exit 3'
    places = ["", "/tmp", "/dev/shm", "/usr/lib", "/etc", "/proc/self", tmp_path]
    assert attempt(tmp_path, monkeypatch, program, *places) == COULD_NOT
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("end", ["kill 15, $$; sleep 9", "exit 143", "exit 130", "exit 255", "kill 9, $$"])
def test_it_cannot_say_that_it_was_ended_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """That would end the worker, each time anew."""
    assert attempt(tmp_path, monkeypatch, end) == "ffmpeg was killed, 3 times"


def test_its_work_is_bounded_and_the_reason_says_so() -> None:
    done = subprocess.run(sandbox.enclosed([PERL, "-e", "1 while 1"], 1), capture_output=True, check=False, timeout=60)
    assert sandbox.ended_by(done.returncode) == signal.SIGXCPU


def test_it_gets_no_8_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "memory" in (attempt(tmp_path, monkeypatch, 'my $n = 8 << 30; my $x = "x" x $n; print length $x') or "").lower()
    )


def test_it_does_not_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither asleep nor at work, nor by a child of its own."""
    for program in ("sleep 1000", "fork; fork; sleep 1000", "1 while 1"):
        reason = attempt(tmp_path, monkeypatch, f"{program} # for ever", seconds=1)
        assert reason is not None
        assert "was not done with it in 1 seconds" in reason
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in lines if "for ever" in line and PERL in line] == []


def test_it_cannot_say_that_it_is_longer_than_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the room that its result may need would fail its batch."""
    program = (
        "binmode STDOUT; local $/; open(my $f, '<&=', 0); <$f>; my $page = pack('H*', $ARGV[0]);"
        "substr($page, 6, 8) = pack('Q<', $ARGV[2]); print pack('H*', $ARGV[1]), 'x' x 60000, $page"
    )
    opus = canary.OPUS.read_bytes()
    first, last = opus.index(b"OggS", 1), opus.rindex(b"OggS")
    pages = [opus[last:].hex(), opus[:first].hex()]
    for seconds, said in {5000: "more than it can hold", 10**9: "says that it is 1000000000 seconds long"}.items():
        assert said in (attempt(tmp_path, monkeypatch, program, *pages, 48_000 * seconds) or "")


def test_while_its_time_is_not_over_it_is_no_sign_that_the_worker_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else systemd would end the worker, and the next one over the same recording, for ever."""
    told: list[float] = []
    monkeypatch.setattr(transcode, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(notify, "progress", lambda: told.append(time.monotonic()))
    assert (
        attempt(tmp_path, monkeypatch, "sleep 1000", seconds=1) == "ffmpeg was not done with it in 1 seconds, 3 times"
    )
    assert len(told) >= 3 * 5


def test_it_forks_no_thousand_times() -> None:
    """As an ordinary user, as which a worker runs; the kernel counts no processes of root."""
    program = "for (1..1000) { my $p = fork; exit 3 unless defined $p; if (!$p) { sleep 60; exit } } exit 0"
    user = {"user": 61_003, "group": 61_003, "extra_groups": []} if os.getuid() == 0 else {}
    done = subprocess.run(
        sandbox.enclosed([PERL, "-e", program], 20), capture_output=True, check=False, timeout=60, **user
    )
    assert done.returncode == FAILS


def test_the_encoder_is_in_there(tmp_path: Path) -> None:
    """The same Opus comes out of it as without it."""
    assert encode(tmp_path).reason is None
    enclosed = (tmp_path / f"{item_of(NAME)}.opus").read_bytes()
    with canary.MP3.open("rb") as mp3, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "enclosed", lambda argv, cpu_seconds: argv)
        transcode.encode(mp3, tmp_path / "free.opus", bitrate=24_000)
    assert (tmp_path / "free.opus").read_bytes() == enclosed
