"""`lab-audio status`."""

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
from lab_audio.cli.app import app, duration, plain, run


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
            return {
                "batches": [vars(batch) for batch in ledger.open_batches(engine)],
                "hosts": [vars(host) for host in ledger.seen_hosts(engine)],
                "queues": queues.depths(client),
            }

        if as_json:
            typer.echo(json.dumps(look(), default=str, indent=2))
        elif watch and sys.stdout.isatty():
            with Live(picture(look()), auto_refresh=False, screen=True) as live:
                while True:
                    live.update(picture(look()), refresh=True)
                    sleep(1)
        else:
            Console(width=None if sys.stdout.isatty() else 10_000).print(picture(look()))

    run(act)


def picture(view: dict[str, Any]) -> Group:
    """What `status` shows a person."""
    batches = Table(
        Column("batch", no_wrap=True), "state", "host", "for", "progress", "done", "dead", "of",
        box=None, title="open batches",
    )  # fmt: skip
    for b in view["batches"]:
        total = b["pending"] + b["done"] + b["dead"]
        note = "; ".join([*b["flags"], *([b["reason"]] if b["reason"] else [])])
        progress = ProgressBar(total=max(total, 1), completed=b["done"] + b["dead"], width=24)
        batches.add_row(
            b["batch_id"],
            b["state"],
            b["host"] or "-",
            age(b["since"]),
            progress,
            str(b["done"]),
            str(b["dead"]),
            str(total),
        )
        if note:
            batches.add_row("", Text(plain(note), style="yellow"))
    hosts = Table("host", "seen", "gpu worker", "", box=None, title="hosts")
    for h in view["hosts"]:
        hosts.add_row(
            h["host"],
            ago(h["silent_seconds"]),
            ago(h["gpu_silent_seconds"]),
            " ".join(["[yellow]paused[/]"] * h["paused"] + ["[red]no sandbox[/]"] * bool(h["unsandboxed"])),
        )
    lists = Table("list", "jobs", box=None, title="queues")
    for name, depth in view["queues"].items():
        lists.add_row(name, str(depth))
    return Group(
        batches if view["batches"] else "no open batches",
        "",
        hosts if view["hosts"] else "no hosts",
        "",
        lists,
    )


def ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{duration(seconds)} ago"


def age(since: datetime | None) -> str:
    return "-" if since is None else duration((datetime.now(timezone.utc) - since).total_seconds())
