#!/usr/bin/python
# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_volume
short_description: Format, mount, grow and lay out the data volume of a GPU worker
version_added: 0.1.0
description:
  - Puts a file system on a blank disk, mounts it, enters it in fstab by UUID, grows it, and makes directories on it.
  - It fails closed. A disk is formatted only if it is proved to be blank. Any doubt, also a probe that fails or does
    not answer, is an error that names the probe and what it saw, and nothing is changed.
  - A file system of O(fstype) that is on the disk is used as it is. It is never formatted again, unless O(wipe) names
    its very UUID.
extends_documentation_fragment:
  - lab.audio._attributes
  - lab.audio._attributes.action_group
attributes:
  check_mode:
    support: full
    details:
      - What is on a file system that is not mounted is not known, so its owner, mode and directories are one step.
  diff_mode:
    support: full
    details:
      - The UUID of a file system that is to be made is shown as V((new)).
  idempotent:
    support: full
  async:
    support: full
  platform:
    support: full
    platforms: linux
options:
  device:
    description:
      - Path of the disk, for example C(/dev/disk/by-id/virtio-65953b61-0af1-42f6-a), or V(LABEL=name), or V(UUID=uuid).
      - A bare path such as V(/dev/vdb) can be another disk after a restart, so it needs O(expected_size).
      - With O(state=present), one of O(device), O(volume_id) and O(serial) is needed. If more are given, they must
        agree. A disk is never chosen without.
    type: str
  volume_id:
    description:
      - Id of the Cinder volume. virtio and NVMe disks show the first 20 characters of it, which is then compared.
    type: str
  serial:
    description: Serial of the disk, as it shows it.
    type: str
  expected_size:
    description:
      - Size of the disk, for example V(100G), with units of 1024. Half a percent more or less is let pass.
    type: str
  path:
    description: Directory to mount it at. No symbolic link, and empty if nothing is mounted there.
    type: path
    default: /data
  fstype:
    description: File system to make, or that has to be there.
    type: str
    choices: [ext4, xfs]
    default: ext4
  label:
    description: Label of a file system that is made. The label of one that is there is let be.
    type: str
  mount_options:
    description:
      - Options of the mount. C(nofail) and C(x-systemd.device-timeout=30s) are added, so that the host starts without
        the disk.
    type: list
    elements: str
    default: []
  directories:
    description: Directories to make on the volume. One above that is not there gets the same owner, group and mode.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Path below O(path), such as V(models).
        type: str
        required: true
      owner:
        description: Name or number of the owner. Let be if not given.
        type: str
      group:
        description: Name or number of the group. Let be if not given.
        type: str
      mode:
        description: Mode as an octal number in quotes.
        type: str
        default: "0750"
  owner:
    description: Name or number of the owner of O(path). What is in it is let be.
    type: str
  group:
    description: Name or number of the group of O(path).
    type: str
  mode:
    description: Mode of O(path) as an octal number in quotes.
    type: str
    default: "0750"
  wipe:
    description:
      - What to destroy, if the disk is neither blank nor has a file system of O(fstype). The UUID or the type of the
        signature that is there, such as V(LVM2_member), or V(unsigned-data) if there are data without a signature.
        Anything else is refused.
      - A file system of O(fstype) is used as it is, whatever this says, unless it is its UUID. A UUID may stay in the
        task, as nothing else has it.
      - What is no UUID is refused if O(fstab) has a line for O(path), as the disk may be the volume of an earlier run,
        damaged. Take it out of the task afterwards nevertheless. A host that is installed anew has no such line.
      - A disk that is in use, has partitions or several kinds of signatures is refused.
    type: str
  grow:
    description: Grow the file system while mounted if the disk has at least 16 MiB more.
    type: bool
    default: true
  state:
    description:
      - V(present) - the volume is mounted.
      - V(absent) - nothing is mounted at O(path), nor is it in fstab. The data are let be.
    type: str
    choices: [present, absent]
    default: present
  fstab:
    description: File to enter the mount in.
    type: path
    default: /etc/fstab
notes:
  - Blank means that C(blkid -p) and C(wipefs --no-act) find nothing; that there are no partitions, holders, mounts or
    swap, and an C(O_EXCL) open works; and that the first 8 MiB, the last MiB and the places of backup superblocks
    of ext4, xfs and btrfs, and samples all over the disk, read as zeros. So a new Cinder volume is blank.
  - Before a disk is formatted, a marker is written into its last MiB, which the new file system leaves free until it
    grows. The marker holds the UUID that the file system gets, and is erased when it is whole. A run that finds the
    marker of one that was killed finishes or repeats the formatting. It never repeats it once there is a file system
    that was mounted, or that has another UUID, or a copy of a superblock that has, or anything in the first 1024 bytes.
  - A run waits at most 120 seconds for another on the same host.
requirements:
  - util-linux
  - e2fsprogs for ext4, xfsprogs for xfs
seealso:
  - module: ansible.posix.mount
author:
  - The lab.audio maintainers (@lab-audio)
"""

EXAMPLES = r"""
- name: The data volume of a GPU worker, from a Cinder volume
  lab.audio.gpu_volume:
    volume_id: 65953b61-0af1-42f6-a8d1-5b1b2a4f3c11
    expected_size: 100G
    owner: lab-audio
    group: lab-audio
    directories:
      - {path: models, owner: lab-audio, group: lab-audio}
      - {path: scratch, owner: lab-audio, group: lab-audio}

- name: A disk that is known by its name only
  lab.audio.gpu_volume:
    device: /dev/vdb
    expected_size: 100G
    fstype: xfs
    mount_options: [noatime]

- name: Format a disk that was part of LVM, and destroy what is on it
  lab.audio.gpu_volume:
    device: /dev/disk/by-id/virtio-65953b61-0af1-42f6-a
    wipe: LVM2_member

- name: Unmount it for good and keep its data
  lab.audio.gpu_volume:
    state: absent
    path: /data
"""

RETURN = r"""
device:
  description: The disk.
  returned: with O(state=present)
  type: str
  sample: /dev/vdb
size:
  description: Bytes of the disk.
  returned: with O(state=present)
  type: int
  sample: 107374182400
uuid:
  description: UUID of the file system. V((new)) in check mode if it would be made.
  returned: with O(state=present)
  type: str
  sample: 0e4b6a3f-8c0d-4f7e-9a51-2f1d3c5b7a90
fstype:
  description: Type of the file system.
  returned: with O(state=present)
  type: str
  sample: ext4
mount_point:
  description: Where it is mounted, or was.
  returned: always
  type: str
  sample: /data
plan:
  description: What was done; in check mode, or after a failure, what was to be done.
  returned: always
  type: list
  elements: str
  sample: ["format /dev/vdb as ext4", "mount /dev/vdb at /data"]
"""

import os
import re
import stat
import typing as t
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible_collections.lab.audio.plugins.module_utils import _fstab
from ansible_collections.lab.audio.plugins.module_utils._block import (
    HEAD_FREE,
    MIB,
    SAMPLE,
    SYSTEM_MOUNTS,
    Disk,
    execute,
    find_disk,
    first_byte,
    mounts,
    not_of_mkfs,
    places,
    read_signatures,
    refuse_in_use,
    refuse_partitions,
    superblock,
)
from ansible_collections.lab.audio.plugins.module_utils._changes import Changes
from ansible_collections.lab.audio.plugins.module_utils._host import Refused, bits_of, number_of

LABEL_LENGTH = {"ext4": 16, "xfs": 12}
NEW = "(new)"
UNSIGNED = "unsigned-data"
WORTH_GROWING = 16 * MIB
MARKER = 4096
LONG = 3600
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
Params = dict[str, t.Any]


class Content(t.NamedTuple):
    """What is on the disk. `uuid`: of the file system to use, or empty if it is to be made.

    `destroys`: what is wiped before. `marked`: UUID of a formatting that was killed.
    """

    uuid: str
    destroys: str = ""
    marked: str = ""


def marker(disk: Disk, identity: str) -> bytes:
    return f"lab.audio.gpu_volume formats {disk.size} bytes as {identity}\n".encode().ljust(MARKER, b"\0")


def marker_place(disk: Disk) -> int:
    return (disk.size - MIB) // MARKER * MARKER


def read_marker(disk: Disk) -> str:
    with open(disk.node, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), MARKER, marker_place(disk))
    found = re.match(rb"lab\.audio\.gpu_volume formats \d+ bytes as ([0-9a-f-]{36})\n", data)
    identity = found[1].decode() if found else ""
    return identity if found and data == marker(disk, identity) else ""


def write(disk: Disk, data: bytes, *starts: int) -> None:
    """Written only where nobody else has the disk, and on it when this returns."""
    file = os.open(disk.node, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        for start in starts:
            if os.pwrite(file, data, start) != len(data):
                raise Refused(f"{disk.node}: a short write")
        os.fsync(file)
    finally:
        os.close(file)


def inspect(disk: Disk, fstype: str, wipe: str | None, mounted: bool, entered: str) -> Content:
    """What to do with the disk. Raises Refused unless it has the file system, is blank, or `wipe` names what it has.

    `entered`: the words for fstab having the path already; empty if it has not.
    """
    found = read_signatures(disk)
    if mounted:
        if found.kinds == {fstype} and found.uuid:
            return Content(found.uuid)
        raise Refused(f"{disk.node} is mounted and has {listed(found.kinds)}, not {fstype}; correct fstype")
    marked = read_marker(disk)
    if found.kinds == {fstype} and found.uuid and marked != found.uuid and wipe != found.uuid:
        return Content(found.uuid)
    refuse_partitions(disk)
    if not disk.whole and not found.kinds:
        raise Refused(f"{disk.node} is a partition; only whole disks are formatted")
    if marked and found.kinds == {fstype} and found.uuid == marked:
        return inspect_marked(disk, fstype, marked)
    if not found.kinds:
        place = not_of_mkfs(disk, marked) if marked else first_byte(disk)
        if place is None:
            return Content("", marked=marked)
        if wipe == UNSIGNED:
            return destroy_unnamed(disk, wipe, entered)
        seen = "not of the formatting that was killed" if marked else "not zero"
        raise Refused(
            f"{disk.node} has no signature, but byte {place} is {seen}: perhaps a damaged file system. If its data"
            f" may be destroyed, say wipe: {UNSIGNED}"
        )
    if len(found.kinds) > 1:
        raise Refused(f"{disk.node} has {listed(found.kinds)}; clear it by hand if its data may be destroyed")
    if not disk.whole:
        raise Refused(f"{disk.node} is a partition with {listed(found.kinds)}; only whole disks are formatted")
    if wipe and wipe in found.uuids:
        return Content("", destroys=wipe)
    if wipe and wipe in found.kinds - {fstype}:
        return destroy_unnamed(disk, wipe, entered)
    said = f", and wipe says {wipe}" if wipe else ""
    other = found.kinds & set(LABEL_LENGTH) - {fstype}
    use = f" To use it as it is, say fstype: {min(other)}." if other else ""
    raise Refused(
        f"{disk.node} has {listed(found.kinds)}{said}.{use} If its data may be destroyed, say wipe with one of:"
        f" {', '.join(sorted(found.uuids | found.kinds - {fstype})) or 'none, as it has no UUID'}"
    )


def destroy_unnamed(disk: Disk, wipe: str, entered: str) -> Content:
    """What `wipe` says without a UUID fits many a disk, also the volume that an earlier run made."""
    if entered:
        raise Refused(
            f"{entered}, so {disk.node} may be that volume with its file system damaged, and wipe: {wipe} does not name"
            " it by a UUID. Repair it; or take that line out of fstab, if the data of the disk may be destroyed"
        )
    return Content("", destroys=wipe)


def inspect_marked(disk: Disk, fstype: str, marked: str) -> Content:
    """A formatting was killed when its file system was there. It is used if it is whole, and made again if unused."""
    if superblock(disk, fstype)["size"] > marker_place(disk):
        return Content(marked)  # It was grown over the marker, so these bytes are its own.
    try:
        if fstype == "ext4":
            execute("e2fsck", "-fn", disk.node, seconds=LONG)
        else:
            execute("xfs_repair", "-n", disk.node, seconds=LONG)
    except Refused as error:
        if superblock(disk, fstype)["unused"]:
            return Content("", marked=marked)
        raise Refused(f"{disk.node} was formatted, mounted and is damaged now; repair it: {error}") from error
    return Content(marked, marked=marked)


def listed(kinds: t.Iterable[str]) -> str:
    return " and ".join(sorted(kinds)) or "no signature"


def make_file_system(disk: Disk, params: Params, content: Content, lock: int) -> str:
    """Format a disk that may be. Killed at any moment, the next run knows by the marker that it was ours."""
    identity = content.marked or str(uuid.uuid4())
    if content.destroys:
        # Copies of a superblock, while the signature that `wipe` names is there: without it they are a stranger's.
        write(disk, bytes(SAMPLE), *(start for start, length in places(disk.size) if length == SAMPLE))
    if not content.marked:
        write(disk, marker(disk, identity), marker_place(disk))
    write(disk, bytes(HEAD_FREE), 0)
    execute("wipefs", "--all", disk.node, seconds=LONG, keep=[lock])
    label = ["-L", params["label"]] if params["label"] else []
    blocks = marker_place(disk) // 4096
    if params["fstype"] == "ext4":
        command = ["mkfs.ext4", "-q", "-b", "4096", "-E", "nodiscard", "-U", identity, *label, disk.node, str(blocks)]
    else:
        size = f"size={blocks * 4096}"
        command = ["mkfs.xfs", "-q", "-K", "-m", f"uuid={identity}", "-d", size, *label, disk.node]
    execute(*command, seconds=LONG, keep=[lock])
    write(disk, bytes(MARKER), marker_place(disk))
    return identity


def check_path(path: str, device: str, mounted: bool) -> None:
    if path in SYSTEM_MOUNTS or not os.path.isabs(path):
        raise Refused(f"path {path} is the system's own, or not absolute; name another")
    if os.path.realpath(path) != path:
        raise Refused(f"path {path} goes through a symbolic link; name {os.path.realpath(path)} if it is meant")
    if mounted:
        return
    if any(place == path for _number, place in mounts()):
        raise Refused(f"another disk than {device} is mounted at {path}; unmount it or name another path")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise Refused(f"path {path} is no directory")
    if os.path.isdir(path) and os.listdir(path):
        raise Refused(f"{path} has files in it that the mount would hide; move them away or name another path")


def file_system_size(disk: Disk, fstype: str, path: str, mounted: bool) -> int:
    if fstype == "xfs" and mounted:
        # The kernel's own copy of the superblock can be newer than the disk's.
        _code, out = execute("xfs_info", path)
        seen = re.search(r"data\s+=\s*bsize=(\d+)\s+blocks=(\d+)", out)
        if not seen:
            raise Refused(f"xfs_info {path}: its output is not understood: {out.strip()}")
        return int(seen[1]) * int(seen[2])
    return superblock(disk, fstype)["size"]


def wanted_directories(params: Params) -> list[tuple[str, int, int, int]]:
    """Path, owner, group and mode of the top and of each directory, parents first."""
    wanted = []
    for each in [{**params, "path": ""}, *params["directories"]]:
        mode = bits_of(each["mode"], f" of {each['path'] or params['path']}")
        if os.path.isabs(each["path"]) or ".." in each["path"].split("/"):
            raise Refused(f"directory {each['path']} must be a path below {params['path']}")
        owner, group = number_of("owner", each["owner"]), number_of("group", each["group"])
        wanted.append((os.path.normpath(os.path.join(params["path"], each["path"])), owner, group, mode))
    return sorted(wanted)


def lay_out(wanted: list[tuple[str, int, int, int]], changes: Changes | None, check: bool) -> None:
    """Make directories and set owner and mode. Without `changes` they are not told one by one."""
    top = wanted[0][0]
    for path, owner, group, mode in wanted:
        seen = directory(top, path)
        before = (
            {"owner": seen.st_uid, "group": seen.st_gid, "mode": f"{stat.S_IMODE(seen.st_mode):04o}"} if seen else {}
        )
        asked = {"owner": owner, "group": group, "mode": f"{mode:04o}"}
        after = {name: before.get(name) if value == -1 else value for name, value in asked.items()}
        if after == before:
            continue
        if changes:
            changes.note(f"{'set owner and mode of' if seen else 'make'} {path}", path, before or None, after)
        if not check:
            directory(top, path, (owner, group, mode))


def directory(top: str, path: str, access: tuple[int, int, int] | None = None) -> os.stat_result | None:
    """What one at or below `top` is like; None if it is not there. `access`: its owner, group and mode from now on.

    With `access` it is made, and those above it with the same. Each is opened in the one above and no link is followed,
    as whoever owns one may put a link there at any moment.
    """

    def give(file: int, owner: int, group: int, mode: int) -> None:
        os.fchown(file, owner, group)
        os.fchmod(file, mode)

    with ExitStack() as opened:
        file, here = os.open(top, DIRECTORY), top
        opened.callback(os.close, file)
        for name in Path(path).relative_to(top).parts:
            here, made = os.path.join(here, name), False
            if access:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=file)
                    made = True
            try:
                file = os.open(name, DIRECTORY, dir_fd=file)
            except FileNotFoundError:
                return None
            except NotADirectoryError as error:
                raise Refused(f"{here} is no directory, or a symbolic link; remove it") from error
            opened.callback(os.close, file)
            if access and made:
                give(file, *access)
        if access:
            give(file, *access)
        return os.fstat(file)


def reload_systemd(fstab: str) -> None:
    """Have systemd read fstab, if it has not since its last change: by this run, or one that was killed."""
    if fstab != "/etc/fstab" or not os.path.isdir("/run/systemd/system"):
        return
    with suppress(FileNotFoundError):
        # systemd makes this directory anew each time it reads fstab.
        if os.stat(fstab).st_ctime < os.stat("/run/systemd/generator").st_mtime:
            return
    execute("systemctl", "daemon-reload", seconds=60)


def present(params: Params, changes: Changes, check: bool, lock: int) -> dict[str, t.Any]:
    """Check everything, then change what is not as wanted, step by step."""
    path, fstype, fstab = params["path"], params["fstype"], params["fstab"]
    disk = find_disk(params["device"], params["volume_id"], params["serial"], params["expected_size"])
    wanted = wanted_directories(params)
    mounted = refuse_in_use(disk, path)
    check_path(path, disk.node, mounted)
    before = _fstab.read(fstab)
    entered = _fstab.edit(before, lambda _source, place: place == path, None) != before
    content = inspect(disk, fstype, params["wipe"], mounted, f"{fstab} has a line for {path}" if entered else "")
    identity = content.uuid or NEW
    size = file_system_size(disk, fstype, path, mounted) if content.uuid else disk.size
    grows = params["grow"] and disk.size - size >= WORTH_GROWING
    if content.uuid and os.path.exists(f"/dev/disk/by-uuid/{identity}"):
        other = os.path.realpath(f"/dev/disk/by-uuid/{identity}")
        if other != disk.node:
            raise Refused(f"{other} has the UUID {identity} too, so fstab would be ambiguous; change one of them")

    if content.destroys:
        changes.note(f"destroy {content.destroys} on {disk.node}", "content", content.destroys, None)
    if not content.uuid:
        changes.note(f"format {disk.node} as {fstype}", "file system", content.destroys or None, fstype)
        if not check:
            identity = make_file_system(disk, params, content, lock)
    elif content.marked:
        changes.note(f"finish the formatting of {disk.node}", "formatting", "unfinished", "finished")
        if not check:
            write(disk, bytes(MARKER), marker_place(disk))

    if not os.path.isdir(path):
        changes.note(f"make {path}", f"{path} below the mount", None, "directory")
        if not check:
            os.makedirs(path, 0o755)

    options = ",".join(params["mount_options"] + ["nofail"])
    if "x-systemd.device-timeout" not in options:
        options += ",x-systemd.device-timeout=30s"
    line = f"UUID={identity} {_fstab.escape(path)} {fstype} {options} 0 2"
    after = _fstab.edit(before, lambda source, place: place == path or source.lower() == f"uuid={identity}", line)
    if after != before:
        shown = after if content.uuid else after.replace(f"UUID={identity} ", f"UUID={NEW} ")
        changes.note(f"enter {path} in {fstab}", fstab, before, shown)
        if not check:
            if mounted:
                # Before fstab says so, as a killed run is made up for by its line. With the disk, fstab is not asked.
                execute("mount", "-o", f"remount,{options}", disk.node, path, seconds=300, keep=[lock])
            _fstab.write(fstab, after)
    if not check:
        reload_systemd(fstab)
    if not mounted:
        changes.note(f"mount {disk.node} at {path}", "mounted", None, path)
        if not check:
            try:
                execute("mount", "-t", fstype, "-o", options, disk.node, path, seconds=300, keep=[lock])
                if (disk.number, path) not in mounts():
                    raise Refused(f"mount said that {disk.node} is mounted at {path}, but the kernel does not show it")
            except Refused as error:
                if after != before:
                    _fstab.write(fstab, before)
                    reload_systemd(fstab)
                raise Refused(f"{error}; {fstab} is as it was before") from error

    if grows:
        changes.note(f"grow {fstype} on {disk.node} to the size of the disk", "grown", size, disk.size)
        if not check:
            execute(
                *(["resize2fs", disk.node] if fstype == "ext4" else ["xfs_growfs", path]), seconds=LONG, keep=[lock]
            )
    if not mounted:
        told = ", ".join(each[0] for each in wanted)
        changes.note(f"set owner and mode of {told}", "directories", None, told)
    if mounted or not check:
        lay_out(wanted, changes if mounted else None, check)
    return {"device": disk.node, "size": disk.size, "uuid": identity, "fstype": fstype, "mount_point": path}


def absent(params: Params, changes: Changes, check: bool, lock: int) -> dict[str, t.Any]:
    path, fstab = params["path"], params["fstab"]
    if path in SYSTEM_MOUNTS or not os.path.isabs(path):
        raise Refused(f"path {path} is the system's own, or not absolute; name another")
    there = [number for number, place in mounts() if place == path]
    if there and (params["device"] or params["volume_id"] or params["serial"]):
        disk = find_disk(params["device"], params["volume_id"], params["serial"], params["expected_size"])
        if there != [disk.number]:
            raise Refused(f"another disk than {disk.node} is mounted at {path}; nothing is unmounted")
    for _number in there:
        changes.note(f"unmount {path}", "mounted", path, None)
        if not check:
            execute("umount", path, seconds=300, keep=[lock])
    before = _fstab.read(fstab)
    after = _fstab.edit(before, lambda source, place: place == path, None)
    if after != before:
        changes.note(f"remove {path} from {fstab}", fstab, before, after)
        if not check:
            _fstab.write(fstab, after)
    if not check:
        reload_systemd(fstab)
    return {"mount_point": path}


def refine(params: Params) -> None:
    """Check the options that need no disk, and put sizes and paths into their last form."""
    params["path"] = os.path.normpath(params["path"])
    params["fstab"] = os.path.realpath(params["fstab"])
    device = params["device"] or ""
    named = device.startswith(("/dev/disk/by-", "LABEL=", "UUID="))
    if params["state"] == "present" and device and not named and not params["expected_size"]:
        raise Refused(f"device {device} can be another disk after a restart: say its expected_size too, as 100G")
    if params["expected_size"]:
        try:
            params["expected_size"] = human_to_bytes(params["expected_size"])
        except ValueError as error:
            raise Refused(f"expected_size {params['expected_size']} is not a size such as 100G") from error
    longest = LABEL_LENGTH[params["fstype"]]
    if params["label"] and len(params["label"].encode()) > longest:
        raise Refused(f"label {params['label']} has more than the {longest} bytes of {params['fstype']}")
    for option in params["mount_options"]:
        if re.search(r"[\s#]", option) or not option:
            raise Refused(f"mount option {option!r} has a blank or a # in it")


def main() -> None:
    directory = {
        "path": {"type": "str", "required": True},
        "owner": {"type": "str"},
        "group": {"type": "str"},
        "mode": {"type": "str", "default": "0750"},
    }
    module = AnsibleModule(
        argument_spec={
            "device": {"type": "str"},
            "volume_id": {"type": "str"},
            "serial": {"type": "str"},
            "expected_size": {"type": "str"},
            "path": {"type": "path", "default": "/data"},
            "fstype": {"type": "str", "choices": ["ext4", "xfs"], "default": "ext4"},
            "label": {"type": "str"},
            "mount_options": {"type": "list", "elements": "str", "default": []},
            "directories": {"type": "list", "elements": "dict", "default": [], "options": directory},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "mode": {"type": "str", "default": "0750"},
            "wipe": {"type": "str"},
            "grow": {"type": "bool", "default": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "fstab": {"type": "path", "default": "/etc/fstab"},
        },
        required_if=[("state", "present", ("device", "volume_id", "serial"), True)],
        supports_check_mode=True,
    )
    params, changes = dict(module.params), Changes()
    try:
        refine(params)
        with _fstab.locked(params["fstab"]) as lock:
            if not module.check_mode:
                _fstab.tidy(params["fstab"])
            act = present if params["state"] == "present" else absent
            result = act(params, changes, module.check_mode, lock)
    except Refused as error:
        module.fail_json(msg=str(error), **changes.result())
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        module.fail_json(msg=f"{error.strerror}{where}; is the module run as root?", **changes.result())
    module.exit_json(**result, **changes.result())


if __name__ == "__main__":
    main()
