"""One worker killed at chosen effects, all of them run to the end, and what is wrong then."""

from __future__ import annotations

from world import MUTANT, World

NAMES = ["a.mp3", "b/c.mp3", "d.MP3"]


def plant(world: World, role: str) -> None:
    """Bring a fresh lab to where `role` has everything to do."""
    world.reset()
    if role == "transfer":
        world.plant_files(NAMES)
        return
    world.plant_batch(1, NAMES)
    if role == "gpu":
        world.run("unpack")


def snags_after_kill(world: World, role: str, *places: int, mutant: MUTANT | None = None) -> list[str]:
    """Kill `role` before each of these effects in turn, then run all to the end."""
    plant(world, role)
    for place in places:
        world.run(role, kill_before=place, mutant=mutant)
    snags = world.snags_in_redis()
    transcribed = world.rows("SELECT audio_id, created_at FROM transcripts")
    tried = dict(world.rows("SELECT audio_id, attempts FROM audio_files WHERE state = 'done'"))
    world.finish(transfer=role == "transfer", mutant=mutant)
    snags += world.snags()
    if not set(transcribed) <= set(world.rows("SELECT audio_id, created_at FROM transcripts")):
        snags.append("a finished item's transcript was made again")
    now = dict(world.rows("SELECT audio_id, attempts FROM audio_files"))
    if any(now.get(audio_id) != attempts for audio_id, attempts in tried.items()):
        snags.append("a finished item went through the models again")
    return snags
