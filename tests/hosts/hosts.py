#!/usr/bin/env python3
"""Test hosts: Debian with systemd as PID 1, ssh and an address of its own, on this machine (systemd-nspawn). As root.

What one run makes is called after the run, and the run after its directory, .cache/hosts/runs/NAME of this checkout:
bridge, subnet, network namespaces, cgroups. Each is noted there before it is made, so that whatever a crash left can be
taken away; what is there without a note was made by somebody else, and is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from image import INIT, image, locked

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "hosts"
# Where systemd keeps its cgroups: in one place or, where there are still cgroups of the first kind, in two.
CGROUPS = [place for place in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")) if place.is_dir()]
CGROUPS = CGROUPS or [Path("/sys/fs/cgroup")]
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
FORWARDING_WAS = Path("/run/lab-audio-ip_forward")  # of all runs: it is put back with the last bridge
NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
REBOOT = 133  # by which nspawn ends when the host wants to be started again
UP_SECONDS, DOWN_SECONDS, REBOOT_SECONDS = 120, 20, 600  # a reboot also waits for the work in hand


class Refused(RuntimeError):
    """What to do about it is in the message."""


class Run:
    """A network of hosts. Everything about it lies in its directory."""

    def __init__(self, name: str, cache: Path = CACHE) -> None:
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            raise Refused(f"{name!r} is no name of a run: small letters, digits, _ and - only")
        self.cache, self.directory = cache, cache / "runs" / name
        self.key = self.directory / "ssh_key"
        self.ssh_config = self.directory / "ssh_config"
        self.id = f"lab{hashlib.sha256(str(self.directory).encode()).hexdigest()[:6]}"  # bridge, table, start of names

    @property
    def net(self) -> str:
        return (self.directory / "net").read_text()

    def hosts(self) -> list[Host]:
        found = [Host(self, note.name) for note in self.directory.glob("hosts/*") if NAME.fullmatch(note.name)]
        return sorted(found, key=lambda host: host.number)

    def up(self, names: list[str], disk: int) -> None:
        lower = image(self.cache)
        with locked(self.cache / "lock"):
            try:
                for host in (Host(self, name) for name in names):
                    if host.processes():
                        print(f"{host.name} is up already")
                        continue
                    host.remove()  # what a crash left
                    self._network()
                    host.make(lower, disk)
            finally:
                self._settle()
        self.wait(names)

    def wait(self, names: list[str]) -> None:
        """Until each has started all there is to start, and answers by ssh."""
        deadline = time.monotonic() + UP_SECONDS
        for host in (self.host(name) for name in names):
            said = host.wait(deadline)
            print(f"{host.name} {host.address} {said}", flush=True)

    def down(self, names: list[str], *, orderly: bool) -> None:
        """Shut hosts down, or cut their power, and take away all that is theirs; with the last one, the network."""
        with locked(self.cache / "lock"):
            hosts = [Host(self, name) for name in names]
            if unknown := [host.name for host in hosts if not host.note.exists()]:
                raise Refused(f"not of this run: {' '.join(unknown)}; it has: {' '.join(h.name for h in self.hosts())}")
            if orderly:
                for host in hosts:
                    host.signal(signal.SIGRTMIN + 4)  # systemd: power off
                _until(lambda: not any(host.processes() for host in hosts), DOWN_SECONDS)
            for host in hosts:
                if orderly and host.processes():
                    print(f"{host.name} has not shut down in {DOWN_SECONDS} s: killed")
                host.remove()
            self._settle()

    def host(self, name: str) -> Host:
        host = Host(self, name)
        if not host.processes():
            raise Refused(f"{name} is not up; its console's last words: {host.console()}")
        return host

    def _settle(self) -> None:
        """The hosts know each other; without any, there is no network."""
        if self.hosts():
            self._introduce()
        elif (self.directory / "net").exists():
            self._remove_network()
            shutil.rmtree(self.directory)

    def _network(self) -> None:
        """Bridge, subnet and the way out; the controller's key."""
        if self.hosts() and _exists("ip", "link", "show", self.id):
            return
        if (self.directory / "net").exists():
            self._remove_network()  # half made, or lost with a reboot of the machine
        else:
            if _exists("ip", "link", "show", self.id) or _exists("nft", "list", "table", "ip", self.id):
                raise Refused(
                    f"there is a bridge or an nftables table {self.id} that was not made here: remove it first"
                )
            (self.directory / "hosts").mkdir(parents=True, exist_ok=True)
            _write(self.directory / "net", self._free_net())
        self.key.unlink(missing_ok=True)
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.id, "-f", self.key)
        routes = json.loads(_do("ip", "-j", "route", "show", "default"))
        mtu = Path(f"/sys/class/net/{routes[0]['dev']}/mtu").read_text().strip() if routes else "1500"
        _do("ip", "link", "add", self.id, "mtu", mtu, "type", "bridge")
        _do("ip", "addr", "add", f"{self.net}.1/24", "dev", self.id)
        _do("ip", "link", "set", self.id, "up")
        if not FORWARDING_WAS.exists():
            _write(FORWARDING_WAS, FORWARDING.read_text())
        FORWARDING.write_text("1")
        _do(
            "nft",
            f"""table ip {self.id} {{ chain out {{ type nat hook postrouting priority 100;
            ip saddr {self.net}.0/24 ip daddr != {self.net}.0/24 masquerade; }}; }}""",
        )

    def _free_net(self) -> str:
        """A /24 of 10.64.0.0/10 that nothing here has a way to: this run's own one, if it is free."""
        own = int(self.id[3:], 16)
        taken = [
            ipaddress.ip_network(route["dst"])
            for route in json.loads(_do("ip", "-j", "route"))
            if route["dst"] != "default"
        ]
        for number in range(own, own + 100):
            net = f"10.{64 + number // 256 % 64}.{number % 256}"
            if not any(ipaddress.ip_network(f"{net}.0/24").overlaps(other) for other in taken):
                return net
        raise Refused("no subnet of 10.64.0.0/10 is free on this machine")

    def _remove_network(self) -> None:
        for command in (("nft", "delete", "table", "ip", self.id), ("ip", "link", "del", self.id)):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
        bridges = [link for link in json.loads(_do("ip", "-j", "link", "show", "type", "bridge")) if link]
        if FORWARDING_WAS.exists() and not bridges:
            FORWARDING.write_text(FORWARDING_WAS.read_text())
            FORWARDING_WAS.unlink()

    def _introduce(self) -> None:
        """Each host knows the others by name, and so does ssh here: ssh -F .../ssh_config NAME."""
        hosts = self.hosts()
        known = "".join(f"{host.address} {host.name}\n" for host in hosts)
        for host in hosts:
            if host.root.is_mount():
                (host.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{known}")
        keys = [(host, host.directory / "ssh_host_key.pub") for host in hosts]
        _write(
            self.directory / "known_hosts", "".join(f"{h.name} {key.read_text()}" for h, key in keys if key.exists())
        )
        each = "".join(f"Host {h.name} {h.address}\n  HostName {h.address}\n  HostKeyAlias {h.name}\n" for h in hosts)
        all_of_them = {
            "User": "root",
            "IdentityFile": self.key,
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": 5,
            "UserKnownHostsFile": self.directory / "known_hosts",
            "StrictHostKeyChecking": "yes",
        }
        _write(self.ssh_config, each + "Host *\n" + "".join(f"  {key} {value}\n" for key, value in all_of_them.items()))


class Host:
    """One host of a run; all of its disk lies in its directory."""

    def __init__(self, run: Run, name: str) -> None:
        if not NAME.fullmatch(name):
            raise Refused(f"{name!r} is no name of a host")
        self.run, self.name = run, name
        self.note = run.directory / "hosts" / name  # its number; there from before it is made until all of it is gone
        self.directory = run.directory / "disks" / name
        self.root = self.directory / "root"
        self.netns = f"{run.id}-{name}"
        self.cgroups = [place / run.id / name for place in CGROUPS]

    @property
    def number(self) -> int:
        return int(self.note.read_text())

    @property
    def address(self) -> str:
        return f"{self.run.net}.{self.number}"

    @property
    def veth(self) -> str:
        return f"{self.run.id}-{self.number}"

    def make(self, lower: Path, disk: int) -> None:
        number = next(n for n in range(10, 250) if n not in {host.number for host in self.run.hosts()})
        made = (Path("/run/netns") / self.netns, Path(f"/sys/class/net/{self.run.id}-{number}"), *self.cgroups)
        if foreign := [str(thing) for thing in made if thing.exists()]:
            raise Refused(f"{', '.join(foreign)}: there already, and not made here: remove it first")
        _write(self.note, str(number))
        try:
            self._disks(lower)
            self._identity()
            self._network()
            self._start(disk)
        except BaseException:
            self.remove()
            raise

    def _disks(self, lower: Path) -> None:
        for part in ("changes", "work", "root"):
            (self.directory / part).mkdir(parents=True)
        layers = f"lowerdir={lower},upperdir={self.directory}/changes,workdir={self.directory}/work"
        _do("mount", "-t", "overlay", self.netns, "-o", layers, self.root)

    def _identity(self) -> None:
        etc = self.root / "etc"
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "machine-id").write_text(f"{hashlib.sha256(os.urandom(32)).hexdigest()[:32]}\n")
        key = self.directory / "ssh_host_key"
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", key)
        shutil.move(key, etc / "ssh/ssh_host_ed25519_key")
        shutil.copy(f"{key}.pub", etc / "ssh/ssh_host_ed25519_key.pub")
        (self.root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
        shutil.copy(f"{self.run.key}.pub", self.root / "root/.ssh/authorized_keys")
        resolved = Path("/run/systemd/resolve/resolv.conf")
        shutil.copy(resolved if resolved.exists() else "/etc/resolv.conf", etc / "resolv.conf")

    def _network(self) -> None:
        mtu = Path(f"/sys/class/net/{self.run.id}/mtu").read_text().strip()
        inside = ("ip", "-n", self.netns)
        _do("ip", "netns", "add", self.netns)
        peer = ("type", "veth", "peer", "name", "eth0", "mtu", mtu, "netns", self.netns)
        _do("ip", "link", "add", self.veth, "mtu", mtu, *peer)
        _do("ip", "link", "set", self.veth, "master", self.run.id, "up")
        _do(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _do(*inside, "link", "set", "lo", "up")
        _do(*inside, "link", "set", "eth0", "up")
        _do(*inside, "route", "add", "default", "via", f"{self.run.net}.1")

    def _start(self, disk: int) -> None:
        more = []
        if disk:
            with (self.directory / "disk").open("wb") as file:
                file.truncate(disk << 20)
            loop = _do("losetup", "--find", "--show", self.directory / "disk").strip()
            more = [f"--bind={loop}"]
            # As a cloud shows its volumes; systemd waits for the device when it mounts from it.
            links = f"vdb disk/by-id/virtio-{self.name[:20]}"
            (self.root / "etc/udev/rules.d/90-test-host.rules").write_text(
                f'SUBSYSTEM=="block", KERNEL=="{loop[5:]}", SYMLINK+="{links}", TAG+="systemd"\n'
            )
        # nspawn keeps clock and modules from a host; /sys is writable, or there would be no udev.
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--directory={self.root}"]
        command += [f"--machine={self.name}", f"--network-namespace-path=/run/netns/{self.netns}"]
        command += ["--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"]
        command += ["--capability=CAP_NET_ADMIN", *more, INIT]
        for cgroup in self.cgroups:
            cgroup.mkdir(parents=True)

        def enter() -> None:
            for cgroup in self.cgroups:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))

        again = f'while "$@"; [ $? = {REBOOT} ]; do :; done'
        with (self.directory / "console").open("wb") as console:
            subprocess.Popen(
                ["sh", "-c", again, "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={"PATH": os.environ["PATH"], "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "yes"},
                start_new_session=True,
                preexec_fn=enter,
            )

    def processes(self) -> list[int]:
        """All of them, as they are the ones in its cgroup."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.cgroups[0]) if self.note.exists() else ():
            with contextlib.suppress(OSError):  # the host removes its own cgroups as we look
                found += map(int, (Path(directory) / "cgroup.procs").read_text().split())
        return found

    def signal(self, number: int) -> None:
        """To the host's PID 1, which is a child of nspawn, which is a child of the loop in `_start`."""
        for pid in self.processes():
            with contextlib.suppress(OSError, IndexError):
                inside = re.search(r"^NSpid:\t\d+\t(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
                if inside and inside[1] == "1":
                    os.kill(pid, number)

    def ssh(self, command: str, seconds: float = 15) -> subprocess.CompletedProcess[str]:
        argv = ["ssh", "-F", str(self.run.ssh_config), self.name, command]
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=max(seconds, 1), check=False
        )

    def wait(self, deadline: float, boot: str = "") -> str:
        """What systemd says when this boot is through: running, or degraded. `boot`: the one that was before."""
        said = ""
        while (left := deadline - time.monotonic()) > 0 and self.processes():
            with contextlib.suppress(subprocess.TimeoutExpired):
                answer = self.ssh("cat /proc/sys/kernel/random/boot_id; systemctl is-system-running --wait", left)
                said = (answer.stdout + answer.stderr).strip()
                lines = answer.stdout.split()
                if len(lines) == 2 and lines[0] != boot and lines[1] in ("running", "degraded"):
                    return lines[1]
            time.sleep(0.1)  # ssh is refused at once while the host boots
        state = "does not answer" if self.processes() else "has ended"
        raise Refused(f"{self.name} {state}; ssh: {said or 'nothing'}; its console's last words: {self.console()}")

    def reboot(self) -> str:
        before = self.ssh("cat /proc/sys/kernel/random/boot_id").stdout.strip()
        if not before:
            raise Refused(f"{self.name} does not answer by ssh")
        self.signal(signal.SIGRTMIN + 5)  # systemd: reboot
        return self.wait(time.monotonic() + REBOOT_SECONDS, before)

    def console(self) -> str:
        with contextlib.suppress(OSError):
            return (self.directory / "console").read_text(errors="replace")[-1000:]
        return "none"

    def remove(self) -> None:
        """End all of its processes and take away all that is its own; from any state that a crash may have left."""
        if not self.note.exists():
            return

        def gone() -> bool:
            for pid in (left := self.processes()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        if not _until(gone, DOWN_SECONDS):
            raise Refused(f"{self.name}: processes {self.processes()} cannot be killed")
        for line in _do("losetup", "--list", "--noheadings", "--output", "NAME", "-j", self.directory / "disk").split():
            _do("losetup", "-d", line)
        # The link first: a namespace goes some time after its name.
        for command in (("ip", "link", "del", self.veth), ("ip", "netns", "del", self.netns)):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
        if self.root.is_mount():
            _do("umount", self.root)

        def without_cgroups() -> bool:
            for cgroup in self.cgroups:
                for directory, _, _ in os.walk(cgroup, topdown=False):
                    with contextlib.suppress(OSError):  # it is busy until a large process has quite ended
                        Path(directory).rmdir()
            return not any(cgroup.exists() for cgroup in self.cgroups)

        if not _until(without_cgroups, DOWN_SECONDS):
            raise Refused(f"{self.name}: its cgroups cannot be removed")
        for cgroup in self.cgroups:
            with contextlib.suppress(OSError):
                cgroup.parent.rmdir()  # with the last host of the run
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.note.unlink()


def _until(true: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(reached)


def _do(*command: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _exists(*command: str) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    new = file.with_name(f".{file.name}")
    new.write_text(text)
    new.rename(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", metavar="NAME", help="a network of hosts of its own (default: default)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "up": "make hosts and wait for them; one that is up stays as it is",
        "wait": "until they have started and answer by ssh",
        "reboot": "restart them, and wait",
        "down": "shut them down and remove them",
        "destroy": "remove them without a shutdown, as if they had burnt down",
        "list": "name, address and state of each",
    }.items():
        command = commands.add_parser(name, help=text)
        if name != "list":
            command.add_argument("names", nargs="*" if name in ("down", "destroy") else "+", metavar="HOST")
        if name in ("down", "destroy"):
            command.add_argument("--all", action="store_true", help="all of this run (without --run: of all)")
        if name == "up":
            command.add_argument("--disk", type=int, default=0, metavar="MB", help="an empty disk, /dev/vdb")
    arguments = parser.parse_args()
    if os.getuid() != 0:
        parser.error("test hosts need root")
    try:
        run = Run(arguments.run or "default")
        match arguments.command:
            case "up":
                run.up(arguments.names, arguments.disk)
            case "wait":
                run.wait(arguments.names)
            case "reboot":
                for host in [run.host(name) for name in arguments.names]:
                    print(f"{host.name} {host.address} {host.reboot()}")
            case "down" | "destroy":
                if arguments.all == bool(arguments.names):
                    parser.error("either names of hosts or --all")
                every = arguments.all and not arguments.run
                for one in [Run(place.name) for place in CACHE.glob("runs/*")] if every else [run]:
                    names = [host.name for host in one.hosts()] if arguments.all else arguments.names
                    one.down(names, orderly=arguments.command == "down")
            case "list":
                for host in run.hosts():
                    print(f"{host.name} {host.address} {'up' if host.processes() else 'down'}")
    except RuntimeError as error:
        print(f"hosts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
