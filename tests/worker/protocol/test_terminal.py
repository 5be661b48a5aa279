"""What an operator sees of batches and recordings, on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from lab_audio.contracts import item_of

from stack import Stack
from world import World, eventually

PROGRAM = Path(sys.executable).with_name("lab-audio")


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


def test_a_batch_that_nobody_knows(world: World) -> None:
    assert "no batch has this id" in world.command("batch", world.BATCH(7), code=1).stderr
    assert "is not YYYYMMDD" in world.command("batch", "../etc", code=1).stderr


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
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run([str(PROGRAM), "--show-completion", shell], capture_output=True, text=True, check=True)
        assert "_LAB_AUDIO_COMPLETE" in done.stdout
    env = {**os.environ, "_LAB_AUDIO_COMPLETE": "complete_bash", "COMP_WORDS": "lab-audio check", "COMP_CWORD": "1"}
    done = subprocess.run([str(PROGRAM)], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["check", "check-health"]
