"""OpenStack Swift 2.30 with its S3 API over TLS, on one node and one disk: Debian's packages, no root needed.

Over TLS, because that is where clients fail that work over plain http.

swift.py ADDRESS DIRECTORY runs it there until it is ended, and prints how to reach it.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from processes import Servers, free_ports, listens

PYTHON = "/usr/bin/python3"  # Debian's, which has Debian's swift

_SWIFT = """\
[swift-hash]
swift_hash_path_prefix = {hash}
swift_hash_path_suffix = {hash}
[storage-policy:0]
name = gold
default = yes
"""

_PROXY = """\
[DEFAULT]
bind_ip = {address}
bind_port = {port}
cert_file = {directory}/server.pem
key_file = {directory}/server.key
workers = 0
user = {user}
swift_dir = {directory}
log_level = WARNING
log_address = /dev/null
[pipeline:main]
pipeline = {pipeline} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_worker = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
"""

_FILTERS = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth "
    "copy slo dlo versioned_writes symlink"
)

_STORAGE = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}
devices = {directory}/nodes
mount_check = false
recon_cache_path = {directory}
fallocate_reserve = 1%
log_level = WARNING
log_address = /dev/null
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

_RINGS = """\
import sys
from swift.common.ring import RingBuilder
for kind, port in zip(("account", "container", "object"), sys.argv[2:]):
    ring = RingBuilder(6, 1, 1)
    ring.add_dev(dict(region=1, zone=1, ip="127.0.0.1", port=int(port), device="d1", weight=1.0))
    ring.rebalance()
    ring.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""


def check_installed() -> None:
    """Raises RuntimeError naming what is missing."""
    programs = [
        *(f"swift-{kind}-server" for kind in ("proxy", "account", "container", "object")),
        "memcached",
        "openssl",
    ]
    missing = [name for name in programs if not shutil.which(name, path="/usr/bin:/bin:/usr/sbin")]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} missing: "
            "apt install swift-proxy swift-account swift-container swift-object memcached openssl"
        )


def check_xattrs(directory: Path) -> None:
    """Raises RuntimeError unless files in the directory can have user attributes, as Swift needs."""
    probe = directory / "xattr"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift", b"1")
    except OSError as error:
        raise RuntimeError(
            f"{directory} cannot hold Swift's user attributes ({error.strerror}): use ext4 or xfs"
        ) from None
    finally:
        probe.unlink()


class Swift(Servers):
    """`with Swift(directory) as s:` s.endpoint (https), s.access_key, s.secret_key, s.ca_bundle.

    Raises RuntimeError where Swift is not installed or the directory's file system will not do.
    """

    address = "127.0.0.1"  # to be reached at
    endpoint: str
    access_key = "test:worker"
    secret_key: str
    ca_bundle: Path

    def start(self) -> None:
        check_installed()
        check_xattrs(self.directory)
        proxy, memcached, *storage = free_ports(5)
        self.endpoint = f"https://{self.address}:{proxy}"
        self.secret_key = secrets.token_hex(20)
        self.ca_bundle = self.directory / "ca.pem"
        user = getpass.getuser() if os.getuid() else "root"
        (self.directory / "nodes" / "d1").mkdir(parents=True)
        self._write("swift.conf", _SWIFT, hash=secrets.token_hex(8))
        common = {"user": user, "directory": self.directory, "pipeline": _FILTERS}
        self._write(
            "proxy-server.conf",
            _PROXY,
            address=self.address,
            port=proxy,
            memcached=memcached,
            secret=self.secret_key,
            **common,
        )
        self.spawn("memcached", ["memcached", "-l", "127.0.0.1", "-p", memcached, "-m", 32, "-u", user])
        self._run([PYTHON, "-c", _RINGS, self.directory, *storage])
        self._make_certificates()
        ports = {"proxy": proxy}
        for kind, port in zip(("account", "container", "object"), storage, strict=True):
            ports[kind] = port
            self._write(f"{kind}-server.conf", _STORAGE, kind=kind, port=port, **common)
        for kind in ports:
            self.spawn(kind, [PYTHON, f"/usr/bin/swift-{kind}-server", self.directory / f"{kind}-server.conf"])
        self.wait("memcached", lambda: listens(memcached))
        for kind in ("account", "container", "object"):
            self.wait(kind, lambda kind=kind: listens(ports[kind]))  # type: ignore[misc]
        self.wait("proxy", self._answers)

    def _answers(self) -> bool:
        trust = ssl.create_default_context(cafile=self.ca_bundle)
        return bool(urllib.request.urlopen(f"{self.endpoint}/healthcheck", timeout=2, context=trust).status == 200)

    def _make_certificates(self) -> None:
        """A CA in ca.pem, and a server certificate of it for the address."""
        request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30"
        authority = "-subj /CN=TestCA -addext keyUsage=critical,keyCertSign -keyout ca.key -out ca.pem"
        server = (
            f"-subj /CN={self.address} -CA ca.pem -CAkey ca.key -addext subjectAltName=IP:{self.address} "
            "-addext basicConstraints=critical,CA:FALSE -keyout server.key -out server.pem"
        )
        self._run(f"{request} {authority}".split())
        self._run(f"{request} {server}".split())

    def _write(self, name: str, text: str, **values: object) -> None:
        (self.directory / name).write_text(text.format(**values))

    def _run(self, argv: Sequence[object]) -> None:
        done = subprocess.run([str(a) for a in argv], cwd=self.directory, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{argv[0]} failed:\n{done.stderr[-2000:]}")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    Swift.address, directory = sys.argv[1:]
    with Swift(directory) as swift:
        names = ("endpoint", "access_key", "secret_key", "ca_bundle")
        print(json.dumps({name: str(getattr(swift, name)) for name in names}), flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
