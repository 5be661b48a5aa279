"""lab.audio.gpu_volume on loop devices of these tests' own, with real programs. Needs root."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.lab.audio.plugins.module_utils._block import execute
from ansible_collections.lab.audio.plugins.module_utils._changes import Changes
from ansible_collections.lab.audio.plugins.module_utils._host import Refused
from ansible_collections.lab.audio.plugins.modules.gpu_volume import lay_out
from loops import MIB, Loop, do, instead_of, loop, own_mounts
from needed import needed

from conftest import CHECKOUT, PYTHON, Run, command, environment, write_arguments

MODULE = "gpu_volume"
KILLS = int(os.environ.get("KILLS", "20"))
SIZE = 320 * MIB
VOLUME = "65953b61-0af1-42f6-a8d1-5b1b2a4f3c11"


@pytest.fixture(scope="module", autouse=True)
def namespace() -> None:
    with needed():
        if os.getuid():
            raise RuntimeError("needs root, for loop devices")
        own_mounts()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Loop]:
    with loop(tmp_path / "disk.img", SIZE) as made:
        yield made


class Place:
    """Where a test mounts, and its fstab."""

    def __init__(self, root: Path) -> None:
        self.path, self.fstab = root / "data", root / "fstab"
        self.fstab.write_text("# mine\n")

    def options(self, disk: Loop, **more: Any) -> dict[str, Any]:
        size = str(disk.size)
        return {"device": disk.node, "expected_size": size, "path": self.path, "fstab": self.fstab, **more}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def uuid_of(disk: Loop) -> str:
    return do("blkid", "-p", "-s", "UUID", "-o", "value", disk.node).strip()


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_blank_disk_to_a_mounted_volume_and_back(predicted: Run, disk: Loop, place: Place, fstype: str) -> None:
    layout = [{"path": "models/gemma", "mode": "0700"}, {"path": "models", "owner": "1", "group": "daemon"}]
    options = place.options(disk, fstype=fstype, label="lab", directories=layout, mount_options=["noatime"])
    did = predicted(MODULE, **options)
    assert did["changed"] and disk.places() == [str(place.path)]
    uuid = uuid_of(disk)
    line = f"UUID={uuid} {place.path} {fstype} noatime,nofail,x-systemd.device-timeout=30s 0 2\n"
    assert place.fstab.read_text() == "# mine\n" + line
    assert do("blkid", "-p", "-s", "LABEL", "-o", "value", disk.node).strip() == "lab"
    assert [(place.path / d).stat().st_mode & 0o7777 for d in ("", "models", "models/gemma")] == [0o750, 0o750, 0o700]
    assert ((place.path / "models").stat().st_uid, (place.path / "models").stat().st_gid) == (1, 1)
    (place.path / "models" / "kept").write_text("data")
    (place.path / "models").chmod(0o777)
    again = predicted(MODULE, **options)
    assert again["plan"] == [f"set owner and mode of {place.path}/models"] and again["uuid"] == uuid
    gone = predicted(MODULE, state="absent", path=place.path, fstab=place.fstab)
    assert gone["changed"] and disk.places() == [] and place.fstab.read_text() == "# mine\n"
    back = predicted(MODULE, **{**options, "device": f"UUID={uuid}", "expected_size": None})
    assert back["uuid"] == uuid and (place.path / "models" / "kept").read_text() == "data"


def test_a_directory_above_is_made_for_the_same_owner(predicted: Run, disk: Loop, place: Place) -> None:
    first = {"path": "models/gemma", "owner": "1", "group": "1", "mode": "0700"}
    second = {"path": "models/whisper/large", "owner": "2", "mode": "0755"}
    for layout in ([first], [second, first]):
        predicted(MODULE, **place.options(disk, directories=layout))
    status = [(place.path / d).stat() for d in ("models", "models/gemma", "models/whisper", "models/whisper/large")]
    assert [(one.st_uid, one.st_gid, one.st_mode & 0o777) for one in status] == [
        *[(1, 1, 0o700)] * 2,
        *[(2, 0, 0o755)] * 2,
    ]


class Swaps(Changes):
    """The owner of a directory puts a link in its place when the module has looked at it."""

    def __init__(self, there: Path, link: Path) -> None:
        super().__init__()
        self.there, self.link = there, link

    def note(self, step: str, name: str, before: Any, after: Any) -> None:
        super().note(step, name, before, after)
        self.there.rename(self.there.with_name("aside"))
        self.there.symlink_to(self.link)


@pytest.mark.parametrize("below", ["", "new"])
def test_no_link_is_followed(tmp_path: Path, below: str) -> None:
    top, others = tmp_path / "data", tmp_path / "others"
    (top / "models").mkdir(parents=True)
    top.chmod(0o750)
    others.mkdir()
    others.chmod(0o701)
    wanted = [(str(top), -1, -1, 0o750), (str(top / "models" / below), 1, 1, 0o700)]
    with pytest.raises(Refused, match="a symbolic link; remove it"):
        lay_out(wanted, Swaps(top / "models", others), False)
    assert (others.stat().st_uid, others.stat().st_mode & 0o777, list(others.iterdir())) == (0, 0o701, [])
    with pytest.raises(Refused, match="a symbolic link; remove it"):
        lay_out(wanted, Changes(), True)


def may_resize() -> bool:
    effective = Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0]
    return bool(int(effective, 16) >> 24 & 1)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_it_grows_while_mounted(predicted: Run, run: Run, disk: Loop, place: Place, fstype: str) -> None:
    predicted(MODULE, **place.options(disk, fstype=fstype))
    (place.path / "kept").write_text("data")
    disk.grow(SIZE + 192 * MIB)
    assert predicted(MODULE, **place.options(disk, fstype=fstype, grow=False))["changed"] is False
    if fstype == "ext4" and not may_resize():
        refused = run(MODULE, **place.options(disk))
        assert "resize2fs" in refused["msg"] and (place.path / "kept").read_text() == "data"
        warnings.warn("NOT RUN: growing a mounted ext4, which needs CAP_SYS_RESOURCE; its refusal was", stacklevel=1)
        return
    grown = predicted(MODULE, **place.options(disk, fstype=fstype))
    assert [step.split()[0] for step in grown["plan"]] == ["grow"]
    size = os.statvfs(place.path)
    assert size.f_blocks * size.f_frsize > SIZE + 96 * MIB and (place.path / "kept").read_text() == "data"


def mbr(disk: Loop) -> None:
    entry = bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    disk.put(446, entry)
    disk.put(510, b"\x55\xaa")


def gpt(disk: Loop) -> None:
    subprocess.run(["sfdisk", "-q", disk.node], input=b"label: gpt\nsize=8M\n", capture_output=True, check=True)


def lost_ext4(disk: Loop) -> None:
    do("mkfs.ext4", "-q", disk.node)
    disk.put(0, bytes(8 * MIB))


def lost_xfs(disk: Loop) -> None:
    do("mkfs.xfs", "-q", disk.node)
    disk.put(0, bytes(8 * MIB))


def lost_btrfs(disk: Loop) -> None:
    do("mkfs.btrfs", "-q", disk.node)
    disk.put(65536, bytes(4096))
    disk.put(64 * MIB + 64, bytes(8))


def luks(disk: Loop) -> None:
    key = disk.image.with_name("key")
    key.write_text("sesame")
    do("cryptsetup", "-q", "luksFormat", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", disk.node, key)


def lvm(disk: Loop) -> None:
    do("pvcreate", "-qq", "--devices", disk.node, disk.node)


def raid(disk: Loop) -> None:
    """The superblock of version 1.2 that mdadm writes, as far as blkid asks for it."""
    block = bytearray(256)
    block[0:8] = (0xA92B4EFC).to_bytes(4, "little") + (1).to_bytes(4, "little")
    block[16:32] = bytes(range(16))
    block[128 + 16 : 128 + 24] = (8).to_bytes(8, "little")
    words = sum(int.from_bytes(block[i : i + 4], "little") for i in range(0, 256, 4))
    block[216:220] = ((words & 0xFFFFFFFF) + (words >> 32)).to_bytes(4, "little")
    disk.put(4096, bytes(block))


REFUSED: dict[str, tuple[Callable[[Loop], object], str]] = {
    "xfs": (lambda disk: do("mkfs.xfs", "-q", disk.node), "has xfs"),
    "MBR": (mbr, "has dos"),
    "GPT": (gpt, "has gpt"),
    "LVM": (lvm, "has LVM2_member"),
    "swap": (lambda disk: do("mkswap", disk.node), "has swap"),
    "LUKS": (luks, "has crypto_LUKS"),
    "RAID member": (raid, "has linux_raid_member"),
    "btrfs": (lambda disk: do("mkfs.btrfs", "-q", disk.node), "has btrfs"),
    "lost ext4": (lost_ext4, "no signature, but byte"),
    "lost xfs": (lost_xfs, "no signature, but byte"),
    "lost btrfs": (lost_btrfs, "no signature, but byte"),
    "data at the end": (lambda disk: disk.put(disk.size - 70000, b"x"), "no signature, but byte"),
    "two kinds": (lambda disk: (do("mkfs.ext4", "-q", disk.node), raid(disk)), ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_disk_that_is_not_blank_is_refused_and_left_as_it_was(
    predicted: Run, run: Run, disk: Loop, place: Place, what: str
) -> None:
    make, said = REFUSED[what]
    make(disk)
    before = disk.sha256()
    refused = predicted(MODULE, **place.options(disk))
    assert refused["failed"] and said in refused["msg"] and disk.node in refused["msg"], refused
    refused = run(MODULE, **place.options(disk, wipe="vfat"))
    assert refused["failed"] and said in refused["msg"]
    assert disk.sha256() == before and place.fstab.read_text() == "# mine\n" and not place.path.exists()


def test_ext4_is_refused_where_xfs_is_wanted_and_used_where_it_is(predicted: Run, disk: Loop, place: Place) -> None:
    do("mkfs.ext4", "-q", disk.node)
    uuid, before = uuid_of(disk), disk.sha256()
    assert "has ext4" in predicted(MODULE, **place.options(disk, fstype="xfs"))["msg"]
    assert disk.sha256() == before
    assert predicted(MODULE, **place.options(disk, wipe="ext4"))["uuid"] == uuid


WIPED: dict[str, Callable[[Loop], str]] = {
    "swap": lambda disk: str(do("mkswap", disk.node) and "swap"),
    "lost ext4": lambda disk: str(lost_ext4(disk) or "unsigned-data"),
    "ext4": lambda disk: str(do("mkfs.ext4", "-q", disk.node) or uuid_of(disk)),
    "MBR": lambda disk: str(mbr(disk) or "dos"),
}


@pytest.mark.parametrize("what", WIPED)
def test_wipe_destroys_what_it_names(predicted: Run, disk: Loop, place: Place, what: str) -> None:
    wipe = WIPED[what](disk)
    did = predicted(MODULE, **place.options(disk, wipe=wipe))
    assert did.get("failed") is None and did["plan"][0] == f"destroy {wipe} on {disk.node}"
    assert did["plan"][1].startswith("format") and uuid_of(disk) != wipe


@pytest.mark.parametrize("what", ["swap", "lost ext4", "MBR"])
def test_a_wipe_that_stays_in_a_playbook_destroys_no_volume(
    predicted: Run, disk: Loop, place: Place, what: str
) -> None:
    options = place.options(disk, wipe=WIPED[what](disk))
    assert predicted(MODULE, **options)["changed"]
    do("umount", place.path)
    do("wipefs", "--all", disk.node)
    WIPED[what](disk)  # what is left of the volume looks as the disk did before
    before = disk.sha256()
    assert "may be that volume" in predicted(MODULE, **options)["msg"]
    assert disk.sha256() == before
    predicted(MODULE, state="absent", path=place.path, fstab=place.fstab)
    assert predicted(MODULE, **options)["plan"][0].startswith("destroy")


def test_a_wipe_by_uuid_needs_no_other_fstab(predicted: Run, disk: Loop, place: Place) -> None:
    do("mkfs.ext4", "-q", disk.node)
    place.fstab.write_text(f"UUID={uuid_of(disk)} {place.path} ext4 defaults 0 0\n")
    assert predicted(MODULE, **place.options(disk, wipe=uuid_of(disk)))["plan"][0].startswith("destroy")


def test_a_program_that_does_not_answer_may_have_done_something() -> None:
    with pytest.raises(Refused, match="so it was killed, perhaps with its work half done"):
        execute("sleep", "9", seconds=0.1)


@pytest.mark.parametrize("probe", ["blkid", "wipefs"])
@pytest.mark.parametrize("body", ["exit 4", "exec sleep 1000", "echo nonsense"])
def test_a_probe_that_fails_is_no_blank_disk(
    run: Run, disk: Loop, place: Place, tmp_path: Path, probe: str, body: str
) -> None:
    do("mkfs.ext4", "-q", disk.node)
    before = disk.sha256()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / probe).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "bin" / probe).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    refused = run(MODULE, env=env, **place.options(disk))
    assert refused["failed"] and probe in refused["msg"], refused
    assert disk.sha256() == before and disk.places() == []


def test_a_disk_in_use_is_refused(predicted: Run, disk: Loop, place: Place, tmp_path: Path) -> None:
    do("mkswap", disk.node)
    do("swapon", disk.node)
    try:
        assert "as swap" in predicted(MODULE, **place.options(disk, wipe="swap"))["msg"]
    finally:
        do("swapoff", disk.node)
    handle = os.open(disk.node, os.O_RDONLY | os.O_EXCL)
    assert "O_EXCL" in predicted(MODULE, **place.options(disk, wipe="swap"))["msg"]
    os.close(handle)
    do("mkfs.ext4", "-q", "-F", disk.node)
    (tmp_path / "elsewhere").mkdir()
    do("mount", disk.node, tmp_path / "elsewhere")
    assert "mounted at" in predicted(MODULE, **place.options(disk, wipe=uuid_of(disk)))["msg"]


def test_a_disk_of_the_system_is_never_touched(predicted: Run, disk: Loop, place: Place) -> None:
    do("mkfs.ext4", "-q", disk.node)
    do("mount", disk.node, "/boot")  # in the mount namespace of these tests
    try:
        for wipe in (uuid_of(disk), "ext4", None):
            assert "holds /boot" in predicted(MODULE, **place.options(disk, wipe=wipe))["msg"]
    finally:
        do("umount", "/boot")


def test_which_disk(predicted: Run, disk: Loop, place: Place, tmp_path: Path) -> None:
    options = place.options(disk)
    assert "not the" in predicted(MODULE, **{**options, "expected_size": "1G"})["msg"]
    assert "expected_size" in predicted(MODULE, **{**options, "expected_size": None})["msg"]
    assert "is the volume attached" in predicted(MODULE, **{**options, "device": "/dev/no-such-disk"})["msg"]
    assert "not a block device" in predicted(MODULE, **{**options, "device": str(disk.image)})["msg"]
    assert "no disk has it" in predicted(MODULE, **{**options, "device": None, "volume_id": VOLUME})["msg"]
    assert "no disk has it" in predicted(MODULE, **{**options, "device": "LABEL=no-such"})["msg"]
    by_id = Path("/dev/disk/by-id")
    by_id.mkdir()
    link = by_id / f"virtio-{VOLUME[:20]}"
    link.symlink_to(disk.node)
    try:
        with loop(tmp_path / "other.img", SIZE) as other:
            mixed = {**options, "device": other.node, "volume_id": VOLUME}
            assert "not the same disk" in predicted(MODULE, **mixed)["msg"]
        assert "no disk has it" in predicted(MODULE, **{**options, "device": None, "serial": VOLUME})["msg"]
        same = {**options, "device": str(link), "volume_id": VOLUME, "serial": VOLUME[:20], "expected_size": None}
        assert predicted(MODULE, **same)["device"] == disk.node
    finally:
        link.unlink()
        by_id.rmdir()


@pytest.mark.parametrize(
    "name", [f"virtio-{VOLUME[:20]}", f"scsi-0QEMU_QEMU_HARDDISK_{VOLUME}", f"nvme-QEMU_NVMe_Ctrl_{VOLUME[:20]}"]
)
def test_a_volume_by_its_name_in_dev(predicted: Run, disk: Loop, place: Place, name: str) -> None:
    with instead_of(Path("/dev/disk")) as names:
        (names / "by-id").mkdir()
        (names / "by-id" / name).symlink_to(disk.node)
        (names / "by-id" / f"{name}-part1").symlink_to("/dev/null")
        options = {**place.options(disk), "device": None, "volume_id": VOLUME}
        assert predicted(MODULE, **options)["device"] == disk.node
        other = VOLUME.replace("6", "7")
        assert "no disk has it" in predicted(MODULE, **{**options, "volume_id": other})["msg"]


@pytest.mark.parametrize(
    ("file", "serial"),
    [
        ("serial", VOLUME[:20].encode()),  # virtio
        ("device/serial", f"{VOLUME[:20]}\n".encode()),  # NVMe
        ("device/vpd_pg80", b"\0\x80\0\x24" + VOLUME.encode()),  # SCSI
        ("device/wwid", f"t10.QEMU    QEMU HARDDISK   {VOLUME}\n".encode()),
    ],
)
def test_a_volume_by_its_serial(run: Run, disk: Loop, place: Place, file: str, serial: bytes) -> None:
    """In check mode, as nothing can be mounted without the true names there."""
    with instead_of(Path("/sys/block")) as disks:
        seen = disks / Path(disk.node).name / file
        seen.parent.mkdir(parents=True)
        seen.write_bytes(serial)
        options = {**place.options(disk), "device": None, "volume_id": VOLUME}
        assert run(MODULE, check=True, **options)["device"] == disk.node
        twin = disks / "sdx" / file
        twin.parent.mkdir(parents=True)
        twin.write_bytes(serial)
        assert "name one of them in another way" in run(MODULE, check=True, **options)["msg"]


def test_a_disk_that_others_are_made_of_is_refused(predicted: Run, disk: Loop, place: Place) -> None:
    with instead_of(Path("/sys/block", Path(disk.node).name, "holders")) as holders:
        (holders / "dm-7").mkdir()
        assert "is held by dm-7" in predicted(MODULE, **place.options(disk))["msg"]


def test_files_are_not_hidden_and_paths_are_plain(predicted: Run, disk: Loop, place: Place, tmp_path: Path) -> None:
    place.path.mkdir()
    (place.path / "file").write_text("x")
    assert "would hide" in predicted(MODULE, **place.options(disk))["msg"]
    (tmp_path / "link").symlink_to(place.path)
    assert "symbolic link" in predicted(MODULE, **{**place.options(disk), "path": tmp_path / "link"})["msg"]
    assert "system's own" in predicted(MODULE, **{**place.options(disk), "path": "/var"})["msg"]
    assert "octal" in predicted(MODULE, **place.options(disk, mode="750"))["msg"]
    assert "does not exist" in predicted(MODULE, **place.options(disk, owner="no-such-user"))["msg"]
    assert "no owner has" in predicted(MODULE, **place.options(disk, owner="99999999999"))["msg"]
    assert "no group has" in predicted(MODULE, **place.options(disk, group=str(2**32 - 1)))["msg"]
    assert "does not exist" in predicted(MODULE, **place.options(disk, owner="²"))["msg"]
    assert "must be a path below" in predicted(MODULE, **place.options(disk, directories=[{"path": "../x"}]))["msg"]
    assert disk.get(0, SIZE).count(0) == SIZE


def test_fstab_is_as_before_when_the_mount_fails(run: Run, disk: Loop, place: Place) -> None:
    do("mkfs.ext4", "-q", disk.node)
    before = "# mine\n/dev/sr0 /cd iso9660 noauto 0 0"
    place.fstab.write_text(before)
    refused = run(MODULE, **place.options(disk, mount_options=["no-such-option"]))
    assert refused["failed"] and "as it was before" in refused["msg"]
    assert place.fstab.read_text() == before and disk.places() == []


def test_one_entry_in_fstab(predicted: Run, disk: Loop, place: Place) -> None:
    do("mkfs.ext4", "-q", disk.node)
    uuid = uuid_of(disk)
    place.fstab.write_text(
        f"# a\nUUID={uuid} /old ext4 defaults\nLABEL=x {place.path} xfs defaults 0 0\n# UUID={uuid} z\n"
    )
    place.fstab.chmod(0o640)
    predicted(MODULE, **place.options(disk))
    lines = place.fstab.read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith(f"UUID={uuid} {place.path} ext4 nofail,") and lines[0] == "# a"
    assert place.fstab.stat().st_mode & 0o777 == 0o640


def test_a_slash_at_the_end_is_the_same_mount_point(predicted: Run, disk: Loop, place: Place) -> None:
    place.fstab.write_text(f"# mine\nLABEL=x {place.path}/ xfs defaults 0 0\n")
    predicted(MODULE, **place.options(disk))
    assert [line.split()[1] for line in place.fstab.read_text().splitlines()] == ["mine", str(place.path)]
    place.fstab.write_text(place.fstab.read_text().replace(f" {place.path} ", f" {place.path}// "))
    predicted(MODULE, state="absent", path=place.path, fstab=place.fstab)
    assert place.fstab.read_text() == "# mine\n"


@pytest.mark.parametrize("body", ["", 'exec /usr/bin/mount "$@"'])
def test_killed_as_it_mounts_again(run: Run, disk: Loop, place: Place, body: str) -> None:
    run(MODULE, **place.options(disk))
    options = place.options(disk, mount_options=["noatime", "nodev"])
    killed_in("mount", place, f"kill -9 $PPID; {body}", options)
    assert run(MODULE, **options)["changed"] and run(MODULE, **options)["changed"] is False
    assert {"noatime", "nodev"} < set(do("findmnt", "-no", "OPTIONS", place.path).strip().split(","))
    assert " noatime,nodev," in place.fstab.read_text()


def test_systemd_reads_fstab_though_a_run_was_killed_before(run: Run, disk: Loop, place: Place) -> None:
    systemd, seen = Path("/run/systemd"), place.path.parent / "seen"
    reads = (
        f"rm -r {systemd}/generator; mkdir {systemd}/generator; findmnt -n {place.path} >> {seen}; echo read >> {seen}"
    )
    with instead_of(Path("/etc")), instead_of(Path("/run")):
        (systemd / "system").mkdir(parents=True)
        (systemd / "generator").mkdir()
        place.fstab = Path("/etc/fstab")
        fake = killed_in("systemctl", place, "kill -9 $PPID", place.options(disk))
        assert str(place.path) in place.fstab.read_text() and disk.places() == []
        fake.write_text(f"#!/bin/sh\n{reads}\n")
        env = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
        for _again in range(2):
            run(MODULE, env=env, **place.options(disk))
            assert seen.read_text() == "read\n"  # once, before it was mounted
        run(MODULE, env=env, state="absent", path=place.path, fstab=place.fstab)
        assert seen.read_text() == "read\nread\n"


CUT_SHORT: dict[str, tuple[str, str]] = {
    "before the superblock": ("dd if=/dev/urandom of={node} bs=1M seek=40 count=2 conv=notrunc", "format {node} "),
    "when it was whole": ('/usr/sbin/{mkfs} "$@"', "finish the formatting"),
    "with half written": ('/usr/sbin/{mkfs} "$@"; {damage}', "format {node} "),
}
DAMAGE = {
    "ext4": "dd if=/dev/urandom of={node} bs=4k seek=1 count=64 conv=notrunc",
    "xfs": "printf '\\001' | dd of={node} bs=1 seek=126 conv=notrunc;"
    " dd if=/dev/urandom of={node} bs=4k seek=1 count=64",
}


def killed_in(program: str, place: Place, body: str, options: dict[str, Any]) -> Path:
    """Run the module with this in the place of a program that it runs, which kills it. Gives the file of this."""
    fake = place.path.parent / "bin" / program
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    arguments = write_arguments(fake.parent / "arguments.json", options)
    env = environment(PATH=f"{fake.parent}:{os.environ['PATH']}")
    killed = subprocess.run(command(MODULE, arguments), env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    return fake


def killed_as_it_formats(disk: Loop, place: Place, body: str, fstype: str = "ext4", **more: Any) -> None:
    """With this in the place of mkfs; when it is done, the module is killed."""
    options = place.options(disk, fstype=fstype, **more)
    killed_in(f"mkfs.{fstype}", place, f"{body}\nsync {disk.node}\nkill -9 $PPID", options)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
@pytest.mark.parametrize("when", CUT_SHORT)
def test_a_formatting_cut_short(
    predicted: Run, disk: Loop, place: Place, tmp_path: Path, when: str, fstype: str
) -> None:
    body, step = CUT_SHORT[when]
    names = {"node": disk.node, "mkfs": f"mkfs.{fstype}", "damage": DAMAGE[fstype].format(node=disk.node)}
    killed_as_it_formats(disk, place, body.format(**names), fstype)
    options = place.options(disk, fstype=fstype)
    other = {"ext4": "xfs", "xfs": "ext4"}[fstype]
    done = predicted(MODULE, **options)
    assert done.get("failed") is None and done["plan"][0].startswith(step.format(**names)), done
    assert disk.get(SIZE - MIB, 4096) == bytes(4096) and f"has {fstype}" not in done.get("msg", "")
    assert "not " + other in predicted(MODULE, **{**options, "fstype": other})["msg"]


def test_a_damaged_file_system_that_was_in_use_is_not_formatted_again(
    run: Run, disk: Loop, place: Place, tmp_path: Path
) -> None:
    """Even if the marker of its formatting is there still, since the run was killed and somebody mounted it by hand."""
    killed_as_it_formats(disk, place, '/usr/sbin/mkfs.ext4 "$@"')
    (tmp_path / "by-hand").mkdir()
    do("mount", disk.node, tmp_path / "by-hand")
    do("umount", tmp_path / "by-hand")
    disk.put(4096, os.urandom(64 * 4096))
    before = disk.sha256()
    assert "is damaged now; repair it" in run(MODULE, **place.options(disk))["msg"]
    assert disk.sha256() == before


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_what_was_made_by_hand_after_a_killed_run_is_not_formatted(
    run: Run, disk: Loop, place: Place, tmp_path: Path, fstype: str
) -> None:
    """The marker is there still, and the file system that came after it has lost its first superblock."""
    killed_as_it_formats(disk, place, "true")
    keep = {"ext4": ["-E", "nodiscard"], "xfs": ["-K"]}[fstype]  # as on a disk that cannot discard
    do(f"mkfs.{fstype}", "-q", *keep, disk.node)
    assert disk.get(SIZE - MIB, 4096).startswith(b"lab.audio.gpu_volume formats")
    disk.put(0, bytes(MIB))
    before = disk.sha256()
    assert "is not of the formatting that was killed" in run(MODULE, **place.options(disk))["msg"]
    assert disk.sha256() == before
    assert run(MODULE, **place.options(disk, wipe="unsigned-data"))["changed"]


def test_data_without_a_file_system_after_a_killed_run_are_kept(predicted: Run, disk: Loop, place: Place) -> None:
    killed_as_it_formats(disk, place, "true")
    disk.put(0, b"models/gemma/config.json")  # as tar does
    before = disk.sha256()
    assert "byte 0 is not of the formatting" in predicted(MODULE, **place.options(disk))["msg"]
    assert disk.sha256() == before


@pytest.mark.parametrize(("fstype", "other"), [("ext4", "xfs"), ("xfs", "ext4"), ("ext4", "btrfs"), ("xfs", "LVM")])
@pytest.mark.parametrize("program", ["wipefs", "mkfs"])
def test_killed_as_it_wiped_what_it_may(
    predicted: Run, disk: Loop, place: Place, fstype: str, other: str, program: str
) -> None:
    """Copies of a superblock, and what else was at the beginning, are not taken for what came after the run."""
    REFUSED[other][0](disk) if other in REFUSED else do(f"mkfs.{other}", "-q", disk.node)
    options = place.options(disk, fstype=fstype, wipe={"LVM": "LVM2_member"}.get(other, other))
    if program == "wipefs":
        body = 'case "$*" in *--all*) kill -9 $PPID; exit; esac; exec /usr/sbin/wipefs "$@"'
        killed_in("wipefs", place, body, options)
    else:
        killed_in(f"mkfs.{fstype}", place, "kill -9 $PPID", options)
    assert f"format {disk.node} as {fstype}" in predicted(MODULE, **options)["plan"]


def test_a_disk_that_is_gone(run: Run, place: Place, tmp_path: Path) -> None:
    with loop(tmp_path / "gone.img", SIZE) as disk:
        options = place.options(disk)
    assert run(MODULE, check=True, **options)["failed"]


@pytest.mark.timeout(300 + 15 * KILLS)
@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_killed_at_any_moment_the_next_run_ends_well(run: Run, place: Place, tmp_path: Path, fstype: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    dice = random.Random(seed)
    for number in range(KILLS // 2):
        with loop(tmp_path / f"{number}.img", SIZE) as disk:
            wanted = place.options(disk, fstype=fstype)
            arguments = write_arguments(tmp_path / "arguments.json", wanted)
            child = subprocess.Popen(
                command(MODULE, arguments), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
            )
            time.sleep(dice.uniform(0.2, 1.0))
            child.send_signal(signal.SIGKILL)
            child.wait()
            done = run(MODULE, **wanted)
            assert done.get("failed") is None, done
            (place.path / "kept").write_text("data")
            assert run(MODULE, **wanted)["changed"] is False
            assert [p.name for p in tmp_path.glob(".*")] == []
            run(MODULE, state="absent", path=place.path, fstab=place.fstab)
            assert run(MODULE, **wanted)["uuid"] == done["uuid"] and (place.path / "kept").exists()
            run(MODULE, state="absent", path=place.path, fstab=place.fstab)


def test_through_ansible_itself(disk: Loop, place: Place) -> None:
    options = json.dumps(place.options(disk), default=str)
    ansible = [sys.executable, "-m", "ansible", "adhoc", "localhost", "-c", "local", "-m", "lab.audio.gpu_volume"]
    env = environment(ANSIBLE_COLLECTIONS_PATH=str(CHECKOUT / "collections"), ANSIBLE_PYTHON_INTERPRETER=PYTHON)
    for more, changed in ((["--check", "--diff"], "true"), (["--diff"], "true"), ([], "false")):
        done = subprocess.run([*ansible, "-a", options, *more], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and f'"changed": {changed}' in done.stdout, done.stdout + done.stderr
