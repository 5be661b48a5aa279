"""`make demo`: recordings go the whole way on this machine, through the real programs, to an account.

SOUNDS=dir takes your own MP3s instead of the corpus; KEEP=1 keeps the servers up. All files are in .demo/: `env` is
the settings of the run that goes on, `run/` what it makes, with its logs, and `logs/` those of the last run.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lab_audio.media import sandbox

import corpus
from account import account
from models import POLICIES, assemble
from stack import Stack

CHECKOUT = Path(__file__).parents[2]
HOME = CHECKOUT / ".demo"
ENV = HOME / "env"
PROGRAM = Path(sys.executable).parent / "lab-audio"
HOST = "demo"
WORST_WER = 0.20
STUCK_SECONDS = 600
TELL_SECONDS = 10  # between two lines of progress, where there is no terminal
PR_SET_PDEATHSIG = 1

console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


class DemoFailed(Exception):
    """A step did not work; the message says which and where its log is."""


def main() -> int:
    end_with_make()
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("A demo is running in this checkout already.")
            return 1
        run = HOME / "run"
        shutil.rmtree(run, ignore_errors=True)
        try:
            return demo(run)
        except DemoFailed as failure:
            console.print(f"[bold red]{failure}[/]", soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("Interrupted.")
            return 130
        finally:
            ENV.unlink(missing_ok=True)
            shutil.rmtree(run, ignore_errors=True)


def end_with_make() -> None:
    """Turn requests to end into SystemExit, so that all is put away; be asked also when make is killed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    if "MAKELEVEL" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def demo(run: Path) -> int:
    own = os.environ.get("SOUNDS")
    sounds = Path(own).expanduser().resolve() if own else corpus.SOUNDS
    files = corpus.recordings(sounds) if sounds.is_dir() else []
    if not files:
        raise DemoFailed(f"SOUNDS: {sounds} holds no .mp3 files")
    for name in ("scratch", "tmp", "home"):
        (run / name).mkdir(parents=True)
    # Libraries keep caches there; nothing of the demo's is to lie elsewhere.
    os.environ |= {"TMPDIR": str(run / "tmp"), "HOME": str(run / "home"), "XDG_CACHE_HOME": str(run / "home")}

    say(f"{len(files)} recordings in {sounds}")
    say("Models: Whisper tiny.en, real weights; a tiny Gemma-2, RANDOM weights: its labels mean nothing.")
    assemble(HOME / "models")
    with Stack(run) as stack:
        say("SeaweedFS, Valkey and PostgreSQL are up on loopback ports.")
        env = settings(stack, run, sounds)
        if problem := sandbox.problem():
            say(f"ffmpeg runs WITHOUT A SANDBOX, as none works here ({problem}).")
            env["ALLOW_UNSANDBOXED"] = "true"
        leave_env(env)
        say("In another terminal, meanwhile: `. .demo/env; lab-audio status --watch`")
        say(f"Logs: {stack.directory.relative_to(CHECKOUT)}/*.log")
        with logs_kept(stack), closing(psycopg2.connect(stack.env["DATABASE_URL"])) as ledger:
            ledger.autocommit = True
            pipeline(stack, env, ledger, len(files))
            show_recordings(ledger)
            good = [show_errors(ledger)] if not own else []
            good.append(show_account(stack, ledger, run / "scratch", len(files)))
        if os.environ.get("KEEP") not in (None, "", "0"):
            keep()
    return 0 if all(good) else 1


def settings(stack: Stack, run: Path, sounds: Path) -> dict[str, str]:
    """The environment of the workers, as a unit would set it on a host."""
    return {
        **stack.env,
        "LAB_HOST": HOST,
        "SOURCE": str(sounds),
        "SOURCE_FATE": "keep",
        "SETTLE_SECONDS": "0",
        "BATCH_FILES": "8",
        "SCRATCH_ROOT": str(run / "scratch"),
        "TRANSFER_TMP": str(run / "tmp" / "transfer"),
        "MODELS_ROOT": str(HOME / "models"),
        "POLICIES_DIR": str(POLICIES),
        "DEVICES": "cpu",
    }


def pipeline(stack: Stack, env: dict[str, str], ledger: Any, files: int) -> None:
    """Run the real programs until nothing is left to do."""
    own = {**{k: v for k, v in os.environ.items() if k != "CREDENTIALS_DIRECTORY"}, **env}

    def start(command: str, *options: str) -> None:
        stack.spawn(command, [PROGRAM, command, *options], **own)

    def ended(command: str, code: int | None) -> None:
        if code != 0:
            how = "did not end when it was asked to" if code is None else f"ended with exit code {code}"
            raise DemoFailed(f"lab-audio {command} {how}:\n{stack.log(command)}")

    start("migrate")
    ended("migrate", stack.end("migrate", 60, ask=False))
    start("gpu-worker")
    start("unpack-worker")
    start("transfer-worker", "--once")
    columns = (TextColumn("{task.description:>12}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(name, total=files) for name in ("transferred", "unpacked", "transcribed")]
        seen: tuple[int, ...] | None = None
        moved = told = time.monotonic()
        while True:
            now = look(ledger)
            if not console.is_terminal and time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                say(f"{now[0]} of {files} transferred, {now[1]} unpacked, {now[2]} transcribed")
            if now != seen:
                seen, moved = now, time.monotonic()
                for bar, count in zip(bars, now[:3], strict=True):
                    progress.update(bar, completed=count)
            transfer = stack.exited("transfer-worker")
            if transfer == 0 and now[3] == 0:
                break
            if transfer:
                ended("transfer-worker", transfer)
            for command in ("gpu-worker", "unpack-worker"):
                if (code := stack.exited(command)) is not None:
                    ended(command, code or -1)
            if time.monotonic() - moved > STUCK_SECONDS:
                raise DemoFailed(f"nothing moved for {STUCK_SECONDS} s:\n{stack.log('gpu-worker')}")
            time.sleep(0.1)
    for command in ("unpack-worker", "gpu-worker"):
        ended(command, stack.end(command, 60))


def look(ledger: Any) -> tuple[int, ...]:
    """Recordings transferred, unpacked, settled; batches that are open or still have something on a host."""
    return tuple(
        rows(
            ledger,
            "SELECT (SELECT coalesce(sum(file_count), 0)::int FROM batches WHERE state <> 'minted'),"
            " (SELECT count(*) FROM audio_files),"
            " (SELECT count(*) FROM audio_files WHERE state <> 'pending'),"
            " (SELECT count(*) FROM batches WHERE state NOT IN ('complete', 'failed') OR host IS NOT NULL)",
        )[0]
    )


def show_recordings(ledger: Any) -> None:
    policies = [row[0] for row in rows(ledger, "SELECT DISTINCT policy FROM classifications ORDER BY 1")]
    labels: dict[int, dict[str, str]] = {}
    for audio_id, policy, label, score in rows(ledger, "SELECT audio_id, policy, label, score FROM classifications"):
        labels.setdefault(audio_id, {})[policy] = f"{label} {score:.2f}"
    table = Table("file", "lang.", "transcript", *(p.replace("_", " ") for p in policies), "S3 key")
    table.columns[0].overflow = "fold"
    table.columns[2].ratio = 1
    for column in table.columns[3:-1]:
        column.max_width = 14
    for audio_id, member, state, reason, key, language, text, speech in rows(
        ledger,
        "SELECT audio_id, member, state, a.reason, s3_opus_path, language, text, speech"
        " FROM audio_files a LEFT JOIN transcripts t USING (audio_id) ORDER BY member",
    ):
        said = text if speech else "(no speech)" if state == "done" else f"({state}: {reason})"
        verdicts = (labels.get(audio_id, {}).get(policy, "-") for policy in policies)
        table.add_row(*(Text(cell or "-") for cell in (member, language, said, *verdicts, key)))
    console.print(table)
    say("The labels come from a classifier with random weights: they show the way, not a judgement.")


def show_errors(ledger: Any) -> bool:
    """Word error rate against what was really said; False if it is too high."""
    heard = dict(rows(ledger, "SELECT member, text FROM audio_files JOIN transcripts USING (audio_id)"))
    truth = corpus.true_texts()
    rate = corpus.word_error_rate((text, heard.get(name) or "") for name, text in truth.items())
    good = rate <= WORST_WER
    say(f"Word error rate against the true text: {rate:.1%} (at most {WORST_WER:.0%}) {mark(good)}")
    return good


def show_account(stack: Stack, ledger: Any, scratch: Path, files: int) -> bool:
    """Print the closing account; True if every line of it is as it should be."""

    on_scratch = sum(
        path.stat().st_size
        for folder in scratch.iterdir()
        if not folder.name.startswith(".")
        for path in (folder, *folder.rglob("*"))
    )
    policies = len(list(POLICIES.glob("*.txt")))
    with closing(redis.Redis.from_url(stack.env["REDIS_URL"], decode_responses=True)) as queue:
        stores = (ledger, stack.s3(), stack.env["S3_BUCKET"], queue)
        lines = account(*stores, files=files, policies=policies, on_scratch=on_scratch)
    table = Table("account", "expected", "found", "")
    for column in table.columns[1:3]:
        column.justify = "right"
    for name, expected, found in lines:
        table.add_row(name, str(expected), str(found), mark(expected == found))
    console.print(table)
    good = all(expected == found for _, expected, found in lines)
    clean = "The account is clean: every recording came through exactly once."
    say(clean if good else "[bold red]The account is off.[/]")
    return good


def leave_env(env: dict[str, str]) -> None:
    """Leave this run's settings for a shell that wants to look at it."""
    lines = [f"export {key}={shlex.quote(value)}\n" for key, value in env.items()]
    ENV.touch(0o600)
    ENV.write_text("".join([*lines, f"export PATH={shlex.quote(str(PROGRAM.parent))}:$PATH\n"]))


def keep() -> None:
    """Leave the servers up until ^C, and say how to reach them."""
    say("KEEP: the servers stay up until Ctrl-C. In another terminal:\n")
    say(". .demo/env")
    say("lab-audio status")
    say("lab-audio unpack-worker & lab-audio gpu-worker &     # no worker runs now; these would take new jobs")
    try:
        signal.pause()
    except KeyboardInterrupt:
        say("\nStopping.")


@contextmanager
def logs_kept(stack: Stack) -> Iterator[None]:
    """Keep the logs of this run in .demo/logs, also when it fails."""
    try:
        yield
    finally:
        logs = HOME / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir()
        for log in stack.directory.glob("*.log"):
            shutil.copyfile(log, logs / log.name)


def rows(ledger: Any, query: str) -> list[Any]:
    with ledger.cursor() as cursor:
        cursor.execute(query)
        result: list[Any] = cursor.fetchall()
        return result


def mark(good: bool) -> str:
    return "[green]ok[/]" if good else "[bold red]OFF[/]"


def say(text: str) -> None:
    console.print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
