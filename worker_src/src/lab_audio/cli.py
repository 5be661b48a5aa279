"""The command line: `lab-audio`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import sleep
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from lab_audio import config, ledger, log, queues, s3_utils
from lab_audio.contracts import archive_key, check_batch_id
from lab_audio.errors import ConfigError
from lab_audio.workers.loop import Stop, exit_code

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


class StatusSettings(config.LedgerSettings, config.QueueSettings):
    """What `status` reads."""


WORKERS: dict[str, type[config.LedgerSettings]] = {
    "transfer-worker": config.TransferSettings,
    "unpack-worker": config.UnpackSettings,
    "gpu-worker": config.GpuSettings,
}


def run(act: Callable[[], object]) -> None:
    """Run a command's work and leave with its exit code."""
    try:
        raise typer.Exit(exit_code(act))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def work(kind: type[Any], worker: Callable[[Any, Stop], object]) -> None:
    """Run a worker until SIGTERM or Ctrl-C."""

    def act() -> None:
        settings = config.load(kind)
        log.configure(settings.log_level)
        worker(settings, Stop().on_signals())

    run(act)


@app.command()
def transfer_worker(
    once: Annotated[bool, typer.Option("--once", help="Transfer what is settled now, then exit.")] = False,
) -> None:
    """Bring recordings from SOURCE into the object store, in archives, each exactly once.

    Takes files that have not changed for SETTLE_SECONDS. Source files are kept, moved or deleted (SOURCE_FATE) only
    after their archive was verified in the store.
    """
    from lab_audio.workers import transfer_sounds

    work(config.TransferSettings, lambda settings, stop: transfer_sounds.run(settings, stop, once=once))


@app.command()
def unpack_worker() -> None:
    """Serve `unpack`: stream archives to this host's scratch as Opus and queue each recording for the GPU worker.

    Takes nothing while this host is paused or its GPU worker has not been seen for two minutes.
    """
    from lab_audio.workers import unpack_worker

    work(config.UnpackSettings, unpack_worker.run)


@app.command()
def gpu_worker() -> None:
    """Serve this host's transcribe list: transcribe, classify, upload and enter each recording.

    Starts one process for each of DEVICES and starts it again if it dies.
    """
    from lab_audio.workers import gpu_worker

    work(config.GpuSettings, gpu_worker.run)


@app.command()
def migrate() -> None:
    """Bring the ledger's tables to this release. Rows of an older system stay and count as done."""

    def act() -> None:
        before, after = ledger.migrate(ledger.open_ledger(config.load(config.LedgerSettings)))
        typer.echo(f"ledger at revision {after}" + (f", was {before or 'not there'}" if before != after else ""))

    run(act)


@app.command()
def pause(
    host: Annotated[str | None, typer.Argument(help="Host to pause.")] = None,
    everywhere: Annotated[bool, typer.Option("--all", help="Pause every host, also those still to come.")] = False,
) -> None:
    """Let a host take no new batch; what it has, it finishes."""
    set_paused(host, everywhere, paused=True)


@app.command()
def resume(
    host: Annotated[str | None, typer.Argument(help="Host to resume.")] = None,
    everywhere: Annotated[bool, typer.Option("--all", help="Resume every host.")] = False,
) -> None:
    """Let a paused host take batches again."""
    set_paused(host, everywhere, paused=False)


def set_paused(host: str | None, everywhere: bool, *, paused: bool) -> None:
    if (host is None) != everywhere:
        raise typer.BadParameter("name one host, or --all")

    def act() -> None:
        engine = ledger.open_ledger(config.load(config.LedgerSettings))
        if not ledger.pause(engine, host, paused=paused):
            known = ", ".join(view.host for view in ledger.seen_hosts(engine)) or "none"
            raise ConfigError(f"no host is called {host}; known: {known}")
        typer.echo(f"{host or 'all hosts'} {'paused' if paused else 'resumed'}")

    run(act)


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
            Console().print(picture(look()))

    run(act)


def picture(view: dict[str, Any]) -> Group:
    """What `status` shows a person."""
    batches = Table("batch", "state", "host", "for", "progress", "done", "dead", "of", box=None, title="open batches")
    for b in view["batches"]:
        total = b["pending"] + b["done"] + b["dead"]
        note = "; ".join([*b["flags"], *([b["reason"]] if b["reason"] else [])])
        bar = ProgressBar(total=max(total, 1), completed=b["done"] + b["dead"], width=24)
        batches.add_row(
            b["batch_id"],
            b["state"],
            b["host"] or "-",
            age(b["since"]),
            bar,
            str(b["done"]),
            str(b["dead"]),
            str(total),
        )
        if note:
            batches.add_row("", f"[yellow]{note}[/]")
    hosts = Table("host", "seen", "gpu worker", "", box=None, title="hosts")
    for h in view["hosts"]:
        hosts.add_row(
            h["host"],
            ago(h["silent_seconds"]),
            ago(h["gpu_silent_seconds"]),
            "[yellow]paused[/]" if h["paused"] else "",
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


def duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


@app.command()
def fetch_archive(
    batch_id: Annotated[str, typer.Argument(help="Batch, e.g. 20250622-143052-a1b2c3.")],
    dest: Annotated[Path | None, typer.Argument(help="File to write (default: {batch_id}.tar here).")] = None,
) -> None:
    """Download a batch's archive, verified by its SHA-256."""

    def act() -> None:
        check_batch_id(batch_id)
        bucket = s3_utils.open_bucket(config.load(config.S3Settings))
        path = s3_utils.download_archive(
            archive_key(batch_id), batch_id, bucket=bucket, dest=dest or Path(f"{batch_id}.tar")
        )
        typer.echo(str(path))

    run(act)


@app.command()
def settings(
    worker: Annotated[str | None, typer.Argument(help=f"Only those of {', '.join(WORKERS)}.")] = None,
) -> None:
    """List every setting, its default and its meaning."""
    if worker is not None and worker not in WORKERS:
        raise typer.BadParameter(f"{worker} is not one of {', '.join(WORKERS)}")
    table = Table("setting", "default", "meaning", box=None)
    for name, default, meaning in config.described([WORKERS[worker]] if worker else list(WORKERS.values())):
        table.add_row(name, default, meaning)
    Console().print(table)


def main() -> None:
    app()
