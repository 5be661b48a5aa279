"""The disk that test hosts start from: Debian of this machine's release, with what the roles install already on it.

It is built once and kept in .cache/hosts under a name that is a hash of this file and of the machine's package sources.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "systemd systemd-sysv libpam-systemd libnss-systemd dbus udev openssh-server openssh-client sudo "
    "python3 python3-apt python3-venv python3-packaging python3-psycopg2 ca-certificates curl "
    "iproute2 iputils-ping netbase procps less e2fsprogs xfsprogs parted rsync "
    "ffmpeg bubblewrap chrony redis-server postgresql"
)
# A role has to start its service itself, also where Debian's package is there already.
DISABLED = ("chrony", "postgresql", "redis-server", "rsync")
# The kernel, its settings and its disks are the machine's. What starts by the clock disturbs tests.
MASKED = (
    *("systemd-sysctl.service", "procps.service", "systemd-modules-load.service", "fstrim.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer"),
)
INIT = "/usr/local/sbin/test-host-init"
FILES = {
    # Before systemd: it listens to udev only where udev's socket is there or /dev is the kernel's own.
    INIT: "#!/bin/sh\nmkdir -p /run/udev && : >/run/udev/control && exec /lib/systemd/systemd\n",
    # Only disks are looked at anew: the other devices are the machine's.
    "/etc/systemd/system/systemd-udev-trigger.service.d/disks.conf": (
        "[Service]\nExecStart=\nExecStart=udevadm trigger --type=devices --action=add --subsystem-match=block\n"
    ),
}
# By which packages are had here, so it is there as well.
ACCESS = ("/etc/pip.conf", "/usr/local/share/ca-certificates")


def image(directory: Path) -> Path:
    """The image, built in `directory` if it is not there."""
    suite = _os_release()["VERSION_CODENAME"]
    sources = _debian_sources(suite)
    access = [file for place in ACCESS for file in _files(Path(place))]
    digest = hashlib.sha256(suite.encode())
    for file in (Path(__file__), *sources, *access):
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    done = directory / f"image-{digest.hexdigest()[:12]}"
    with locked(directory / "image.lock"):
        if not done.exists():
            building = directory / "image-unfinished"
            _remove(building)
            print(f"Building the image of test hosts ({suite}); its log is {directory}/image.log", flush=True)
            _build(building, suite, sources, access, directory / "image.log")
            mounts = Path("/proc/self/mountinfo").read_text()
            for old in directory.glob("image-*"):
                if old != building and str(old) not in mounts:
                    shutil.rmtree(old)
            building.rename(done)
    return done


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(root: Path, suite: str, sources: list[Path], access: list[Path], log: Path) -> None:
    command = ["mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory", f"--include={PACKAGES}"]
    command += ["--skip=cleanup/apt/lists", "--aptopt=Acquire::Languages none"]
    command += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale")]
    with log.open("wb") as output:

        def run(*argv: object) -> None:
            # PostgreSQL makes its first cluster in this locale.
            environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
            words = [str(word) for word in argv]
            if subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            ).returncode:
                last = log.read_text(errors="replace").splitlines()[-15:]
                raise RuntimeError("\n".join([*last, f"{words[0]} failed; all of its log is in {log}"]))

        run(*command, suite, root, *sources)
        for name, text in FILES.items():
            file = root / name[1:]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (root / INIT[1:]).chmod(0o755)
        for file in access:
            copy = root / str(file)[1:]
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        run("chroot", root, "update-ca-certificates")
        run("systemctl", "--root", root, "disable", *DISABLED)
        run("systemctl", "--root", root, "mask", *MASKED)
        for key in (root / "etc/ssh").glob("ssh_host_*"):
            key.unlink()


def _debian_sources(suite: str) -> list[Path]:
    """The machine's package sources, without those that others have signed."""
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.*"))]
    texts = {file: file.read_text() for file in places if file.suffix in (".list", ".sources") and file.is_file()}
    signed = {
        file: "signed-by" in text.lower() and "debian-archive-keyring" not in text for file, text in texts.items()
    }
    own = [file for file, text in texts.items() if suite in text and not signed[file]]
    if not own:
        raise RuntimeError(f"no apt source of Debian {suite} here: test hosts need a Debian machine")
    return own


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _files(place: Path) -> list[Path]:
    return sorted(file for file in (place, *place.rglob("*")) if file.is_file())


def _remove(root: Path) -> None:
    """What an interrupted build left; it may have something mounted there."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{root}/")]):
        subprocess.run(["umount", mount], check=True)
    if root.exists():
        shutil.rmtree(root)
