"""Each worker is killed before each of its effects in turn; then all run again, and all is accounted for."""

from __future__ import annotations

import pytest

from crash import plant, snags_after_kill
from world import World


@pytest.mark.parametrize(
    ("role", "part", "parts"), [("transfer", 0, 1), ("unpack", 0, 1), *(("gpu", part, 4) for part in range(4))]
)
def test_killed_before_each_effect(world: World, role: str, part: int, parts: int) -> None:
    """Of the GPU worker's effects, a fourth each."""
    plant(world, role)
    _, effects = world.run(role)
    world.finish(transfer=role == "transfer")
    assert world.snags() == []
    assert len(effects) > 10
    for place in range(1 + part, len(effects) + 1, parts):
        snags = snags_after_kill(world, role, place)
        assert snags == [], f"{role} killed before effect {place}, {effects[place - 1]}"


@pytest.mark.parametrize("role", ["transfer", "unpack", "gpu"])
def test_killed_twice_in_a_row(world: World, role: str) -> None:
    plant(world, role)
    _, effects = world.run(role)
    for place in range(3, len(effects) + 1, 6):
        snags = snags_after_kill(world, role, place, place // 2 + 1)
        assert snags == [], f"{role} killed before effect {place}, then before {place // 2 + 1}"
