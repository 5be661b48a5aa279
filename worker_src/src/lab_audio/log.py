"""One JSON line an event on stderr; on a terminal, the same event for a person."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure(level: str = "INFO", host: str | None = None) -> None:
    """Set up structlog once, at the start of a process. Each event names the host; warnings of libraries are events."""
    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            lambda _logger, _method, event: {"host": host, **event} if host else event,
            _harmless if terminal else structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_Library()], level=logging.WARNING, force=True)


def _harmless(_logger: Any, _method: str, event: Any) -> Any:
    """What strangers wrote tells a terminal nothing."""
    return {key: plain(value) if isinstance(value, str) else value for key, value in event.items()}


class _Library(logging.Handler):
    """What a library has to say, as one of our events; a call of it that is wrong never reaches its caller."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = min(max(round(record.levelno, -1), logging.DEBUG), logging.CRITICAL)
            get_logger().log(level, record.getMessage().strip(), library=record.name, exc_info=record.exc_info)
        except Exception:
            self.handleError(record)


def get_logger() -> Any:
    return structlog.get_logger()


def plain(value: object) -> str:
    """A stranger's text on one line of a terminal: control characters, and bytes that are no UTF-8, are written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def duration(seconds: float) -> str:
    """A time for a person, in the largest unit of which there are two."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
