#!/usr/bin/python
# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: model_sync
short_description: Bring a model directory to a host, whole and verified or not at all
version_added: 0.1.0
description:
  - Copies a directory of model files from another host (rsync over ssh), from an S3 object store, or from a directory
    of the host. Each revision is a release of its own, and O(dest) is a symbolic link to the present one. It is
    replaced in one step when a release is whole and verified, so whoever opens O(dest) never finds half a model.
  - Releases lie beside the link. O(dest) V(/data/models/gemma) points to C(.releases/gemma/{revision}). Files that a
    release here has already, told by size and SHA-256, are hard-linked and take no room twice.
  - After a copy that was cut short, files that are whole are not copied again, and what a killed run left is removed by
    the next.
extends_documentation_fragment:
  - lab.audio._attributes
  - lab.audio._attributes.action_group
  - lab.audio._s3
attributes:
  check_mode:
    support: full
    details:
      - Lists the source and reads its manifest, and returns the RV(files) and RV(bytes) that would be copied.
  diff_mode:
    support: full
  idempotent:
    support: full
    details:
      - A run that changes nothing reads no file's content. The SHA-256 of files are remembered by inode, size and time
        of the last change.
  async:
    support: full
  platform:
    support: full
    platforms: linux
options:
  state:
    description:
      - V(present) - O(dest) is a link to the release of the source's revision, or of O(revision).
      - V(rolled_back) - O(dest) is a link to the release that was in use before the present one, and stays so if asked
        again. To stay there, set O(revision) to it in later runs with O(state=present). O(owner), O(group) and O(mode)
        are not applied to it.
      - V(absent) - the link and all its releases are gone. Refused as long as a directory is there that was found at
        O(dest), since this module did not make it.
    type: str
    choices: [present, rolled_back, absent]
    default: present
  src:
    description:
      - V(host:/path) or V(user@host:/path) is a directory of another host, which this host reaches by rsync over ssh.
        No ssh_config is read, the host's key must be known, and nobody is asked for a password.
      - V(s3://bucket/prefix) is what lies below that prefix in the object store of O(endpoint_url). O(bucket) is not
        used.
      - V(/path) is a directory of this host.
      - Needed with O(state=present).
    type: str
  dest:
    description:
      - Where the model is to be found. Its directory must exist.
      - A directory that is here already is compared with the source, so that only what differs is copied. Then the link
        takes its place in one step. If it has anything that the release has not, it is kept as release
        C(found-{digits}) until somebody removes it by hand. O(state=rolled_back) goes back to that, unverified, but
        O(revision) cannot name it.
    type: path
    required: true
  revision:
    description:
      - The revision that O(dest) must have. If its release is here and whole, the source is not asked; else the source
        must have it. So a revision that was copied once is never copied again under the same name.
      - If not given, it is the one in the source's manifest, and without a manifest twelve digits made of the paths,
        sizes and times (or ETags) of the source's files.
    type: str
  keep:
    description:
      - How many releases to keep. The present and the previous one always stay.
      - A directory that was found at O(dest) always stays too, and does not count.
    type: int
    default: 2
  verify:
    description:
      - V(full) - the SHA-256 of every file must be the manifest's. Without a manifest at the source, one is made of
        what was copied, and what is here is compared with that later.
      - V(size) - only the sizes must be right. Damage that leaves a file's size as it was is not noticed.
    type: str
    choices: [full, size]
    default: full
  owner:
    description:
      - Owner of the release, by name or number. If not given, it is left as it is, and what is copied belongs to the
        user that runs the module.
    type: str
  group:
    description:
      - Group of the release, by name or number. If not given, it is left as it is, and what is copied belongs to the
        group of the user that runs the module.
    type: str
  mode:
    description: Mode of directories of the release, in octal. Files have the same without the right to execute.
    type: str
    default: "0750"
  ssh_key:
    description: File on this host with the private key for the other. If not given, ssh's own defaults are tried.
    type: path
  known_hosts:
    description:
      - File on this host with the other host's key. If given, no other file is asked.
    type: path
  ssh_port:
    description: Port of the other host's ssh server.
    type: int
    default: 22
requirements:
  - rsync (on this host, and on the other for C(host:/path))
  - OpenSSH's ssh, for C(host:/path)
  - boto3 >= 1.36, for C(s3://bucket/prefix)
notes:
  - A manifest is a file C(manifest.json) in the directory that is published, such as
    C({"revision":"2026-06","files":[{"path":"base/config.json","size":812,"sha256":"..."}]}). Only the files in it are
    copied. Every release here has one, made of what was copied if the source has none, so a host can be the source of
    others.
  - Symbolic links and special files at the source are refused, and so are names that are absolute, have C(..) or
    control characters in them.
  - A file whose SHA-256 is wrong is moved to C(.releases/{name}/quarantine-{revision}), and O(dest) stays as it was. It
    is removed by the next run that ends well or needs its room.
  - A link takes the place of a directory by C(renameat2), which ext4, XFS, Btrfs and tmpfs can do. Where it cannot be
    done, the directory has to be moved away first.
  - A program that opens many files by way of O(dest) can meet a swap in between. It should resolve the link once.
seealso:
  - module: ansible.posix.synchronize
    description: For directories that may be seen half copied, between the controller and a host.
  - module: lab.audio.gpu_volume
author:
  - The lab.audio maintainers (@lab-audio)
"""

EXAMPLES = r"""
- name: Gemma from the model host, whose key is pinned
  lab.audio.model_sync:
    src: models@models.example.edu:/srv/models/gemma
    dest: /data/models/gemma
    ssh_key: /etc/lab-audio/ssh_key
    known_hosts: /etc/lab-audio/known_hosts
    owner: lab-audio
    group: lab-audio

- name: WhisperX from the object store, and only this revision
  lab.audio.model_sync:
    src: s3://models/whisperx
    endpoint_url: https://swift.example.edu:8080
    credentials_directory: /etc/lab-audio/credentials
    dest: /data/models/whisperx
    revision: 2026-06
    group: lab-audio

- name: Back to the release before
  lab.audio.model_sync:
    state: rolled_back
    dest: /data/models/gemma

- name: Remove a model and all its releases
  lab.audio.model_sync:
    state: absent
    dest: /data/models/gemma
"""

RETURN = r"""
revision:
  description: Revision that O(dest) has, or in check mode would have.
  returned: with O(state=present) and O(state=rolled_back)
  type: str
  sample: 2026-06
previous_revision:
  description: Revision that O(state=rolled_back) goes back to; none if there is no other.
  returned: with O(state=present) and O(state=rolled_back)
  type: str
  sample: 2026-05
files:
  description: How many files were copied from the source, or in check mode would be.
  returned: with O(state=present)
  type: int
  sample: 3
bytes:
  description: How many bytes these have.
  returned: with O(state=present)
  type: int
  sample: 18487561216
path:
  description: The release that O(dest) points to.
  returned: with O(state=present) and O(state=rolled_back)
  type: str
  sample: /data/models/.releases/gemma/2026-06
releases:
  description: Releases that are kept, the newest first.
  returned: on success
  type: list
  elements: str
  sample: ["2026-06", "2026-05"]
plan:
  description: What was done; in check mode, or after a failure, what was to be done.
  returned: always
  type: list
  elements: str
  sample:
    - copy 3 files, 18487561216 bytes, from models.example.edu:/srv/models/gemma as revision 2026-06; 9 files are here
    - link /data/models/gemma to .releases/gemma/2026-06
"""

import contextlib
import errno
import os
import shutil
import stat
import typing as t
from collections import defaultdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lab.audio.plugins.module_utils import _s3, _tree
from ansible_collections.lab.audio.plugins.module_utils._changes import Changes
from ansible_collections.lab.audio.plugins.module_utils._host import Refused, bits_of, hold, number_of
from ansible_collections.lab.audio.plugins.module_utils._sources import Source, open_source
from ansible_collections.lab.audio.plugins.module_utils._tree import (
    MANIFEST,
    Access,
    File,
    Hashes,
    Manifest,
    exchange,
    wrong,
)

PATIENCE = 20  # seconds; a program that a killed run started ends sooner
BLOCK = 4096
FOUND = "found-"  # begins the name of a release that was a directory at `dest`
Params = dict[str, t.Any]


class Home(t.NamedTuple):
    """Where the releases of `dest` lie, and what it is now: a link to a release, a directory, or nothing."""

    dest: str
    path: str
    present: str | None
    directory: str | None

    def release(self, revision: str) -> str:
        return os.path.join(self.path, revision)

    def target(self, revision: str) -> str:
        """What the link says."""
        return os.path.relpath(self.release(revision), os.path.dirname(self.dest))

    @property
    def spare(self) -> str:
        return os.path.join(self.path, ".spare")

    @property
    def aside(self) -> str:
        """The name by which links are made, and where a directory is that the link has taken the place of."""
        return os.path.join(self.path, ".link")


def look(dest: str) -> Home:
    """Raises Refused if `dest` is something that is not this module's to replace."""
    parent, name = os.path.split(dest)
    if not os.path.isabs(dest) or not _tree.REVISION.fullmatch(name):
        raise Refused(f"dest {dest} is not an absolute path such as /data/models/gemma")
    path = os.path.join(parent, ".releases", name)
    aside = os.path.join(path, ".link")
    directory = aside if os.path.isdir(aside) and not os.path.islink(aside) else None
    present = None
    if os.path.islink(dest):
        target = os.readlink(dest)
        folder, present = os.path.split(target)
        if folder != f".releases/{name}" or not _tree.REVISION.fullmatch(present):
            raise Refused(f"{dest} is a link to {target}, which this module did not make: move it away")
    elif os.path.ismount(dest):
        raise Refused(f"{dest} is a mount point: let dest be a directory below it")
    elif os.path.isdir(dest):
        if directory:
            raise Refused(f"{dest} is a directory, and {aside} is one that was found there before: move one away")
        directory = dest
    elif os.path.lexists(dest):
        raise Refused(f"{dest} is neither a directory nor a link: move it away")
    return Home(dest, path, present, directory)


def lock(path: str) -> int | None:
    """Hold the directory of releases until this process ends, and what it started; none if it is not there."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    hold(held, PATIENCE, f"another run is at work on {path}: try again when it has ended")
    if not os.path.isdir(path) or not os.path.samestat(os.fstat(held), os.stat(path)):
        raise Refused(f"another run has removed {path} meanwhile: try again")
    return held


def releases(home: Home) -> list[str]:
    """Revisions of the releases that are here, the newest first."""
    if not os.path.isdir(home.path):
        return []
    with os.scandir(home.path) as entries:
        found = [
            (entry.stat(follow_symlinks=False).st_mtime_ns, entry.name)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and is_release(entry.name)
        ]
    return [name for _time, name in sorted(found, reverse=True)]


def is_release(name: str) -> bool:
    if not _tree.REVISION.fullmatch(name):
        return False
    return name.startswith(FOUND) or not _tree.RESERVED.fullmatch(name)


def previous_of(home: Home) -> str | None:
    """The release to go back to."""
    with contextlib.suppress(OSError):
        return os.readlink(os.path.join(home.path, ".previous"))
    return None


def read_release(home: Home, revision: str) -> Manifest | None:
    """The manifest of a release; none if there is none that can be read."""
    path = os.path.join(home.release(revision), MANIFEST)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            manifest = _tree.parse_manifest(file.read(_tree.MAX_MANIFEST), path)
    except (OSError, Refused):
        return None
    return manifest if manifest.revision == revision else None


def damage(home: Home, manifest: Manifest, verify: str, hashes: Hashes) -> list[str]:
    """What is wrong with a release."""
    top = home.release(manifest.revision)
    look_inside = hashes if verify == "full" else None
    said = ((path, wrong(top, path, file, look_inside)) for path, file in sorted(manifest.files.items()))
    return [f"{os.path.join(top, path)} {what}" for path, what in said if what]


def published(source: Source, revision: str | None) -> Manifest:
    """What the source has. Raises Refused if that is not the revision that is asked for, or is not whole."""
    listed = source.files()
    if MANIFEST not in listed:
        files = source.marked(listed)
        if revision is not None:
            return Manifest(_tree.check_revision(revision, "revision"), files)
        return Manifest(_tree.digest(files), files)
    where = f"{source.name}/{MANIFEST}"
    if listed[MANIFEST].size > _tree.MAX_MANIFEST:
        raise Refused(f"{where} has {listed[MANIFEST].size} bytes, which is too much for a manifest")
    manifest = _tree.parse_manifest(source.read(MANIFEST), where)
    if revision not in (None, manifest.revision):
        raise Refused(f"{source.name} has revision {manifest.revision}, not {revision}: publish that, or correct it")
    for path, file in sorted(manifest.files.items()):
        there = listed.get(path)
        if there is None or there.size != file.size:
            has = "no such file" if there is None else f"{there.size} bytes"
            raise Refused(
                f"{source.name}: its manifest has {path} with {file.size} bytes, but there is {has}. It is damaged or"
                " just being published: try again later, or publish it again"
            )
    return manifest


class Plan(t.NamedTuple):
    """How to come by a release. `kept`: files of it in `partial`. `links`: files that are elsewhere here.

    `missing`: files to be copied. `left`: what earlier runs left and is of no use.
    """

    wanted: Manifest
    partial: str
    kept: frozenset[str]
    links: dict[str, str]
    missing: list[str]
    left: list[str]

    def bytes(self) -> int:
        return sum(self.wanted.files[path].size for path in self.missing)

    def room(self) -> int:
        """Bytes to be written, in whole blocks, with some for directories."""
        return sum(-(-self.wanted.files[path].size // BLOCK) * BLOCK for path in self.missing) + (1 << 20)


def make_plan(home: Home, wanted: Manifest, whole: bool, hashes: Hashes) -> Plan:
    partial = home.release(f"{wanted.revision}.{_tree.digest(wanted.files)}.partial")
    kept: set[str] = set()
    links: dict[str, str] = {}
    if not whole:
        # Without a SHA-256: what is in `partial` came from these very files, as its name has their digest.
        kept = {path for path, file in wanted.files.items() if not wrong(partial, path, file, hashes)}
        links = find_copies(home, {p: file for p, file in wanted.files.items() if p not in kept}, hashes)
    missing = [path for path in sorted(wanted.files) if not whole and path not in kept and path not in links]
    in_use = {".previous", ".hashes.json", *([] if whole else [os.path.basename(partial), ".spare"])}
    in_use.update([".link"] if home.directory == home.aside else [])
    names = sorted(os.listdir(home.path)) if os.path.isdir(home.path) else []
    left = [home.release(name) for name in names if name not in in_use and not is_release(name)]
    return Plan(wanted, partial, frozenset(kept), links, missing, left)


def find_copies(home: Home, files: dict[str, File], hashes: Hashes) -> dict[str, str]:
    """Which files are here already, in a release or in the directory that is at `dest`, and where."""
    sizes = {file.size for file in files.values()}
    by_size = defaultdict(list)
    for top in [*map(home.release, releases(home)), *filter(None, [home.directory])]:
        manifest = read_release(home, os.path.basename(top)) if top != home.directory else None
        for entry in _tree.walk(top):
            if entry.is_file() and entry.status.st_size in sizes:
                said = manifest.files.get(entry.path) if manifest else None
                mark = said.mark if said else _tree.time_mark(entry.status.st_mtime)
                by_size[entry.status.st_size].append((entry, mark))
    found = {}
    for path, file in files.items():
        for entry, mark in sorted(by_size[file.size], key=lambda one: one[0].path != path):
            if hashes.of(entry.full) == file.sha256 if file.sha256 else (entry.path, mark) == (path, file.mark):
                found[path] = entry.full
                break
    return found


def nothing_of_its_own(directory: str, wanted: Manifest, hashes: Hashes) -> bool:
    """Whether all that is in a directory is in a release too, at the same place."""
    for entry in _tree.walk(directory):
        file = wanted.files.get(entry.path)
        if entry.path == MANIFEST and entry.is_file():
            continue
        if file is None or not entry.is_file() or entry.status.st_size != file.size:
            return False
        if hashes.of(entry.full) != file.sha256 if file.sha256 else _tree.time_mark(entry.status.st_mtime) != file.mark:
            return False
    return True


def found_name(home: Home, directory: str) -> str:
    """The release that a directory becomes: no other, whatever is written into it."""
    name = f"{FOUND}{os.stat(directory).st_ino}"
    while os.path.lexists(home.release(name)):  # of releases that came here from another disk
        name += "-2"
    return name


def present(module: AnsibleModule, home: Home, access: Access, changes: Changes) -> dict[str, t.Any]:
    params, check = module.params, module.check_mode
    parent = os.path.dirname(home.dest)
    if not os.path.isdir(parent):
        raise Refused(f"{parent} is not a directory: mount its disk, or make it")
    held = lock(home.path)
    home = look(home.dest)  # as it is now that nobody else is at work
    hashes = Hashes(home.path)
    revision = params["revision"]
    source = None
    wanted = read_release(home, revision) if revision else None
    found = damage(home, wanted, params["verify"], hashes) if wanted else []
    if wanted is None or found:
        source = open_source(module)
        wanted = published(source, revision)
        local = read_release(home, wanted.revision)
        if local and not _tree.same_files(local.files, wanted.files):
            raise Refused(
                f"{source.name} has other files than revision {wanted.revision} had when it was copied here: publish"
                " them under another revision"
            )
        if local:
            wanted = local  # it knows each SHA-256
            found = damage(home, local, params["verify"], hashes)
    here = releases(home)
    whole = wanted.revision in here and read_release(home, wanted.revision) is not None and not found
    plan = make_plan(home, wanted, whole, hashes)
    keeps = home.directory and not nothing_of_its_own(home.directory, wanted, hashes)
    aside = found_name(home, home.directory) if home.directory and keeps else None
    previous = previous_of(home)
    if aside and home.present in (None, wanted.revision):
        previous = aside
    elif home.present in here and home.present != wanted.revision:
        previous = home.present

    for path in plan.left:
        changes.note(f"remove what an earlier run left: {path}", path, "left over", None)
    release = home.release(wanted.revision)
    if not whole:
        if wanted.revision in here:
            damaged = "; ".join(found) or f"{release}/{MANIFEST} is damaged"
            changes.note(f"make revision {wanted.revision} whole again: {damaged}", "damage", damaged, None)
        copied = f"copy {len(plan.missing)} files, {plan.bytes()} bytes, from {params['src']}"
        others = len(wanted.files) - len(plan.missing)
        changes.note(
            f"{copied} as revision {wanted.revision}; {others} files are here",
            release,
            None,
            {"files": len(wanted.files), "bytes": sum(file.size for file in wanted.files.values())},
        )
        check_room(home, plan, here)
    wrong_access = [entry for entry in _tree.all_of(release) if access.differs(entry)] if whole else []
    if wrong_access:
        changes.note(
            f"set owner, group or mode of {len(wrong_access)} files and directories of {release}",
            "owner, group or mode",
            f"others than wanted: {len(wrong_access)}",
            f"mode {access.mode:04o}, owner {params['owner'] or 'any'}, group {params['group'] or 'any'}",
        )
    if home.present != wanted.revision:
        is_now = "a directory" if home.directory == home.dest else home.present and home.target(home.present)
        changes.note(
            f"link {home.dest} to {home.target(wanted.revision)}", home.dest, is_now, home.target(wanted.revision)
        )
    if home.directory:
        what = f"keep it as release {aside}" if aside else "remove it, as the release has all its files"
        changes.note(f"there is a directory at {home.dest}: {what}", "directory", home.dest, aside)
    order = list(dict.fromkeys([*([] if whole else [wanted.revision]), *here, *filter(None, [aside])]))
    copied_here = [old for old in order if not old.startswith(FOUND)]
    gone = [old for old in copied_here[params["keep"] :] if old not in (wanted.revision, previous)]
    for old in gone:
        changes.note(f"remove release {old}", home.release(old), "release", None)

    if not check and changes.plan:
        held = held if held is not None else make_home(home)
        for path in plan.left:
            if not os.path.basename(path).startswith("quarantine-"):
                _tree.discard(path)
        if not whole:
            copy(home, plan, t.cast(Source, source), params["verify"], access, hashes, held)
        for entry in wrong_access:
            access.give(entry)
        if previous:
            set_previous(home, previous)
        if home.present != wanted.revision:
            put_link(home, wanted.revision)
        if home.directory:
            # Somebody may have written into it while files were copied.
            if aside is None and not nothing_of_its_own(home.aside, wanted, hashes):
                aside = previous = found_name(home, home.aside)
                kept = f"{home.dest} was written to meanwhile: keep what was there as release {aside}"
                changes.note(kept, "directory", home.dest, aside)
                set_previous(home, aside)
                order.append(aside)
            settle(home, aside)
        for path in [*plan.left, *map(home.release, gone)]:
            if os.path.lexists(path):
                remove(home, path)
    if not check and os.path.isdir(home.path):
        hashes.save()
    return {
        "revision": wanted.revision,
        "previous_revision": previous if previous != wanted.revision and previous in order else None,
        "files": len(plan.missing),
        "bytes": plan.bytes(),
        "path": release,
        "releases": [one for one in order if one not in gone],
    }


def check_room(home: Home, plan: Plan, here: list[str]) -> None:
    """Raise Refused if what is to be copied does not fit. What is removed before counts as free."""
    free = shutil.disk_usage(os.path.dirname(home.dest)).free
    gone = plan.left + [entry.full for entry in _tree.walk(plan.partial) if entry.path not in plan.kept]
    gone += [home.spare] if os.path.isdir(home.spare) else []
    free += sum(map(_tree.occupied, gone))
    if plan.missing and plan.room() > free:
        others = [home.release(one) for one in here if one not in (home.present, plan.wanted.revision)]
        raise Refused(
            f"{os.path.dirname(home.dest)} has {free} bytes free, and {plan.room()} are needed for {len(plan.missing)}"
            f" files of revision {plan.wanted.revision}: make room"
            + (f"; {home.dest} can do without {', '.join(others)}" if others else "")
        )


def make_home(home: Home) -> int:
    """The directory of releases, held. It is for all to pass; each release has its own mode."""
    top = os.path.dirname(home.path)
    if not os.path.isdir(top):
        os.mkdir(top)
    os.chmod(top, 0o755)
    try:
        os.mkdir(home.path)
    except FileExistsError:
        raise Refused(f"another run has begun to make {home.dest}: try again when it has ended") from None
    held = lock(home.path)
    if held is None:
        raise Refused(f"{home.path} was removed while it was made: try again")
    return held


def copy(home: Home, plan: Plan, source: Source, verify: str, access: Access, hashes: Hashes, held: int) -> None:
    """Make a release, whole or not at all. If that fails, what is right in `partial` is there for the next run."""
    wanted, partial = plan.wanted, plan.partial
    os.makedirs(partial, 0o700, exist_ok=True)
    for entry in sorted(_tree.walk_all(partial), reverse=True):
        if entry.path in plan.kept:
            continue
        if stat.S_ISDIR(entry.status.st_mode):
            with contextlib.suppress(OSError):  # it has files that are kept
                os.rmdir(entry.full)
        else:
            os.unlink(entry.full)
    for path in [home.spare, *plan.left]:  # quarantines alone are left of these
        if os.path.isdir(path) and plan.room() > shutil.disk_usage(home.path).free:
            _tree.discard(path)
    for path, full in plan.links.items():
        target = os.path.join(partial, path)
        os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
        os.link(full, target)
    if plan.missing:
        source.fetch(plan.missing, partial, home.spare, held)
    try:
        files = verified(home, plan, verify, hashes)
    finally:
        hashes.save()
    if not wanted.published and source.marked(source.files()) != wanted.files:
        raise Refused(f"{source.name} was changed while it was copied: try again when it is at rest")
    _tree.write(os.path.join(partial, MANIFEST), wanted.published or _tree.manifest_text(wanted.revision, files), 0o600)
    for entry in _tree.all_of(partial):
        access.give(entry)
    _tree.sync_tree(partial)
    release = home.release(wanted.revision)
    os.utime(partial)  # the order of releases
    if os.path.lexists(release):
        exchange(partial, release)
        _tree.discard(partial)
    else:
        os.rename(partial, release)
    _tree.sync(home.path)
    if os.path.isdir(home.spare):
        _tree.discard(home.spare)


def verified(home: Home, plan: Plan, verify: str, hashes: Hashes) -> dict[str, File]:
    """The files, each with its SHA-256. Raises Refused if one is not what it should be; that one is moved away."""
    files, bad = dict(plan.wanted.files), []
    for path, file in sorted(files.items()):
        full = os.path.join(plan.partial, path)
        what = wrong(plan.partial, path, file, hashes if verify == "full" else None)
        if what:
            bad.append(f"{path} {what}")
            if os.path.isfile(full) and not os.path.islink(full):
                target = os.path.join(home.path, f"quarantine-{plan.wanted.revision}", path)
                os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
                os.replace(full, target)
        elif not file.sha256:
            files[path] = file._replace(sha256=hashes.of(full))
    if bad:
        raise Refused(
            f"what was copied is not what the manifest of revision {plan.wanted.revision} says: {'; '.join(bad)}. It is"
            f" in {home.path}/quarantine-{plan.wanted.revision}, and {home.dest} is as it was. Publish what is"
            " right and run again"
        )
    return files


def set_previous(home: Home, revision: str) -> None:
    if previous_of(home) != revision:
        _tree.link_to(revision, os.path.join(home.path, ".previous"), os.path.join(home.path, ".previous.new"))


def put_link(home: Home, revision: str) -> None:
    """Have `dest` point to a release, in one step, whatever it was."""
    if home.directory == home.dest:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(home.aside)
        os.symlink(home.target(revision), home.aside)
        try:
            exchange(home.aside, home.dest)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            raise Refused(
                f"this file system cannot let a link take the place of the directory {home.dest} in one step: move the"
                " directory away"
            ) from error
    else:
        _tree.link_to(home.target(revision), home.dest, f"{home.aside}.new")
    _tree.sync(os.path.dirname(home.dest))
    _tree.sync(home.path)


def settle(home: Home, name: str | None) -> None:
    """Keep the directory that the link has taken the place of as a release, or remove it."""
    if name is None:
        remove(home, home.aside)
    else:
        os.rename(home.aside, home.release(name))


def remove(home: Home, path: str) -> None:
    """Remove a release or what was left over. Killed meanwhile, what remains is no release any more."""
    gone = f"{path}.partial"
    if os.path.lexists(gone):
        _tree.discard(gone)
    os.rename(path, gone)
    _tree.discard(gone)


def rolled_back(module: AnsibleModule, home: Home, access: Access, changes: Changes) -> dict[str, t.Any]:
    lock(home.path)
    home = look(home.dest)
    here, previous = releases(home), previous_of(home)
    if home.directory == home.dest:
        raise Refused(f"{home.dest} is a directory without releases: run state=present first")
    if previous is None or previous not in here:
        raise Refused(f"{home.dest} has no previous release to go back to")
    if home.present != previous:
        hashes = Hashes(home.path)
        if not previous.startswith(FOUND):  # nobody knows what that should be
            manifest = read_release(home, previous)
            found = [f"{home.release(previous)}/{MANIFEST} is no manifest of it"]
            if manifest:
                found = damage(home, manifest, module.params["verify"], hashes)
            if found:
                raise Refused(f"the previous release is damaged: {'; '.join(found)}; {home.dest} is as it was")
        before = home.present and home.target(home.present)
        changes.note(f"link {home.dest} to {home.target(previous)}", home.dest, before, home.target(previous))
        if not module.check_mode:
            put_link(home, previous)
            hashes.save()
    return {
        "revision": previous,
        "previous_revision": None,
        "path": home.release(previous),
        "releases": here,
    }


def absent(module: AnsibleModule, home: Home, access: Access, changes: Changes) -> dict[str, t.Any]:
    lock(home.path)
    home = look(home.dest)
    found = [home.release(one) for one in releases(home) if one.startswith(FOUND)]
    if home.directory or found:
        others = ", ".join(filter(None, [home.directory, *found]))
        raise Refused(f"this module did not make {others}: move it away, or remove it by hand")
    if home.present is not None:
        changes.note(f"remove the link {home.dest}", home.dest, home.target(home.present), None)
        if not module.check_mode:
            os.unlink(home.dest)
    if os.path.isdir(home.path):
        changes.note(f"remove {home.path} and its releases", home.path, releases(home), None)
        if not module.check_mode:
            for revision in releases(home):
                remove(home, home.release(revision))
            _tree.discard(home.path)
            with contextlib.suppress(OSError):  # other models have releases
                os.rmdir(os.path.dirname(home.path))
    return {"releases": []}


def access_of(params: Params) -> Access:
    mode = bits_of(params["mode"])
    return Access(number_of("owner", params["owner"]), number_of("group", params["group"]), mode)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **_s3.ARGUMENTS,
            "state": {"type": "str", "choices": ["present", "rolled_back", "absent"], "default": "present"},
            "src": {"type": "str"},
            "dest": {"type": "path", "required": True},
            "revision": {"type": "str"},
            "keep": {"type": "int", "default": 2},
            "verify": {"type": "str", "choices": ["full", "size"], "default": "full"},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "mode": {"type": "str", "default": "0750"},
            "ssh_key": {"type": "path", "no_log": False},
            "known_hosts": {"type": "path"},
            "ssh_port": {"type": "int", "default": 22},
        },
        required_if=[("state", "present", ["src"])],
        supports_check_mode=True,
    )
    params, changes = module.params, Changes()
    act = {"present": present, "rolled_back": rolled_back, "absent": absent}[params["state"]]
    os.umask(0o022)
    try:
        if params["keep"] < 1:
            raise Refused(f"keep {params['keep']} is not at least 1")
        if params["revision"] is not None:
            _tree.check_revision(params["revision"], "revision")
        access = access_of(params)
        home = look(os.path.normpath(params["dest"]))
        result = act(module, home, access, changes)
    except (Refused, _s3.StoreError) as error:
        module.fail_json(msg=str(error), **changes.result())
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        module.fail_json(msg=f"{error.strerror or error}{where}", **changes.result())
    module.exit_json(**result, **changes.result())


if __name__ == "__main__":
    main()
