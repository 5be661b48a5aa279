"""The three kinds of error, and what a worker does with each.

Retryable: a store is away. The worker waits in place and tries again; nothing is blamed.
Permanent: this payload, batch or recording is bad. It is set aside with the message as its reason.
Fatal: this process is sick (configuration, GPU, disk). Work is handed back uncounted and the process exits.
"""

from __future__ import annotations


class LabAudioError(Exception):
    """Base of all errors that this package raises on purpose; the message is written for a person."""


class Retryable(LabAudioError):
    """A store did not answer, or refused for now. `store`: which, so that it is not complained of by each thread."""

    def __init__(self, message: str, store: str = "") -> None:
        super().__init__(message)
        self.store = store


class Permanent(LabAudioError):
    """The input is bad and will be bad next time."""


class NotFound(Permanent):
    """The object is not in the store."""


class Fatal(LabAudioError):
    """The process cannot do its work."""

    exit_code = 70


class ConfigError(Fatal):
    """A setting is missing or wrong; the message names the key."""

    exit_code = 78
