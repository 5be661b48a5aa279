"""What an operator does to the whole: tables, hosts, repair, retention, archives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lab_audio import config, ledger, s3_utils
from lab_audio.cli.app import app, run
from lab_audio.contracts import archive_key, check_batch_id
from lab_audio.errors import ConfigError


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
