"""The command line: `lab-audio`."""

from lab_audio.cli import check, dead, health, operate, status, workers  # noqa: F401 (each enters its commands)
from lab_audio.cli.app import app


def main() -> None:
    app()
