"""What all commands share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from lab_audio.contracts import is_utf8
from lab_audio.workers.loop import exit_code, say

app = typer.Typer(
    name="lab-audio",
    help="Recordings from a source host to transcripts, labels and kept Opus; none lost, none counted twice.\n\n"
    "Settings come from the environment and, for secrets, from files in $CREDENTIALS_DIRECTORY;"
    " `lab-audio settings` lists them all.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("lab-audio"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, help="Print the version.")] = False,
) -> None:
    pass


def run(act: Callable[[], object], tell: Callable[[str], None] = say) -> None:
    """Run a command's work and leave with its exit code."""
    try:
        raise typer.Exit(exit_code(act, tell))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def utf8(value: str | None) -> str | None:
    """Refuse a name that is not UTF-8, which no store takes."""
    if value is not None and not is_utf8(value):
        raise typer.BadParameter("it is not UTF-8")
    return value
