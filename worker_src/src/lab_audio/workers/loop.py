"""What all workers share: being asked to stop, and waiting for a store that is away."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import tenacity

from lab_audio import metrics, notify
from lab_audio.errors import Fatal, LabAudioError, Retryable
from lab_audio.log import get_logger

P = ParamSpec("P")
T = TypeVar("T")

COMPLAIN_SECONDS = 60
WAIT_SECONDS = 30.0
_complained: dict[str, float] = {}  # when each store was last said to be away
_away: set[str] = set()  # those of which that was the last that was said


class Stopped(Exception):
    """The worker was asked to stop while it waited; what it held stays in its processing list."""


class Stop:
    """Set when the worker is to claim nothing more; keeps the error if one was the reason."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.failure: BaseException | None = None

    def __call__(self) -> bool:
        return self.event.is_set()

    def on_signals(self) -> Stop:
        """Stop at SIGTERM and SIGINT. A second SIGINT interrupts at once."""

        def handler(number: int, frame: object) -> None:
            if self.event.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.event.set()
            notify.stopping()

        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)
        return self

    def fail(self, error: BaseException) -> None:
        """Stop because of an error; the first one counts."""
        self.failure = self.failure or error
        self.event.set()

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until asked to stop; a worker with nothing to do is no stuck one."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.event.wait(min(left, WAIT_SECONDS)):
            notify.progress()
        return self.event.is_set()

    def check(self) -> None:
        """Raise the error that stopped the worker, if it was one."""
        if self.failure is not None:
            raise self.failure


def patiently(stop: Stop, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `act` until its store answers, saying so once a minute. Raises Stopped if asked to stop meanwhile."""
    missed: set[str] = set()

    def complain(state: tenacity.RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        store = error.store if isinstance(error, Retryable) else ""
        missed.add(store)
        metrics.RETRIES.labels(store or "source").inc()
        notify.progress()
        if time.monotonic() - _complained.get(store, -float(COMPLAIN_SECONDS)) >= COMPLAIN_SECONDS:
            _complained[store] = time.monotonic()
            _away.add(store)
            get_logger().warning("waiting for a store", error=str(error))
            notify.waiting(str(error))

    def give_up(state: tenacity.RetryCallState) -> Any:
        raise Stopped

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Retryable),
        wait=tenacity.wait_random_exponential(multiplier=0.4, max=15),
        sleep=tenacity.sleep_using_event(stop.event),
        stop=tenacity.stop_when_event_set(stop.event),
        before_sleep=complain,
        retry_error_callback=give_up,
    )
    answer = retrying(act, *args, **kwargs)
    notify.progress()
    for store in missed & _away:
        _away.discard(store)
        get_logger().info("the store answers again", store=store)
        notify.status()
    return answer


def in_background(stop: Stop, name: str, act: Callable[[], None]) -> threading.Thread:
    """Run `act`, which is beside the work, in a thread; an error in it stops the worker."""

    def run() -> None:
        notify.aside()
        try:
            act()
        except Stopped:
            pass
        except BaseException as error:
            stop.fail(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def say(line: str) -> None:
    print(f"lab-audio: {line}", file=sys.stderr)


def say_last(line: str) -> None:
    """A worker's last words: for a person on a terminal, else an event as all that it logs."""
    if sys.stderr.isatty():
        say(line)
    else:
        get_logger().critical("this worker ends", reason=line)


def exit_code(act: Callable[[], object], tell: Callable[[str], None] = say) -> int:
    """Run `act` and tell an error of ours: 0, 78 for configuration, 70 for other fatal errors, else 1."""
    try:
        act()
    except Stopped:
        return 0
    except Fatal as error:
        for line in str(error).splitlines():
            tell(line)
        return error.exit_code
    except LabAudioError as error:
        tell(str(error))
        return 1
    return 0
