#!/usr/bin/env python3
"""Break what each alert is about, and see that people are told and that its runbook mends it.

prove.py [ALERT...]     those; `all`: every one; none is named: three that do not take long

For each: something is broken on a host; Prometheus fires, and a webhook receives it; `lab-audio check-health` names
the runbook; what that says mends it; the webhook receives the end. No metric is written: only what it measures is
broken. Prints a line of Markdown each: the alert, what was broken, seconds until it was told, what check-health said,
what mended it, seconds until the end was told.

From the environment: SSH_CONFIG; PLAY, ansible-playbook with the inventory.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

CHECKOUT = Path(__file__).parents[2]
RUNBOOKS = CHECKOUT / "docs" / "runbooks"
SOUND = CHECKOUT / "tests" / "stack" / "sounds" / "garden.mp3"
HOSTS = CHECKOUT / "tests" / "hosts" / "hosts.py"
SECOND = Path(__file__).with_name("inventory") / "gpu-2.yml"
SECONDS = 900
T = TypeVar("T")
QUICK = ("WorkerSilent", "DeadLetters", "ScratchFilling")

# Prometheus looks each 5 s, not 30, and waits seconds, not minutes, before it fires; figures that are missing hold for
# one minute, and what each minute brings is old after two and a half; and Alertmanager tells at once.
FASTER = r"""
set -e
cd /etc/prometheus
! grep -q 'repeat_interval: 10s' lab_audio_alertmanager.yml || exit 0  # done already
sed -i -E 's/for: [0-9]+[mh]$/for: 5s/; s/\[30m\]/[2m]/; s/\[10m\]/[1m]/g; s/> 600$/> 150/' lab_audio_rules.yml
sed -i 's/30s/5s/' lab_audio.yml
sed -i -E 's/^(  group_by: \[alertname\])$/\1\n  group_wait: 1s\n  group_interval: 5s/' lab_audio_alertmanager.yml
sed -i 's/group_interval: 1m/group_interval: 5s/' lab_audio_alertmanager.yml
sed -i 's/repeat_interval: 5m/repeat_interval: 10s/' lab_audio_alertmanager.yml
systemctl restart prometheus prometheus-alertmanager
"""
# The database's clock goes on by so much, and with it the age of all that the ledger knows.
LATER = """
set -e
apt-get install -qq -y libfaketime >/dev/null
printf '%s\\n' "LD_PRELOAD = '$(ls /usr/lib/*/faketime/libfaketime.so.1)'" "FAKETIME = '+{days}d'" \
    "FAKETIME_DONT_FAKE_MONOTONIC = '1'" >"$(ls -d /etc/postgresql/*/main)/environment"
systemctl restart postgresql
"""
DIED = """
timeout 300 sh -c 'until lab-audio dead list --json | grep -q name; do sleep 1; done'
"""
NAME = """$(lab-audio dead list --json | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["name"])')"""

SECOND_HOST = {"here": "{hosts} up gpu-2 --disk 600 && {play} lab.audio.setup_new_worker -l gpu-2,postgresql_servers"}


@dataclass(frozen=True)
class Case:
    """`first`, `broken`, `mended`: commands by host (`here`: the controller). `says`: what mends it, by its runbook."""

    what: str
    broken: dict[str, str]
    mended: dict[str, str]
    says: str
    first: dict[str, str] = field(default_factory=dict)


CASES = {
    "WorkerSilent": Case(
        "the workers of a GPU host are stopped",
        {"gpu-1": "systemctl stop gpu-worker unpack-worker"},
        {"gpu-1": "systemctl start gpu-worker unpack-worker"},
        "`systemctl start gpu-worker unpack-worker`",
    ),
    "DeadLetters": Case(
        "a text is called a recording",
        {"services": "echo noise >/srv/noise.mp3; mv /srv/noise.mp3 /srv/sounds/"},
        {"services": f"lab-audio dead drop {NAME}"},
        "`lab-audio dead drop NAME`",
    ),
    "ScratchFilling": Case(
        "somebody leaves a large file on the data volume",
        {"gpu-1": "fallocate -l $(($(df --output=avail -B1 /data | tail -n1) * 97 / 100)) /data/left"},
        {"gpu-1": "mv /data/left /srv/"},
        "something that is not ours | move it away",
    ),
    "QueueOldestTooOld": Case(
        "a GPU host is paused, and a recording comes",
        {"services": "lab-audio pause gpu-1; cp /srv/garden.mp3 /srv/waits.mp3; mv /srv/waits.mp3 /srv/sounds/"},
        {"services": "lab-audio resume gpu-1"},
        "`lab-audio resume HOST`",
    ),
    "BatchStuck": Case(
        "a GPU worker is stopped with a recording in hand",
        {
            "gpu-1": "systemctl stop gpu-worker",
            "services": "cp /srv/garden.mp3 /srv/sticks.mp3; mv /srv/sticks.mp3 /srv/sounds/",
        },
        {"gpu-1": "systemctl start gpu-worker unpack-worker"},
        "[WorkerSilent](WorkerSilent.md)",
    ),
    "WorkerSick": Case(
        "a file of a model is lost",
        {"gpu-1": "mv /data/models/whisperx/model.bin /srv/; systemctl restart --no-block gpu-worker"},
        {"here": "{play} lab.audio.sync_models -l gpu-1"},
        "`ansible-playbook lab.audio.sync_models -l HOST`",
    ),
    "TextfileStale": Case(
        "the timer that writes the figures is stopped",
        {"services": "systemctl stop lab-audio-metrics.timer"},
        {"services": "systemctl start lab-audio-metrics.timer"},
        "the timer is stopped | `systemctl start` it",
    ),
    "ModelRevisionSkew": Case(
        "a new revision of a model comes to one of two GPU hosts",
        {
            "services": "echo of a new revision >/srv/models/whisperx/NOTE",
            "here": "{play} lab.audio.sync_models -l gpu-1",
        },
        {"here": "{play} lab.audio.sync_models"},
        "`ansible-playbook lab.audio.sync_models`",
        SECOND_HOST,
    ),
    "ReleaseSkew": Case(
        "a release comes to one host",
        {"here": "{upgrade} -l gpu-1"},
        {"here": "{upgrade}"},
        "`ansible-playbook lab.audio.upgrade`",
        SECOND_HOST,
    ),
    "BackupStale": Case(
        "nobody dumps the database for two days",
        {"services": "systemctl stop lab-audio-dump.timer;" + LATER.format(days=2)},
        {"services": "systemctl start lab-audio-dump.timer; systemctl start lab-audio-dump"},
        "`systemctl start lab-audio-dump`",
    ),
    "ArchiveNearRetention": Case(
        "a recording is dead, and nobody looks for a week",
        {"services": "echo noise >/srv/noise.mp3; mv /srv/noise.mp3 /srv/sounds/;" + DIED + LATER.format(days=9)},
        {"services": f"lab-audio dead drop {NAME}"},
        "`lab-audio dead drop`",
    ),
    "Watchdog": Case(
        "Prometheus is stopped",
        {"services": "systemctl stop prometheus"},
        {"here": "{play} lab.audio.site -l monitoring_servers"},
        "`ansible-playbook lab.audio.site --limit monitoring_servers`",
    ),
}


def prove(case: Case, alert: str, names: dict[str, str]) -> tuple[float, str, float]:
    """Seconds until it was told, what check-health said, seconds until its end was told."""
    page = (RUNBOOKS / f"{alert}.md").read_text()
    if case.says not in page:
        sys.exit(f"{alert}: its runbook does not say {case.says}")
    act(case.first, names)
    began = time.time()
    act(case.broken, names)
    told = wait(f"{alert}: nobody is told", lambda: heard(alert, "firing", began))
    said = wait(f"{alert}: check-health does not name it", lambda: named(alert))
    mending = time.time()
    act(case.mended, names)
    wait(f"{alert}: check-health still names it", lambda: not named(alert))
    ended = wait(f"{alert}: its end is not told", lambda: heard(alert, "resolved", mending))
    return told - began, said, ended - mending


def watchdog(case: Case, names: dict[str, str]) -> tuple[float, str, float]:
    """As above, but silence is what tells."""
    wait("Watchdog does not come", lambda: heard("Watchdog", "firing", time.time() - 60))
    began = time.time()
    act(case.broken, names)
    wait("Watchdog comes all the same", lambda: not heard("Watchdog", "firing", time.time() - 60))
    silent = time.time()
    act(case.mended, names)
    back = wait("Watchdog does not come again", lambda: heard("Watchdog", "firing", silent))
    return silent - began, "(it comes no more)", back - silent


def act(commands: dict[str, str], names: dict[str, str]) -> None:
    second = f" -i {SECOND}" if SECOND_HOST is commands or is_up("gpu-2") else ""
    for host, command in commands.items():
        for name, value in {**names, "more": second}.items():
            command = command.replace(f"{{{name}}}", value)
        run(["bash", "-c", command] if host == "here" else [*ssh(host), command])


def is_up(host: str) -> bool:
    return f"{host} " in run([str(HOSTS), "--run", "alerts", "list"])


def heard(alert: str, status: str, since: float) -> float:
    """When the webhook received it first since then, 0.0 if it did not."""
    for line in filter(None, run([*ssh("services"), "cat /root/received"]).splitlines()):  # a body ends a line itself
        when, _path, body = line.split(" ", 2)
        if float(when) >= since and any(
            one["status"] == status and one["labels"]["alertname"] == alert for one in json.loads(body)["alerts"]
        ):
            return float(when)
    return 0.0


def named(alert: str) -> str:
    """What check-health says on any host where it names the alert's runbook."""
    for host in ("services", "gpu-1"):
        report = run([*ssh(host), "lab-audio check-health --json || true"])  # 1 or 2, as something is wrong
        for check in json.loads(report)["checks"]:
            if f"{alert}.md" in check["mend"]:
                return f"{check['check']}: {check['what']}"
    return ""


def wait(what: str, look: Callable[[], T]) -> T:
    """What it has to say, once that is true."""
    deadline = time.monotonic() + SECONDS
    while not (said := look()):
        if time.monotonic() > deadline:
            sys.exit(f"{what} after {SECONDS} s")
        time.sleep(1)
    return said


def release(directory: Path) -> str:
    """Upgrades to the collection as it is, with a release of another version."""
    installed = Path(os.environ["ANSIBLE_COLLECTIONS_PATH"].split(":")[0]) / "ansible_collections" / "lab" / "audio"
    copy = directory / "ansible_collections" / "lab" / "audio"
    shutil.copytree(installed, copy)
    project = copy / "worker_src" / "pyproject.toml"
    project.write_text(re.sub("(?m)^version = .*", 'version = "9.0.1"', project.read_text()))
    path = f"{directory}:{os.environ['ANSIBLE_COLLECTIONS_PATH']}"
    upgrade = f"{os.environ['PLAY']}{{more}} lab.audio.upgrade --skip-tags monitoring"  # what is FASTER stays so
    return f"ANSIBLE_COLLECTIONS_PATH={shlex.quote(path)} {upgrade}"


def ssh(host: str) -> list[str]:
    return ["ssh", "-F", os.environ["SSH_CONFIG"], host]


def run(command: list[str], **more: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def main(wanted: list[str]) -> None:
    unknown = set(wanted) - {*CASES, "all"}
    if unknown:
        sys.exit(f"not an alert: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    chosen = [name for name in CASES if name in (wanted or QUICK) or wanted == ["all"]]
    run([*ssh("services"), FASTER])
    run([*ssh("services"), f"base64 -d >/srv/garden.mp3 <<<{base64.b64encode(SOUND.read_bytes()).decode()}"])
    with tempfile.TemporaryDirectory() as directory:
        names = {
            "play": f"{os.environ['PLAY']}{{more}}",
            "hosts": f"{HOSTS} --run alerts",
            "upgrade": release(Path(directory)),
        }
        for alert in chosen:
            case = CASES[alert]
            told, said, ended = watchdog(case, names) if alert == "Watchdog" else prove(case, alert, names)
            mended = case.says.replace(" | ", ": ").replace("](", "](runbooks/")
            print(f"| {alert} | {case.what} | {told:.0f} s | {said} | {mended} | {ended:.0f} s |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
