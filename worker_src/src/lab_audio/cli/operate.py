"""What an operator does to the whole: tables, hosts, repair, retention, archives."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from prometheus_client import CollectorRegistry
from rich import filesize
from rich.console import Console

from lab_audio import config, ledger, log, metrics, queues, s3_utils
from lab_audio.cli.app import app, run, utf8
from lab_audio.contracts import UNPACK, archive_key, check_batch_id
from lab_audio.errors import ConfigError, Permanent
from lab_audio.operations import reconcile as reconciling
from lab_audio.operations import restore as restoring
from lab_audio.operations import retention as retaining
from lab_audio.workers.host import lose_host


@app.command()
def migrate() -> None:
    """Bring the ledger's tables to this release. Rows of an older system stay and count as done."""

    def act() -> None:
        before, after = ledger.migrate(ledger.open_ledger(config.load(config.LedgerSettings)))
        if before is not None and before > after:
            typer.echo(f"ledger at revision {before}, newer than this release's {after}: nothing is changed")
        else:
            typer.echo(f"ledger at revision {after}" + (f", was {before or 'not there'}" if before != after else ""))

    run(act)


@app.command()
def ensure_bucket() -> None:
    """Create the bucket in the object store if it is missing."""

    def act() -> None:
        bucket = s3_utils.open_bucket(config.load(config.S3Settings))
        created = s3_utils.ensure_bucket(bucket)
        typer.echo(f"bucket {bucket.name} {'created' if created else 'is there'}")

    run(act)


@app.command()
def pause(
    host: Annotated[str | None, typer.Argument(help="Host to pause.", callback=utf8)] = None,
    everywhere: Annotated[bool, typer.Option("--all", help="Pause every host, also those still to come.")] = False,
) -> None:
    """Let a host take no new batch; what it has, it finishes."""
    set_paused(host, everywhere, paused=True)


@app.command()
def resume(
    host: Annotated[str | None, typer.Argument(help="Host to resume.", callback=utf8)] = None,
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


hosts = typer.Typer(name="hosts", help="Hosts that are gone; `lab-audio status` names all.", no_args_is_help=True)
app.add_typer(hosts)


@hosts.command()
def forget(
    host: Annotated[
        str, typer.Argument(help="Host that will not come back, as `lab-audio status` names it.", callback=utf8)
    ],
) -> None:
    """Give a host's batches to the others. What it had finished stays; the rest is done anew.

    A host that lives after all does no harm: it throws away what it had in hand, and takes part again.
    """

    def act() -> None:
        settings = config.load(config.ReconcileSettings)
        log.configure(settings.log_level, settings.lab_host)
        stores = open_stores(settings)
        if ledger.disk_of(stores.engine, host) is None:
            known = ", ".join(view.host for view in ledger.seen_hosts(stores.engine)) or "none"
            raise ConfigError(f"no host is called {host}; known: {known}")
        returned = lose_host(stores.engine, stores.client, host)
        for _batch_id, job in ledger.unqueued(stores.engine, queues.queued_unpack_jobs(stores.client)):
            queues.push(stores.client, UNPACK, job)
        typer.echo(f"{host} forgotten; batches to be unpacked anew: {', '.join(returned or []) or 'none'}")

    run(act)


@app.command()
def reconcile(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the comparison of all objects and rows.")] = False,
    after_restore: Annotated[
        bool,
        typer.Option(
            "--after-restore",
            help="The database is an older dump, and all workers are stopped: empty Redis, and learn from the object"
            " store what the dump lacks.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Repair what can be repaired: jobs that Redis lost, batches of lost hosts, archives that nobody knows.

    Reports objects without rows and rows without objects, and ends with 1 if there are any. May run at any time; every
    minute with --quick is a good habit. A host is lost if it is silent for HOST_GRACE_SECONDS and still so in a second
    run, 40 s later.
    """

    def act() -> None:
        settings = config.load(config.ReconcileSettings)
        log.configure(settings.log_level, settings.lab_host)
        stores = open_stores(settings)
        ledger.check_migrated(stores.engine)
        found: dict[str, Any] = {}
        if after_restore:
            found |= vars(restoring.restore(stores, dry_run=dry_run))
        report = reconciling.Report()
        if not (after_restore and dry_run):  # what it would find is only there then
            report = reconciling.reconcile(stores, settings.host_grace_seconds, dry_run=dry_run, audit=not quick)
        found |= {what: found.get(what, []) + which for what, which in vars(report).items()}
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            tell(found, dry_run=dry_run)
        if not dry_run:
            note_reconciled(stores, settings, report, audit=not quick)
        if left := len(report.objects_without_rows) + len(report.rows_without_objects):
            raise Permanent(f"{left} objects and rows do not fit each other: see the list, and docs/operations.md")

    run(act)


def note_reconciled(
    stores: reconciling.Stores, settings: config.ReconcileSettings, report: reconciling.Report, *, audit: bool
) -> None:
    """Keep for check-health and Prometheus that it was done, and what it found."""
    job = "audit" if audit else "reconcile"
    ledger.note_run(stores.engine, job)
    for what, which in vars(report).items():
        metrics.FOUND.labels(job, what).set(len(which))
    leave_figures(settings, f"lab_audio_{job}", metrics.RECONCILE)


def leave_figures(settings: config.TextfileSettings, name: str, registry: CollectorRegistry) -> None:
    """Leave metrics for node_exporter; what was done is done, also where that fails."""
    try:
        metrics.write(settings.textfile_directory, name, registry)
    except ConfigError as error:
        log.get_logger().warning("no figures are left for Prometheus", error=str(error))


def open_stores(settings: config.StoreSettings) -> reconciling.Stores:
    return reconciling.Stores(
        ledger.open_ledger(settings), queues.open_queues(settings), s3_utils.open_bucket(settings)
    )


def tell(found: dict[str, Any], *, dry_run: bool) -> None:
    """Print what is not empty: a line for each, with its first few."""
    some = {what: which for what, which in found.items() if which}
    for what, which in some.items():
        names = [str(which)] if isinstance(which, int) else which
        more = f" ... and {len(names) - 10} more" if len(names) > 10 else ""
        count = "" if isinstance(which, int) else f"{len(names)} "
        typer.echo(f"{count}{what.replace('_', ' ')}: {', '.join(names[:10])}{more}")
    if dry_run:
        typer.echo("nothing was changed" if some else "nothing to do")
    elif not some:
        typer.echo("all is well")


@app.command()
def retention(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Delete what nobody needs any more. May run at any time, once a day is a good habit.

    Archives of batches that have been complete for RETENTION_DAYS, unless something in them is dead and not dropped;
    multipart uploads that were begun more than a day ago; and, on a host with scratch, folders of batches that are
    not this host's.
    """

    def act() -> None:
        settings = config.load(config.RetentionSettings)
        log.configure(settings.log_level, settings.lab_host)
        stores = open_stores(settings)
        ledger.check_migrated(stores.engine)
        host = retaining.host_here(stores, settings)
        console = Console(highlight=False, soft_wrap=True)
        removals = []
        with nullcontext() if as_json else console.status("looking at archives, uploads and scratch"):
            for removal in retaining.sweep(stores, host, settings.retention_days, dry_run=dry_run):
                removals.append(removal)
                if not as_json:
                    console.print(f"{removal.kind} {removal.name}, {filesize.decimal(removal.bytes)}", markup=False)
        total = sum(removal.bytes for removal in removals)
        if as_json:
            found = {"dry_run": dry_run, "scratch_here": host is not None, "bytes": total}
            typer.echo(json.dumps({**found, "removed": [vars(removal) for removal in removals]}, indent=2))
        else:
            would = "to be deleted" if dry_run else "deleted"
            typer.echo(f"{len(removals)} {would}, {filesize.decimal(total)}")
        if not dry_run:
            ledger.note_run(stores.engine, "retention")
            for kind in retaining.KINDS:
                sizes = [removal.bytes for removal in removals if removal.kind == kind]
                metrics.REMOVED.labels(kind).set(len(sizes))
                metrics.FREED.labels(kind).set(sum(sizes))
            leave_figures(settings, "lab_audio_retention", metrics.RETENTION)

    run(act)


@app.command()
def fetch_archive(
    batch_id: Annotated[str, typer.Argument(help="Batch, e.g. 20250622-143052-a1b2c3.")],
    dest: Annotated[
        Path | None, typer.Argument(dir_okay=False, help="File to write (default: {batch_id}.tar here).")
    ] = None,
) -> None:
    """Download a batch's archive, verified by its SHA-256. A file that is there is not replaced."""

    def act() -> None:
        check_batch_id(batch_id)
        bucket = s3_utils.open_bucket(config.load(config.S3Settings))
        file = dest or Path(f"{batch_id}.tar")
        try:
            if file.exists():
                raise Permanent(f"{file} is there already")
            if not file.parent.is_dir():
                raise Permanent(f"{file.parent} is no directory")
            path = s3_utils.download_archive(archive_key(batch_id), batch_id, bucket=bucket, dest=file)
        except OSError as error:
            raise Permanent(f"{file} cannot be written: {error.strerror}") from None
        typer.echo(str(path))

    run(act)
