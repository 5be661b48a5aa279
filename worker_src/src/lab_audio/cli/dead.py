"""`lab-audio dead`: what was set aside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lab_audio import config
from lab_audio.cli.app import app, run
from lab_audio.cli.operate import open_stores
from lab_audio.errors import Permanent
from lab_audio.log import plain
from lab_audio.operations import dead_letters
from lab_audio.operations.reconcile import Stores

SHOWN = 100

dead = typer.Typer(
    name="dead",
    help="What was set aside with a reason: recordings, batches, and payloads that no row stands for.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(dead)

Names = Annotated[list[str], typer.Argument(help="audio_id, batch_id or payload-..., as `dead list` says.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dead.command("list")
def list_letters(
    everything: Annotated[bool, typer.Option("--all", help="Also what was dropped.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what was set aside and neither retried nor dropped, newest first."""

    def act() -> None:
        letters = dead_letters.letters(open_stores(config.load(config.StoreSettings)), dropped=everything)
        if as_json:
            typer.echo("[", nl=False)
            for number, letter in enumerate(letters):
                typer.echo((",\n " if number else "") + json.dumps(vars(letter), default=str), nl=False)
            typer.echo("]")
            return
        wide = (Column(name, overflow="fold") for name in ("member", "reason"))
        name, batch, since = (Column(name, no_wrap=True) for name in ("name", "batch", "since"))
        table = Table(name, batch, *wide, "attempts", "host", since, box=None)
        for letter in islice(letters, SHOWN):
            died = f"{letter.since:%Y-%m-%d %H:%M}" if letter.since else None
            reason = f"(dropped) {letter.reason}" if letter.dropped_at else letter.reason
            cells = (letter.name, letter.batch_id, letter.member, reason, letter.attempts, letter.host, died)
            table.add_row(*(Text("-" if cell is None else plain(cell)) for cell in cells))
        if not table.row_count:
            typer.echo("nothing is dead")
            return
        Console(width=None if sys.stdout.isatty() else 10_000).print(table)  # in a file each has one line
        if more := len(list(letters)):
            typer.echo(f"... and {more} more: see --json")

    run(act)


@dead.command()
def show(
    name: Annotated[str, typer.Argument(help="audio_id, batch_id or payload-..., as `dead list` says.")],
    save: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the recording to this file, as it is in its archive.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show everything known of one, and get its recording back."""

    def act() -> None:
        stores = open_stores(config.load(config.StoreSettings))
        try:
            found = dead_letters.show(stores, name)
            if save is not None:
                found["saved_bytes"] = dead_letters.save(stores, name, save)
        except Permanent as error:
            raise Permanent(f"{plain(name)}: {plain(error)}") from None
        if as_json:
            typer.echo(json.dumps(found, default=str, indent=2))
            return
        for key, value in found.items():
            typer.echo(f"{key.replace('_', ' '):18} {'-' if value is None or value == [] else plain(value)}")

    run(act)


@dead.command()
def retry(names: Names) -> None:
    """Try them again: their batch is unpacked anew, and what is not done in it goes through the models.

    A batch_id stands for the batch and all dead recordings in it. The archive must be there, and the batch ended.
    """
    answer(names, dead_letters.retry)


@dead.command()
def drop(names: Names) -> None:
    """Accept that they are dead: they are not listed any more, and keep their archive no longer from retention.

    A batch_id stands for the batch and all dead recordings in it. `retry` still works while the archive is there.
    """
    answer(names, dead_letters.drop)


def answer(names: list[str], act_on: Callable[[Stores, list[str]], Iterator[tuple[str, str | Permanent]]]) -> None:
    """Say of each name what became of it. Ends with 1 if there is one that nothing became of."""

    def act() -> None:
        wanted, refused = list(dict.fromkeys(names)), 0
        for name, outcome in act_on(open_stores(config.load(config.StoreSettings)), wanted):
            refused += isinstance(outcome, Permanent)
            typer.echo(f"{plain(name)}: {plain(outcome)}", err=isinstance(outcome, Permanent))
        if refused:
            raise Permanent(f"{refused} of {len(wanted)} refused")

    run(act)
