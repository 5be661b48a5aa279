"""`lab-audio status` and `lab-audio batch`: how far it is."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from time import sleep
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lab_audio import config, ledger, queues
from lab_audio.cli.app import app, run
from lab_audio.contracts import check_batch_id
from lab_audio.errors import Permanent, Retryable
from lab_audio.log import duration, plain
from lab_audio.operations.health import waiting

NEWEST = 20


class StatusSettings(config.LedgerSettings, config.QueueSettings):
    """What `status` reads."""


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing, until Ctrl-C.")] = False,
) -> None:
    """Show open batches with their progress, hosts and queues."""

    def act() -> None:
        settings = config.load(StatusSettings)
        engine, client = ledger.open_ledger(settings), queues.open_queues(settings)

        def look() -> dict[str, Any]:
            lists = waiting(engine, client)
            return {
                "batches": [vars(batch) for batch in ledger.open_batches(engine)],
                "hosts": [vars(host) for host in ledger.seen_hosts(engine)],
                "queues": {one.name: one.jobs for one in lists},
                "oldest_seconds": {one.name: one.oldest_seconds for one in lists},
            }

        if as_json:
            typer.echo(json.dumps(look(), default=str, indent=2))
        elif watch and sys.stdout.isatty():
            last = picture(look())
            with Live(last, auto_refresh=False, screen=True) as live:
                while True:
                    try:
                        last = picture(look())
                        live.update(last, refresh=True)
                    except Retryable as error:
                        live.update(Group(Text(f"not now: {error}", style="red"), "", last), refresh=True)
                    sleep(1)
        else:
            Console(width=None if sys.stdout.isatty() else 10_000).print(picture(look()))

    run(act)


@app.command()
def batch(
    batch_id: Annotated[str | None, typer.Argument(help="Batch, e.g. 20250622-143052-a1b2c3.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each recording of a batch on a line: its state, attempts and reason; on a terminal also the batch itself.

    Without a batch: the newest of them, also those that have ended.
    """

    def act() -> None:
        engine = ledger.open_ledger(config.load(config.LedgerSettings))
        console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
        if batch_id is None:
            newest = [vars(one) for one in ledger.newest_batches(engine, NEWEST)]
            if as_json:
                typer.echo(json.dumps(newest, default=str, indent=2))
            else:
                console.print(progress(newest) if newest else "no batches yet")
            return
        found = ledger.whole_batch(engine, check_batch_id(batch_id))
        if found is None:
            raise Permanent(f"{batch_id}: no batch has this id")
        items = ledger.batch_items(engine, batch_id)
        if as_json:
            typer.echo(json.dumps({**found, "recordings": [vars(item) for item in items]}, default=str, indent=2))
            return
        if sys.stdout.isatty():
            for key, value in found.items():
                if value not in (None, []):
                    console.print(f"{key.replace('_', ' '):16} {plain(value)}", markup=False)
            console.print()
        wide = (Column(name, overflow="fold") for name in ("member", "reason"))
        table = Table("audio_id", "item", "state", "attempts", "host", "seconds", *wide, box=None)
        for item in items:
            seconds = None if item.seconds is None else f"{item.seconds:.1f}"
            cells = (item.audio_id, item.item, item.state, item.attempts, item.host, seconds, item.member, item.reason)
            table.add_row(*(Text("-" if cell is None else plain(cell)) for cell in cells))
        console.print(table)

    run(act)


def picture(view: dict[str, Any]) -> Group:
    """What `status` shows a person."""
    hosts = Table("host", "seen", "gpu worker", "", box=None, title="hosts")
    for h in view["hosts"]:
        hosts.add_row(
            Text(plain(h["host"])),
            ago(h["silent_seconds"]),
            ago(h["gpu_silent_seconds"]),
            " ".join(
                ["[red]lost[/]"] * h["lost"]
                + ["[yellow]paused[/]"] * h["paused"]
                + ["[red]no sandbox[/]"] * bool(h["unsandboxed"])
            ),
        )
    lists = Table("list", "jobs", "oldest", box=None, title="queues")
    for name, jobs in view["queues"].items():
        oldest = view["oldest_seconds"][name]
        lists.add_row(Text(plain(name)), str(jobs), "-" if oldest is None else duration(oldest))
    return Group(
        progress(view["batches"], "open batches") if view["batches"] else "no open batches",
        "",
        hosts if view["hosts"] else "no hosts",
        "",
        lists,
    )


def progress(batches: list[dict[str, Any]], title: str | None = None) -> Table:
    table = Table(
        Column("batch", no_wrap=True), "state", "host", "for", "progress", "done", "dead", "of", box=None, title=title
    )
    for b in batches:
        total = b["pending"] + b["done"] + b["dead"]
        note = "; ".join([*b["flags"], *([b["reason"]] if b["reason"] else [])])
        table.add_row(
            b["batch_id"],
            b["state"],
            b["host"] or "-",
            age(b["since"]),
            ProgressBar(total=max(total, 1), completed=b["done"] + b["dead"], width=24),
            str(b["done"]),
            str(b["dead"]),
            str(total),
        )
        if note:
            table.add_row("", Text(plain(note), style="yellow"))
    return table


def ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{duration(seconds)} ago"


def age(since: datetime | None) -> str:
    return "-" if since is None else duration((datetime.now(timezone.utc) - since).total_seconds())
