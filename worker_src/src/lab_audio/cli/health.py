"""Whether it works: `lab-audio check-health` for people, `lab-audio metrics` for Prometheus."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lab_audio import config, ledger, log, metrics
from lab_audio.cli.app import app, run
from lab_audio.errors import ConfigError
from lab_audio.log import plain
from lab_audio.operations import health
from lab_audio.operations.health import Finding, State
from lab_audio.operations.measure import measure

STYLES = {State.GOOD: "green", State.WARNING: "yellow", State.FAILING: "red"}


@app.command()
def check_health(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether all works: the stores, the hosts, what waits and what was set aside, and this host's own parts.

    Takes less than 10 seconds and changes nothing. Exit code 0: all is good; 1: warnings; 2: something fails.
    """
    host = None
    try:
        settings = config.load(config.HealthSettings)
        host = settings.lab_host
        findings = health.examine(health.Lab(settings, health.open_stores(settings)))
    except ConfigError as error:
        findings = [Finding("settings", State.FAILING, line, health.MESSAGES) for line in str(error).splitlines()]
    worst = max(finding.state for finding in findings)
    if as_json:
        checks = [{**vars(finding), "state": finding.state.name.lower()} for finding in findings]
        typer.echo(json.dumps({"host": host, "state": worst.name.lower(), "checks": checks}, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 10_000, highlight=False).print(picture(findings))
    raise typer.Exit(int(worst))


@app.command(name="metrics")
def tell_metrics() -> None:
    """Write the metrics of the whole for node_exporter to TEXTFILE_DIRECTORY/lab_audio.prom, or print them.

    On one host, by a timer, once a minute. Of a store that is away it tells only that. Workers serve their own metrics.
    """

    def act() -> None:
        settings = config.load(config.MetricsSettings)
        log.configure(settings.log_level, settings.lab_host)
        stores = health.open_stores(settings)
        told = measure(stores, settings)
        if settings.textfile_directory is None:
            typer.echo(metrics.text(*told), nl=False)
            return
        metrics.write(settings.textfile_directory, "lab_audio", *told)
        if metrics.LEDGER in told:
            ledger.note_run(stores.engine, "metrics")

    run(act)


def picture(findings: list[Finding]) -> Table:
    wide = (Column(name, overflow="fold") for name in ("", "to mend it"))
    table = Table(Column("check", no_wrap=True), Column("state", no_wrap=True), *wide, box=None)
    for finding in findings:
        state = Text(finding.state.name.lower(), style=STYLES[finding.state])
        table.add_row(finding.check, state, Text(plain(finding.what)), Text(plain(finding.mend)))
    return table
