"""What systemd hears of a worker: on its own socket, from the workers' own loops."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab_audio import notify
from lab_audio.errors import Retryable
from lab_audio.workers import gpu_worker, loop, recognition
from lab_audio.workers.loop import Stop, in_background, patiently


class Systemd:
    """The end that systemd listens at."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        lines = []
        while True:
            try:
                lines += self.socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return lines


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process does; progress is told at once."""
    for name, value in {"ready": False, "at": -1e9, "status": "", "pulse": None}.items():
        monkeypatch.setattr(notify._Told, name, value)
    monkeypatch.setattr(notify, "TELL_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_complained", {})


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    address = f"{tmp_path}/notify" if request.param == "path" else f"@lab-audio-{tmp_path.name}"
    listening = Systemd(address if address[0] == "/" else "\0" + address[1:])
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    yield listening
    listening.socket.close()


def test_ready_is_said_once_for_each_status(systemd: Systemd) -> None:
    notify.ready("waiting for\narchives")
    notify.ready("waiting for\narchives")
    assert systemd.heard() == ["READY=1", "STATUS=waiting for archives"]


def test_progress_prolongs_the_start_and_feeds_the_watchdog_once_ready(systemd: Systemd) -> None:
    notify.progress()
    assert systemd.heard() == ["EXTEND_TIMEOUT_USEC=300000000"]
    notify.ready("")
    systemd.heard()
    notify.progress()
    assert systemd.heard() == ["WATCHDOG=1"]


def test_progress_is_told_sparingly(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "TELL_SECONDS", 60.0)
    for _ in range(1000):
        notify.progress()
    assert len(systemd.heard()) == 1


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for address in ("", str(tmp_path / "gone"), "/" + "x" * 200):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify.ready("")
        notify.progress()


def test_a_thread_beside_the_work_feeds_nothing(systemd: Systemd) -> None:
    notify.ready("")
    systemd.heard()
    stop = Stop()

    def beats() -> None:
        patiently(stop, lambda: None)
        stop.wait(0.01)

    in_background(stop, "beat", beats).join()
    assert systemd.heard() == []
    worker = threading.Thread(target=patiently, args=(stop, lambda: None))  # as a decoder of the GPU worker
    worker.start()
    worker.join()
    assert systemd.heard() == ["WATCHDOG=1"]


def test_waiting_for_a_store_is_said_and_is_no_hang(systemd: Systemd) -> None:
    notify.ready("unpacking 20250622-143052-a1b2c3")
    systemd.heard()
    answers = iter([Retryable("PostgreSQL at db:5432: refused", "a store of this test"), None])

    def ask() -> None:
        if error := next(answers):
            raise error

    patiently(Stop(), ask)
    heard = systemd.heard()
    assert heard[:2] == ["WATCHDOG=1", "STATUS=waiting: PostgreSQL at db:5432: refused"]
    assert heard[-1] == "STATUS=unpacking 20250622-143052-a1b2c3"


def test_a_long_pause_feeds_the_watchdog(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WAIT_SECONDS", 0.02)
    assert Stop().wait(0.1) is False
    assert len(systemd.heard()) >= 3


def test_a_pause_ends_when_asked_to_stop() -> None:
    stop = Stop()
    threading.Timer(0.05, stop.event.set).start()
    began = time.monotonic()
    assert stop.wait(60) is True
    assert time.monotonic() - began < 5


def test_a_worker_that_is_asked_to_stop_says_so(systemd: Systemd) -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = Stop().on_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert systemd.heard() == ["STOPPING=1", "STATUS=finishing what is in hand"]


class TestGpuProcesses:
    """The parent speaks for its processes: for all of them, or not at all."""

    def test_a_process_with_a_pulse_says_nothing_itself(self, systemd: Systemd) -> None:
        pulse = get_context("spawn").Value("d", 0.0, lock=False)
        notify.report_to(pulse)
        notify.progress()
        notify.ready("")
        assert systemd.heard() == []
        assert time.monotonic() < pulse.value <= time.monotonic() + notify.PATIENCE_SECONDS

    def test_a_call_of_the_models_may_take_its_time(self) -> None:
        pulse = SimpleNamespace(value=0.0)
        notify.report_to(pulse)
        with recognition.watchdog(samples=16000 * 3600):
            notify.progress()  # an upload meanwhile does not shorten it
        assert pulse.value > time.monotonic() + 4 * 3600

    @staticmethod
    def told(systemd: Systemd, values: list[float], due: float = 0.0, living: tuple[int, ...] = (0, 1)) -> list[str]:
        devices = [f"cuda:{number}" for number in range(len(values))]
        children: list[Any] = [object() if number in living else None for number in range(len(values))]
        pulses = [SimpleNamespace(value=value) for value in values]
        gpu_worker.tell(devices, children, pulses, [due] * len(values))
        return systemd.heard()

    def test_ready_once_one_has_its_models(self, systemd: Systemd) -> None:
        now = time.monotonic()
        assert self.told(systemd, [0.0, 0.0], due=now) == ["EXTEND_TIMEOUT_USEC=300000000"]
        said = self.told(systemd, [now + 60, 0.0], due=now)
        assert said == ["READY=1", "STATUS=serves cuda:0, 1 of 2 devices", "WATCHDOG=1"]

    def test_one_that_is_silent_is_enough(self, systemd: Systemd) -> None:
        now = time.monotonic()
        self.told(systemd, [now + 60, now + 60])
        assert self.told(systemd, [now + 60, now + 60]) == ["WATCHDOG=1"]
        assert self.told(systemd, [now + 60, now - 1]) == []

    def test_one_that_loads_for_ever(self, systemd: Systemd) -> None:
        now = time.monotonic()
        self.told(systemd, [now + 60, 0.0], due=now)
        assert self.told(systemd, [now + 60, 0.0], due=now - gpu_worker.LOAD_SECONDS - 1) == []

    def test_a_dead_one_is_started_again_and_does_not_count(self, systemd: Systemd) -> None:
        now = time.monotonic()
        self.told(systemd, [now + 60, now - 1], living=(0,))
        assert self.told(systemd, [now + 60, now - 1], living=(0,)) == ["WATCHDOG=1"]
