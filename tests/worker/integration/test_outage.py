"""Stores that hold the connection and say nothing."""

from __future__ import annotations

import os
import signal
import socket
from urllib.parse import urlsplit, urlunsplit

import pytest
from structlog.testing import capture_logs

from lab_audio import config, ledger
from lab_audio.errors import Retryable
from lab_audio.ledger import connection
from lab_audio.workers import loop
from lab_audio.workers.loop import Stop, patiently


def test_a_silent_server_is_not_waited_for_for_ever(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        where = urlsplit(env["DATABASE_URL"])._replace(netloc=f"lab:x@127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("DATABASE_URL", urlunsplit(where))
        engine = ledger.open_ledger(config.load(config.LedgerSettings))
        with pytest.raises(Retryable, match=r"no answer within 0\.2 s"):
            ledger.find_batch(engine, "x")


def test_a_connection_that_hangs_is_replaced(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ledger.open_ledger(config.load(config.LedgerSettings))
    ledger.migrate(engine)
    with engine.connect() as held:
        backend = held.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 2)
    os.kill(backend, signal.SIGSTOP)
    try:
        assert ledger.find_batch(engine, "x") is None
    finally:
        os.kill(backend, signal.SIGCONT)


def test_an_outage_is_said_once_a_minute_and_its_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [0.0], []
    answers = [Retryable(f"try {n}: PostgreSQL is away", "PostgreSQL") for n in range(12)]
    stop = Stop()

    def wait(timeout: float) -> bool:
        waited.append(timeout)
        now[0] += 10
        return False

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop.event, "wait", wait)

    def act() -> str:
        if answers:
            raise answers.pop()
        return "answer"

    with capture_logs() as logs:
        assert patiently(stop, act) == "answer"
        assert patiently(stop, act) == "answer"
    events = [entry["event"] for entry in logs]
    assert events[-1] == "the store answers again"
    assert events.count("the store answers again") == 1
    assert events.count("waiting for a store") == 2, "of two minutes"
    assert max(waited) <= 15
