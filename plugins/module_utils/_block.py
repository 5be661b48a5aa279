# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which disk is meant, who uses it and what is on it. Reads only. Private: it may change with any release."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import struct
import subprocess
import typing as t
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from ansible_collections.lab.audio.plugins.module_utils._host import Refused

MIB = 1 << 20
HEAD = 8 * MIB
SAMPLE = 4096
HEAD_FREE = 1024
PROBE_SECONDS = 20
SERIAL_CUT = 20
SYSTEM_MOUNTS = ("/", "/boot", "/boot/efi", "/efi", "/etc", "/home", "/opt", "/root", "/srv", "/usr", "/var")


class Disk(t.NamedTuple):
    """A block device. `number`: its major:minor. `whole`: it is no partition."""

    node: str
    number: str
    size: int
    whole: bool

    @property
    def sys(self) -> Path:
        return Path("/sys/dev/block", self.number)


class Signatures(t.NamedTuple):
    """What blkid and wipefs find: types and UUIDs of both. `uuid`: of the file system."""

    kinds: frozenset[str]
    uuids: frozenset[str]
    uuid: str


def execute(
    *command: str, seconds: float = PROBE_SECONDS, codes: t.Sequence[int] = (0,), keep: t.Sequence[int] = ()
) -> tuple[int, str]:
    """Run a program; its exit code and output. Raises Refused on any other code than `codes`, and after `seconds`."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"}
    said = " ".join(command)
    try:
        # run_command has no timeout, and holds no lock for what outlives us.
        child = subprocess.Popen(  # pylint: disable=ansible-bad-function
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            pass_fds=keep,
            start_new_session=True,
        )
    except OSError as error:
        raise Refused(f"{said}: cannot be run ({error.strerror}); is the package of {command[0]} installed?") from error
    try:
        out, err = (text.decode(errors="replace") for text in child.communicate(timeout=seconds))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise Refused(
            f"{said}: no answer in {seconds:g} s, so it was killed, perhaps with its work half done; look for the cause"
            " in the kernel's log, then run the task again"
        ) from None
    if child.returncode not in codes:
        raise Refused(f"{said}: exit code {child.returncode}: {(err.strip() or out.strip() or 'it said nothing')}")
    return child.returncode, out


def text_of(path: Path) -> str:
    """What a file of /sys says; empty where there is none."""
    try:
        return path.read_bytes().decode("ascii", "ignore").strip().strip("\0").strip()
    except OSError:
        return ""


def find_disk(device: str | None, volume_id: str | None, serial: str | None, expected: int | None) -> Disk:
    """The one disk that everything given agrees on. Raises Refused otherwise."""
    found = {}
    if device:
        found[f"device {device}"] = _resolve(device)
    if volume_id:
        found[f"volume_id {volume_id}"] = _by_serial("volume_id", volume_id, cut=True)
    if serial:
        found[f"serial {serial}"] = _by_serial("serial", serial, cut=False)
    disks = {_disk(node) for node in found.values()}
    if len(disks) != 1:
        said = ", ".join(f"{name} is {node}" for name, node in found.items())
        raise Refused(f"not the same disk: {said}; correct the one that is wrong")
    (disk,) = disks
    # Half a percent is more than any rounding, and less than from one volume size in GiB to the next up to 200.
    if expected is not None and abs(disk.size - expected) * 200 > expected:
        raise Refused(
            f"{disk.node} has {disk.size} bytes, not the {expected} of expected_size; is it the right disk?"
            " If it is, correct expected_size"
        )
    return disk


def _disk(node: str) -> Disk:
    try:
        status = os.stat(node)
    except OSError as error:
        raise Refused(f"{node}: {error.strerror}; is the volume attached?") from error
    if not stat.S_ISBLK(status.st_mode):
        raise Refused(f"{node} is not a block device")
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    sys = Path("/sys/dev/block", number)
    sectors = text_of(sys / "size")
    if not sectors.isdigit() or int(sectors) == 0:
        raise Refused(f"{node} has no medium: the kernel gives it no size; is the volume attached?")
    return Disk(node, number, int(sectors) * 512, not (sys / "partition").exists())


def _resolve(device: str) -> str:
    tag, value = device.split("=", 1) if "=" in device else (device, "")
    if tag not in ("LABEL", "UUID"):
        if not device.startswith("/"):
            raise Refused(f"device {device} is neither a path nor LABEL= nor UUID=")
        return os.path.realpath(device)
    _code, out = execute("blkid", "-c", "/dev/null", "-o", "device", "-t", f"{tag}={value}", codes=(0, 2))
    nodes = sorted({os.path.realpath(line) for line in out.split("\n") if line})
    if len(nodes) != 1:
        raise Refused(f"device {device}: {_several(nodes)}")
    return nodes[0]


def _several(nodes: t.Sequence[str]) -> str:
    if not nodes:
        return "no disk has it; is the volume attached?"
    return f"{' and '.join(nodes)} have it; name one of them in another way"


def _by_serial(option: str, wanted: str, *, cut: bool) -> str:
    """The disk with this serial. virtio and NVMe keep 20 characters of one, so that is all a Cinder id has to match."""

    def same(seen: str) -> bool:
        seen, whole = seen.lower(), wanted.lower()
        return seen == whole or (cut and len(seen) == SERIAL_CUT and whole.startswith(seen))

    nodes = set()
    for sys in Path("/sys/block").glob("*"):
        seen = [text_of(sys / "serial"), *(text_of(sys / "device" / name) for name in ("serial", "wwid"))]
        with suppress(OSError):
            # Four bytes of header come before the serial in this page.
            seen.append((sys / "device" / "vpd_pg80").read_bytes()[4:].decode("ascii", "ignore").strip(" \0"))
        if any(same(text) or same(text.split(" ")[-1].rsplit("_", 1)[-1]) for text in seen):
            nodes.add(os.path.realpath(f"/dev/{sys.name.replace('!', '/')}"))
    for link in Path("/dev/disk/by-id").glob("*"):
        name = re.match(r"(?:virtio-|scsi-.*QEMU.*_|nvme-.*_)(.+)$", link.name)
        if name and not re.search(r"-part\d+$", link.name) and same(name[1]):
            nodes.add(os.path.realpath(link))
    if len(nodes) != 1:
        raise Refused(f"{option} {wanted}: {_several(sorted(nodes))}")
    return nodes.pop()


def mounts() -> list[tuple[str, str]]:
    """Number of the device and mount point of each mount, in the order they were mounted."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        source = unescape(fields[fields.index("-") + 2])
        # btrfs shows a number that no device has: its source tells the device.
        number = device_number(source) if fields[2].startswith("0:") else fields[2]
        found.append((number or fields[2], unescape(fields[4])))
    return found


def unescape(field: str) -> str:
    r"""A field of fstab or of mountinfo, where a blank is \040."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def device_number(path: str) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _family(disk: Disk) -> dict[str, Path]:
    """The disk and its partitions: number and directory in /sys."""
    here = disk.sys.resolve()
    return {text_of(path / "dev"): path for path in (here, *(part.parent for part in here.glob("*/partition")))}


def _below(number: str) -> set[str]:
    """The devices that a device is made of, and the disks of those that are partitions."""
    found: set[str] = set()
    todo = [Path("/sys/dev/block", number).resolve()]
    while todo:
        sys = todo.pop()
        seen = text_of(sys / "dev")
        if seen and seen not in found:
            found.add(seen)
            todo += [slave.resolve() for slave in sys.glob("slaves/*")]
            if (sys / "partition").exists():
                todo.append(sys.parent)
    return found


def refuse_in_use(disk: Disk, path: str) -> bool:
    """Whether it is mounted at `path`, and nothing else. Raises Refused if it is in any other use."""
    for number, place in mounts():
        if place in SYSTEM_MOUNTS and disk.number in _below(number):
            raise Refused(f"{disk.node} holds {place} of this system; it is never touched")
    family = _family(disk)
    places = [(number, place) for number, place in mounts() if number in family]
    for number, place in places:
        if number != disk.number or place != path:
            raise Refused(f"{disk.node} is mounted at {place}; unmount it, or name {place} as path")
    for number, sys in family.items():
        holders = sorted(entry.name for entry in sys.glob("holders/*"))
        if holders:
            raise Refused(f"{disk.node} is held by {', '.join(holders)} (LVM, RAID, encryption or multipath)")
        for line in Path("/proc/swaps").read_text().splitlines()[1:]:
            if device_number(unescape(line.split()[0])) == number:
                raise Refused(f"{disk.node} is in use as swap; swapoff it if it is the right disk")
    if places:
        return True
    try:
        os.close(os.open(disk.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Refused(f"{disk.node}: an O_EXCL open says that it is in use; find out by what") from error
        raise Refused(f"{disk.node}: an O_EXCL open fails: {error.strerror}") from error
    return False


def read_signatures(disk: Disk) -> Signatures:
    """What blkid and wipefs find. Raises Refused where they are in doubt, or see different things."""
    kinds, uuids, uuid = set(), set(), ""
    code, out = execute("blkid", "-p", "-o", "export", disk.node, codes=(0, 2))
    seen = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    if (code == 2 and seen) or (code == 0 and not (seen.get("TYPE") or seen.get("PTTYPE"))):
        raise Refused(f"blkid -p {disk.node}: exit code {code} with {out.strip() or 'no output'} is not understood")
    for key in ("TYPE", "PTTYPE"):
        if seen.get(key):
            kinds.add(seen[key])
    # A table's UUID is its PTUUID.
    uuid = seen.get("UUID", "")
    uuids |= {value for key, value in seen.items() if key in ("UUID", "PTUUID")}
    _code, out = execute("wipefs", "--no-act", "--json", disk.node)
    try:
        listed = json.loads(out or '{"signatures": []}')["signatures"]
        wiped = {entry["type"] for entry in listed}
        uuids |= {entry["uuid"] for entry in listed if entry.get("uuid")}
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"wipefs --no-act --json {disk.node}: its output is not understood: {out.strip()}") from error
    # The protective MBR is a part of GPT.
    wiped = {kind for kind in wiped if kind != "PMBR"} or wiped
    if code == 2 and wiped:
        raise Refused(f"wipefs finds {', '.join(sorted(wiped))} on {disk.node} where blkid -p finds nothing")
    if code == 0 and not wiped:
        raise Refused(f"blkid -p finds {', '.join(sorted(kinds))} on {disk.node} where wipefs finds nothing")
    return Signatures(frozenset(kinds | wiped), frozenset(uuids - {""}), uuid)


def refuse_partitions(disk: Disk) -> None:
    if len(_family(disk)) > 1:
        raise Refused(f"{disk.node} has partitions; it is not blank. Remove them by hand if it is the right disk")


def first_byte(disk: Disk) -> int | None:
    """Where the first byte that is not zero is, of the places where file systems and others keep what they need."""
    for start, data in _read_places(disk):
        if data.count(0) != len(data):
            return start + next(i for i, byte in enumerate(data) if byte)
    return None


def not_of_mkfs(disk: Disk, uuid: str) -> int | None:
    """Where something is that mkfs with this UUID, killed before its superblock was there, has not left.

    Data without a file system begin where it leaves zeros. A superblock's copy with another UUID is of a file system
    that lost its first one.
    """
    for start, data in _read_places(disk):
        if start == 0 and data.count(0, 0, HEAD_FREE) != HEAD_FREE:
            return 0
        found = ""
        if data[:4] == b"XFSB":
            found = str(UUID(bytes=data[32:48]))
        elif data[56:58] == b"\x53\xef":  # ext4
            found = str(UUID(bytes=data[104:120]))
        elif data[64:72] == b"_BHRfS_M":
            found = "btrfs"
        if found and found != uuid:
            return start
    return None


def _read_places(disk: Disk) -> t.Iterator[tuple[int, bytes]]:
    with open(disk.node, "rb", buffering=0) as file:
        for start, length in places(disk.size):
            try:
                data = os.pread(file.fileno(), length, start)
            except OSError as error:
                raise Refused(f"{disk.node} cannot be read at byte {start}: {error.strerror}") from error
            if len(data) != length:
                raise Refused(f"{disk.node} cannot be read at byte {start}: {len(data)} of {length} bytes")
            yield start, data


def places(size: int) -> list[tuple[int, int]]:
    """Start and length of what has to be zero on a blank disk.

    The head holds tables, labels of LVM, both headers of LUKS2, md 1.1 and 1.2, and btrfs; the last MiB md 0.90 and
    1.0, the second GPT and ZFS. The rest are copies of superblocks, and 256 samples all over the disk.
    """
    starts = {64 * MIB, 256 << 30}
    for block in (1 << n for n in range(10, 17)):
        group = 8 * block * block
        first = 1024 if block == 1024 else 0
        sparse = {1} | {base**n for base in (3, 5, 7) for n in range(1, 40)} | {(size - 1) // group}
        starts |= {first + group * number for number in sparse}
    # xfs divides a disk into equal groups, each with a superblock: 4 by default, more on striped or large ones.
    for groups in (*range(2, 33), 64, 128, 256):
        starts |= {-(-size // 4096 // groups) * 4096 * n for n in range(1, groups)}
        starts |= {size // 4096 // groups * 4096 * n for n in range(1, groups)}
    starts |= {1 << 40}
    whole = [(0, min(HEAD, size)), (max(0, size - MIB), min(MIB, size))]
    return whole + [(start, SAMPLE) for start in sorted(starts) if HEAD <= start <= size - MIB - SAMPLE]


def superblock(disk: Disk, fstype: str) -> dict[str, int]:
    """The `size` of a file system, and whether it is `unused`: it was never mounted. Not of xfs while it is mounted."""
    with open(disk.node, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), 4096, 0)
    if fstype == "xfs":
        block, blocks = struct.unpack_from(">IQ", data, 4)
        # mkfs.xfs clears this flag with its last write, and the kernel mounts nothing that has it.
        unfinished = data[126]
        return {"size": block * blocks, "unused": int(unfinished == 1)}
    low, log = struct.unpack_from("<I", data, 1024 + 4)[0], struct.unpack_from("<I", data, 1024 + 24)[0]
    mounted, count = struct.unpack_from("<I", data, 1024 + 44)[0], struct.unpack_from("<H", data, 1024 + 52)[0]
    wide = struct.unpack_from("<I", data, 1024 + 96)[0] & 0x80
    high = struct.unpack_from("<I", data, 1024 + 336)[0] if wide else 0
    return {"size": ((high << 32) + low) << (10 + log), "unused": int(not mounted and not count)}
