"""What an operator sees of batches and recordings, on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lab_audio import ledger
from lab_audio.contracts import item_of
from lab_audio.errors import Retryable

from stack import Stack
from world import World, eventually

PROGRAM = Path(sys.executable).with_name("lab-audio")
OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


def test_each_recording_of_a_batch_has_one_line(world: World) -> None:
    names = ["a.mp3", "b c.mp3", "odd\nname.mp3", "poison.mp3", "x" * 300 + ".mp3"]
    batch_id = world.plant_batch(1, names)
    world.finish()
    head, *lines = world.command("batch", batch_id).stdout.splitlines()
    assert head.split() == ["audio_id", "item", "state", "attempts", "host", "seconds", "member", "reason"]
    assert len(lines) == len(names)
    rows = {line.split()[1]: line for line in lines}
    assert set(rows) == {item_of(name) for name in names}
    assert "odd\\nname.mp3" in rows[item_of("odd\nname.mp3")]
    poisoned = rows[item_of("poison.mp3")].split()
    assert poisoned[2:5] == ["dead", "5", "h1"] and "given up after 5 attempts" in " ".join(poisoned)

    found = json.loads(world.command("batch", batch_id, "--json").stdout)
    assert (found["state"], found["done"], found["dead"]) == ("complete", 4, 1)
    assert {one["member"]: one["state"] for one in found["recordings"]}["poison.mp3"] == "dead"


def test_the_newest_batches_are_listed_also_those_that_have_ended(world: World) -> None:
    assert world.command("batch").stdout == "no batches yet\n"
    batch_ids = [world.plant_batch(n, ["a.mp3", "b.mp3"]) for n in range(1, 22)]
    world.finish()
    head, *lines = world.command("batch").stdout.splitlines()
    assert head.split() == ["batch", "state", "host", "for", "progress", "done", "dead", "of"]
    assert [line.split()[0] for line in lines] == sorted(batch_ids, reverse=True)[:20]
    assert all(line.split()[1] == "complete" and line.split()[-3:] == ["2", "0", "2"] for line in lines)
    newest = json.loads(world.command("batch", "--json").stdout)[0]
    assert (newest["batch_id"], newest["state"], newest["done"]) == (max(batch_ids), "complete", 2)


def test_a_batch_that_nobody_knows(world: World) -> None:
    assert "no batch has this id" in world.command("batch", world.BATCH(7), code=1).stderr
    assert "is not YYYYMMDD" in world.command("batch", "../etc", code=1).stderr


def test_status_tells_of_each_list_how_much_waits_and_for_how_long(world: World) -> None:
    world.plant_batch(1, ["a.mp3", "b.mp3"])
    view = json.loads(world.command("status", "--json").stdout)
    assert view["queues"] == {"unpack": 1, "transcribe": 0, "dead": 0}
    assert view["oldest_seconds"] == dict.fromkeys(view["queues"])  # the ledger does not know the batch yet
    world.run("unpack")
    view = json.loads(world.command("status", "--json").stdout)
    assert view["queues"] == {"unpack": 0, "transcribe": 0, "transcribe:h1": 2, "dead": 0}
    assert view["oldest_seconds"]["transcribe:h1"] >= 0
    lists = [line.split() for line in world.command("status").stdout.splitlines()]
    assert ["unpack", "0", "-"] in lists and ["transcribe:h1", "2"] in [line[:2] for line in lists]


def test_an_archive_is_fetched_where_nothing_lies_in_the_way(world: World, tmp_path: Path) -> None:
    batch_id, file = world.plant_batch(1, ["a.mp3"]), tmp_path / "a.tar"
    assert world.command("fetch-archive", batch_id, str(file)).stdout == f"{file}\n"
    with tarfile.open(file) as archive:
        assert archive.getnames() == ["a.mp3"]
    file.write_text("mine")
    assert f"{file} is there already" in world.command("fetch-archive", batch_id, str(file), code=1).stderr
    assert file.read_text() == "mine"
    said = world.command("fetch-archive", batch_id, str(tmp_path / "b" / "a.tar"), code=1).stderr
    assert f"{tmp_path}/b is no directory" in said and list(tmp_path.glob("b*")) == []
    said = world.command("fetch-archive", batch_id, str(tmp_path / ("c" * 300)), code=1).stderr
    assert "cannot be written: File name too long" in said


@pytest.mark.parametrize("command", ["reconcile", "retention"])
def test_what_was_done_is_told_also_where_it_cannot_be_noted(
    world: World, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    report = {"reconcile": "1 adopted archives", "retention": "1 deleted"}[command]

    def plant() -> None:
        world.plant_batch(1, ["a.mp3"])
        if command == "retention":
            world.finish()
            world.sql("UPDATE batches SET complete_at = now() - interval '8 days'")

    plant()
    done = world.command(command, TEXTFILE_DIRECTORY="/nonexistent")
    assert report in done.stdout and "TEXTFILE_DIRECTORY: /nonexistent cannot be written" in done.stderr
    world.reset()
    plant()

    def away(*_: object) -> None:
        raise Retryable("PostgreSQL is away")

    monkeypatch.setattr(ledger, "note_run", away)
    assert report in world.command(command, code=1).stdout


def test_watching_survives_a_store_that_is_away(world: World, stack: Stack) -> None:
    """On a real terminal, whose screen is what we read."""
    batch_id = world.plant_batch(1, ["a.mp3"])
    world.run("unpack")
    screen, terminal = pty.openpty()
    env = {**os.environ, **world.environment, "TERM": "xterm", "COLUMNS": "150"}
    program = subprocess.Popen([str(PROGRAM), "status", "--watch"], env=env, stdin=terminal, stdout=terminal)
    os.close(terminal)
    said = b""

    def shows(text: str) -> bool:
        nonlocal said
        said += os.read(screen, 1 << 16)
        return text.encode() in said

    try:
        eventually(lambda: shows(batch_id), 60)
        said = b""
        stack.stop_one("valkey")
        try:
            eventually(lambda: shows("not now: Redis"), 60)
        finally:
            stack.start_one("valkey")
        said = b""
        world.sql("UPDATE hosts SET paused = true")
        eventually(lambda: shows("paused"), 60)
        assert program.poll() is None
    finally:
        program.kill()
        program.wait()
        os.close(screen)


def test_the_shell_completes_commands() -> None:
    (told,) = re.findall(r"`_LAB_AUDIO_COMPLETE=(\w+) lab-audio >", OPERATIONS.read_text())
    for how in (told, "source_zsh", "source_fish"):
        env = {**os.environ, "_LAB_AUDIO_COMPLETE": how}
        done = subprocess.run([str(PROGRAM)], env=env, capture_output=True, text=True, check=True)
        assert f"_LAB_AUDIO_COMPLETE={how.replace('source', 'complete')}" in done.stdout
    env = {**os.environ, "_LAB_AUDIO_COMPLETE": "complete_bash", "COMP_WORDS": "lab-audio check", "COMP_CWORD": "1"}
    done = subprocess.run([str(PROGRAM)], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["check", "check-health"]
