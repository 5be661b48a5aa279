"""An OpenSSH server on loopback that lets the present user in with a key of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path

from processes import Servers, free_ports, listens


def sshd() -> str:
    """Path of the program. Raises RuntimeError where it, or ssh-keygen, is not installed."""
    found = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", os.defpath))
    if not found or not shutil.which("ssh-keygen") or not shutil.which("ssh"):
        raise RuntimeError("sshd is missing: apt install openssh-server openssh-client")
    return found


def make_key(path: Path) -> str:
    """Make a key pair at `path` and `path`.pub; the public line without its comment."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return " ".join(path.with_name(path.name + ".pub").read_text().split()[:2])


class Sshd(Servers):
    """`with Sshd(directory) as s:` s.user, s.port, s.key, s.known_hosts; s.url(path) is a source."""

    user: str
    port: int
    key: Path
    known_hosts: Path

    def start(self) -> None:
        program = sshd()
        (self.port,) = free_ports(1)
        self.user = getpass.getuser()
        self.key, self.known_hosts = self.directory / "key", self.directory / "known_hosts"
        (self.directory / "authorized").write_text(make_key(self.key) + "\n")
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {make_key(self.directory / 'host_key')}\n")
        if os.geteuid() == 0:  # where sshd as root changes its root to
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        options = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": self.directory / "host_key",
            "AuthorizedKeysFile": self.directory / "authorized",
            "AuthenticationMethods": "publickey",
            "PermitRootLogin": "prohibit-password",
            "StrictModes": "no",  # the directory may lie below one that others can write
            "UsePAM": "no",
            "PidFile": "none",
            "MaxStartups": "100",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self.spawn("sshd", [program, "-D", "-e", "-f", "/dev/null", *words])
        self.wait("sshd", lambda: listens(self.port))

    def url(self, path: Path | str) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}{path}"
