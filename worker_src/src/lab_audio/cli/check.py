"""Whether a worker can work on this host, asked before it is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from lab_audio import config, ledger, queues, s3_utils, source
from lab_audio.cli.app import app, run
from lab_audio.media import transcode
from lab_audio.workers.host import has_sandbox

WORKERS: dict[str, type[config.StoreSettings]] = {
    "transfer-worker": config.TransferSettings,
    "unpack-worker": config.UnpackSettings,
    "gpu-worker": config.GpuSettings,
}


@app.command()
def check(
    worker: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(WORKERS)}; default: what all of them need.")
    ] = None,
) -> None:
    """Ask whether a worker could work here: its settings, its programs and libraries, and each store once.

    Changes nothing. Ends at the first thing that is wrong, and says what to do about it.
    """
    if worker is not None and worker not in WORKERS:
        raise typer.BadParameter(f"{worker} is not one of {', '.join(WORKERS)}")

    def act() -> None:
        settings = config.load(WORKERS[worker] if worker else config.StoreSettings)
        for job in (config.ReconcileSettings, config.RetentionSettings):  # started by timers on any host
            config.load(job)
        good("settings")
        if isinstance(settings, config.MediaSettings):
            transcode.ffmpeg_command()
            good("ffmpeg in a sandbox" if has_sandbox(settings) else "ffmpeg, without a sandbox")
        if isinstance(settings, config.GpuSettings):
            from lab_audio.models.runtime import check_libraries
            from lab_audio.workers.gpu_worker import present_devices

            devices = settings.devices or present_devices()
            check_libraries(settings.models_root, devices)
            good(f"the models' libraries, on {', '.join(devices)}")
        ask("PostgreSQL", lambda: ledger.check_answers(ledger.open_ledger(settings)))
        ask("Redis", lambda: queues.check_answers(queues.open_queues(settings)))
        ask("object store", lambda: s3_utils.check_bucket(s3_utils.open_bucket(settings)))
        if isinstance(settings, config.TransferSettings):
            where = source.parse(settings.source, ssh_key=settings.ssh_key, ssh_known_hosts=settings.ssh_known_hosts)
            ask(f"source {where.name}", lambda: source.stat(where, []))

    run(act)


def ask(what: str, question: Callable[[], object]) -> None:
    question()
    good(what)


def good(what: str) -> None:
    typer.echo(f"{what}: good")
