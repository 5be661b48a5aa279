"""The disk that test hosts start from: Debian of this machine's release, with what the roles install already on it.

It is built once and kept in .cache/hosts under a name that is a hash of what goes into it: this file, the machine's
package sources, the workers' locks, and what the models are made by.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = (
    "systemd systemd-sysv libpam-systemd libnss-systemd dbus udev openssh-server openssh-client sudo "
    "python3 python3-apt python3-venv python3-packaging python3-psycopg2 ca-certificates curl "
    "iproute2 iputils-ping netbase procps less e2fsprogs xfsprogs parted rsync "
    "ffmpeg bubblewrap chrony redis-server postgresql "
    "prometheus prometheus-alertmanager prometheus-node-exporter "
    "swift-proxy swift-account swift-container swift-object memcached openssl"
)
# A role has to start its service itself, also where Debian's package is there already.
DISABLED = (
    *("chrony", "postgresql", "redis-server", "rsync", "memcached", "swift-*"),
    *("prometheus", "prometheus-alertmanager", "prometheus-node-exporter"),
)
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

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON = CHECKOUT / ".venv" / "bin" / "python"
# The workers' libraries, as the role worker_common installs them: it finds them complete.
LOCKS = [CHECKOUT / "worker_src" / "locks" / f"{profile}.txt" for profile in ("base", "cpu")]
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# The demo's models lie where a model host has them.
STACK = CHECKOUT / "tests" / "stack"
MODELS = "srv/models"
MODELS_MADE_BY = [STACK / "models.py", STACK / "tiny_models.py", STACK / "locks" / "demo.txt"]
MODELS_MADE_BY += sorted((CHECKOUT / "inventories" / "single_node" / "policies").glob("*.txt"))


def image(directory: Path) -> Path:
    """The image, built in `directory` if it is not there."""
    suite = _os_release()["VERSION_CODENAME"]
    sources = _debian_sources(suite)
    access = [file for place in ACCESS for file in _files(Path(place))]
    digest = hashlib.sha256(suite.encode())
    for file in (Path(__file__), *sources, *access, *LOCKS, *MODELS_MADE_BY):
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

        def run(*argv: object, cwd: Path = CHECKOUT) -> None:
            # PostgreSQL makes its first cluster in this locale.
            environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
            words = [str(word) for word in argv]
            if subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=cwd
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
        units = [unit.stem for name in DISABLED for unit in (root / "lib/systemd/system").glob(f"{name}.service")]
        run("systemctl", "--root", root, "disable", *(unit for unit in units if not unit.endswith("@")))
        run("systemctl", "--root", root, "mask", *MASKED)
        for key in (root / "etc/ssh").glob("ssh_host_*"):
            key.unlink()
        for lock in LOCKS:
            _environment(root, lock, run)
        run(PYTHON, "-c", f"import models; models.assemble(models.Path({str(root / MODELS)!r}))", cwd=STACK)


def _environment(root: Path, lock: Path, run: Callable[..., None]) -> None:
    """What roles/worker_common/tasks/environment.yml makes; wheels are fetched as this machine's pip knows how."""
    python = next((root / "usr/lib").glob("python3.*")).name
    name = f"{lock.stem}-py{python.removeprefix('python')}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    inside = Path("/opt/lab-audio/envs", name)
    outside = root / str(inside)[1:]
    packages = Path("lib", python, "site-packages")
    what = ("--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check")
    run("chroot", root, "python3", "-m", "venv", inside)
    shutil.copyfile(lock, outside / "lock.txt")
    # By Debian's Python, as there: a lock has other packages for another version.
    fetch = ["/usr/bin/python3", outside / packages / "pip", "download", *what, f"--requirement={lock}"]
    fetch += [f"--dest={outside / 'wheelhouse'}"]
    try:
        run(*fetch)
    except RuntimeError:  # PyPI has no CPU builds of torch
        run(*fetch, f"--extra-index-url={TORCH_INDEX}")
    install = [inside / "bin/python", "-m", "pip", "install", *what, "--no-cache-dir", "--no-index"]
    run("chroot", root, *install, f"--find-links={inside}/wheelhouse", f"--requirement={inside}/lock.txt")
    shutil.rmtree(outside / "wheelhouse")
    for library in (outside / packages / "torchaudio/lib").glob("*.so"):
        library.unlink()
    (outside / "complete").touch()


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
