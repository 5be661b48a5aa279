"""The driver of test hosts: what it makes works, and nothing of it is left. Needs root."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from needed import missing

from hosts import CGROUPS, FORWARDING, FORWARDING_WAS, Host, Refused, Run

pytestmark = pytest.mark.timeout(900)  # the first of them may have to wait for the image


@pytest.fixture
def run() -> Iterator[Run]:
    if os.getuid() != 0:
        missing("test hosts need root")
    run = Run("tests")
    destroy(run)  # what an earlier run of the tests left
    before = (FORWARDING_WAS if FORWARDING_WAS.exists() else FORWARDING).read_text()
    assert traces(run) == []
    yield run
    destroy(run)
    assert traces(run) == []
    assert not run.directory.exists()
    others = FORWARDING_WAS.exists()  # their hosts need it
    assert FORWARDING.read_text() == ("1\n" if others else before)


def destroy(run: Run) -> None:
    run.down([host.name for host in run.hosts()], orderly=False)


def traces(run: Run) -> list[str]:
    """What the machine has that is called after a run."""
    said = [Path("/proc/self/mountinfo").read_text()]
    for command in (
        ["ip", "link"],
        ["ip", "netns"],
        ["nft", "list", "tables"],
        ["losetup", "-a"],
        ["ps", "-eo", "args"],
    ):
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = [line for line in "\n".join(said).splitlines() if run.id in line or str(run.directory) in line]
    return found + [str(place / run.id) for place in CGROUPS if (place / run.id).exists()]


def ssh(run: Run, name: str, command: str) -> str:
    done = run.host(name).ssh(command, 60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_hosts_know_each_other_and_keep_their_disks_over_a_reboot(run: Run) -> None:
    run.up(["one", "two"], disk=64)
    assert ssh(run, "one", "ping -q -c 1 two >/dev/null && hostname") == "one"
    assert ssh(run, "two", "systemctl is-system-running") == "running"
    ssh(run, "one", "mkfs.ext4 -q /dev/vdb && mkdir /data && echo LABEL=data /data ext4 defaults 0 2 >>/etc/fstab")
    ssh(
        run,
        "one",
        "e2label /dev/vdb data && udevadm trigger --settle /dev/vdb && systemctl daemon-reload && mount /data",
    )
    ssh(run, "one", "touch /data/kept")
    assert run.host("one").reboot() == "running"
    assert ssh(run, "one", "findmnt -n -o TARGET /data && ls /data") == "/data\nkept\nlost+found"
    run.down(["one"], orderly=True)
    assert [host.name for host in run.hosts()] == ["two"]
    assert "one" not in ssh(run, "two", "cat /etc/hosts")


def test_a_host_that_has_ended_is_made_anew(run: Run) -> None:
    run.up(["one"], disk=0)
    ssh(run, "one", "touch /root/here")
    run.host("one").signal(signal.SIGKILL)
    with pytest.raises(Refused, match=r"one is not up|one has ended"):
        run.wait(["one"])
    run.up(["one"], disk=0)
    assert ssh(run, "one", "ls /root") == ""


@pytest.mark.parametrize("step", ["_disks", "_identity", "_network", "_start"])
@pytest.mark.parametrize("half", ["before", "after"])
def test_what_a_crash_leaves_is_taken_away(run: Run, step: str, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(Host, step)

    def crash(host: Host, *arguments: object) -> None:
        if half == "after":
            real(host, *arguments)
        os._exit(9)

    if (pid := os.fork()) == 0:
        monkeypatch.setattr(Host, step, crash)
        run.up(["one"], disk=16)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert traces(run)


def test_what_it_did_not_make_is_refused(run: Run) -> None:
    foreign = f"{run.id}-one"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        with pytest.raises(Refused, match=f"{foreign}: there already"):
            run.up(["one"], disk=0)
        with pytest.raises(Refused, match="not of this run: one"):
            run.down(["one"], orderly=False)
        assert foreign in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    finally:
        subprocess.run(["ip", "netns", "del", foreign], check=True)


def test_a_bridge_that_it_did_not_make_is_refused(run: Run) -> None:
    subprocess.run(["ip", "link", "add", run.id, "type", "bridge"], check=True)
    try:
        with pytest.raises(Refused, match="was not made here"):
            run.up(["one"], disk=0)
        assert run.id in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    finally:
        subprocess.run(["ip", "link", "del", run.id], check=True)
