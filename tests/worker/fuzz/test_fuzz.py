"""Every parser of strangers' bytes, fed with broken forms of good ones, FUZZ_SECONDS each (default: 14)."""

from __future__ import annotations

import os
import random
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from targets import TARGETS

SECONDS = float(os.environ.get("FUZZ_SECONDS", "14"))
ROUND = 200  # examples between two looks at the clock

# Where, how many bytes go, and what comes in their place.
cuts = st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 2, 8, 100, 512, 5000]), st.binary(max_size=24))
doublings = st.tuples(st.floats(0, 1), st.integers(1, 2000))


def broken(data: bytes, changes: list[tuple[float, int, bytes]], doubled: list[tuple[float, int]]) -> bytes:
    for where, size in doubled:
        at = int(where * len(data))
        data = data[: at + size] + data[at:]
    for where, gone, instead in changes:
        at = int(where * len(data))
        data = data[:at] + instead + data[at + gone :]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_it_keeps_its_word(name: str) -> None:
    target = TARGETS[name]
    begin = random.randrange(1 << 32)
    print(f"seed {begin}")
    made = st.builds(broken, st.sampled_from(target.seeds), st.lists(cuts, max_size=4), st.lists(doublings, max_size=1))
    until, rounds = time.monotonic() + SECONDS, 0
    while not rounds or time.monotonic() < until:

        @seed(begin + rounds)
        @settings(max_examples=ROUND, database=None, suppress_health_check=list(HealthCheck))
        @given(made | st.binary(max_size=2000))
        def check(data: bytes) -> None:
            target.check(data)

        check()
        rounds += 1
    print(f"{rounds * ROUND} examples")
