"""Each atomic step is split or left out: the search must find a kill that then loses or doubles something.

Nothing that heals runs here: no reconcile, no host loss, and transfer only where it is itself under test.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from lab_audio.workers import gpu_worker

from crash import plant, snags_after_kill
from mutants import MUTANTS
from world import World


@pytest.mark.parametrize(("role", "mutant", "hint"), MUTANTS, ids=[f"{r}-{m.__name__}" for r, m, _ in MUTANTS])
def test_the_search_finds_a_step_that_is_not_atomic(
    world: World, role: str, mutant: Callable[[], None], hint: str
) -> None:
    def broken() -> None:
        in_one_thread()
        mutant()

    plant(world, role)
    _, effects = world.run(role, mutant=broken)
    hinted = [place for place, effect in enumerate(effects, 1) if effect.startswith(hint)]
    places = sorted(range(1, len(effects) + 1), key=lambda place: min(abs(place - hint) for hint in hinted))
    assert any(found(world, role, place, broken) for place in places)


def found(world: World, role: str, place: int, mutant: Callable[[], None]) -> bool:
    try:
        return bool(snags_after_kill(world, role, place, mutant=mutant))
    except AssertionError:  # a worker ended with an error: noticed as well
        return True


def in_one_thread() -> None:
    """Effects come in the same order in every run."""

    class Inline(Executor):
        def submit(self, act: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            try:
                future.set_result(act(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)
            return future

    gpu_worker.ThreadPoolExecutor = lambda *_, **__: Inline()
