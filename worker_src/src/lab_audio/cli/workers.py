"""The workers, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lab_audio import config, log, metrics
from lab_audio.cli.app import app, run
from lab_audio.release import release
from lab_audio.workers.loop import Stop, say_last

SETTINGS: dict[str, type[config.LedgerSettings]] = {
    "transfer-worker": config.TransferSettings,
    "unpack-worker": config.UnpackSettings,
    "gpu-worker": config.GpuSettings,
    "reconcile": config.ReconcileSettings,
    "retention": config.RetentionSettings,
    "metrics": config.MetricsSettings,
    "check-health": config.HealthSettings,
}


def work(name: str, worker: Callable[[Any, Stop], object]) -> None:
    """Run a worker until SIGTERM or Ctrl-C."""

    def act() -> None:
        log.configure()  # settings that are wrong are an event, too
        settings: Any = config.load(SETTINGS[name])
        log.configure(settings.log_level, settings.lab_host)
        metrics.RELEASE.labels(release()).set(1)
        metrics.serve(settings.metrics_address, metrics.PORTS[name])
        worker(settings, Stop().on_signals())

    run(act, say_last)


@app.command()
def transfer_worker(
    once: Annotated[bool, typer.Option("--once", help="Transfer what is settled now, then exit.")] = False,
) -> None:
    """Bring recordings from SOURCE into the object store, in archives, each exactly once.

    Takes files that have not changed for SETTLE_SECONDS. Source files are kept, moved or deleted (SOURCE_FATE) only
    after their archive was verified in the store.
    """
    from lab_audio.workers import transfer_sounds

    work("transfer-worker", lambda settings, stop: transfer_sounds.run(settings, stop, once=once))


@app.command()
def unpack_worker() -> None:
    """Serve `unpack`: stream archives to this host's scratch as Opus and queue each recording for the GPU worker.

    Takes nothing while this host is paused or its GPU worker has not been seen for two minutes.
    """
    from lab_audio.workers import unpack_worker

    work("unpack-worker", unpack_worker.run)


@app.command()
def gpu_worker() -> None:
    """Serve this host's transcribe list: transcribe, classify, upload and enter each recording.

    Starts one process for each of DEVICES and starts it again if it dies.
    """
    from lab_audio.workers import gpu_worker

    work("gpu-worker", gpu_worker.run)


@app.command()
def settings(
    command: Annotated[str | None, typer.Argument(help=f"Only those of {', '.join(SETTINGS)}.")] = None,
) -> None:
    """List every setting, its default and its meaning."""
    if command is not None and command not in SETTINGS:
        raise typer.BadParameter(f"{command} is not one of {', '.join(SETTINGS)}")
    table = Table("setting", "default", "meaning", box=None)
    for name, default, meaning in config.described([SETTINGS[command]] if command else list(SETTINGS.values())):
        table.add_row(name, default, meaning)
    Console().print(table)
