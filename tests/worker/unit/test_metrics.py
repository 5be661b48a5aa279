"""A worker's metrics are served to whoever asks, and nobody takes its descriptors by saying nothing."""

from __future__ import annotations

import http.client
import socket
import threading

import pytest

from lab_audio import metrics


@pytest.fixture
def port() -> int:
    """Of a worker that serves its metrics."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = int(free.getsockname()[1])
    metrics.serve("127.0.0.1", number)
    for thread in threading.enumerate():
        if thread.name == "metrics":  # it ends when they are served
            thread.join(60)
    return number


def test_metrics_are_served(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    assert "lab_audio_release_info" in connection.getresponse().read().decode()
    connection.close()


@pytest.mark.parametrize("begun", [b"", b"GET /metrics HTTP/1.1\r\n"])
def test_a_connection_that_says_nothing_more_is_closed(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], begun: bytes
) -> None:
    monkeypatch.setattr(metrics.Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(begun)
        assert connection.recv(1) == b""
    assert capfd.readouterr().err == ""
