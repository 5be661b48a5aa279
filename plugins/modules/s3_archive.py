#!/usr/bin/python
# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: s3_archive
short_description: Bring a file or a directory to an S3 object store and back
version_added: 0.1.0
description:
  - Stores a file as it is, or a directory as a tar, and fetches objects. What was stored is compared with what the
    store computed; what was fetched is compared with the SHA-256 that it was stored with.
  - A directory always gives the same tar. Its regular files come in the order of their names, with mode 0644, owner 0
    and time 0. It is read twice, once for its SHA-256 and once to be sent, and is never copied on disk.
  - Works with OpenStack Swift from 2.30 on (through s3api, also over TLS), SeaweedFS, and AWS.
extends_documentation_fragment:
  - lab.audio._attributes
  - lab.audio._attributes.action_group
  - lab.audio._s3
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
    details:
      - The SHA-256 in the object's metadata decides, never its ETag. An object without it, which another client put, is
        read to be compared, if it has the right size.
  async:
    support: full
  platform:
    support: full
    platforms: posix
options:
  state:
    description:
      - V(present) - O(src) is in the store under the key.
      - V(fetched) - the object is at O(dest).
      - V(absent) - nothing is under the key, and no unfinished upload.
    type: str
    choices: [present, fetched, absent]
    default: present
  key:
    description: Key of the object. Give this or O(batch_id).
    type: str
  batch_id:
    description: The archive of this batch, which is C(archives/{batch_id}.tar).
    type: str
  src:
    description:
      - File, or directory, on the host. Needed with O(state=present).
      - A directory with anything but directories and regular files in it is refused.
    type: path
  dest:
    description:
      - File on the host to write, or an existing directory to write it into under the last part of its key. Needed with
        O(state=fetched). It is replaced only by a whole and verified object, and keeps its mode. A new file is for its
        owner alone, as it may hold voices.
    type: path
notes:
  - What is below C(archives/) is never replaced by other content, since recordings may have been read from it already.
    Objects elsewhere are, by the last request of the new content. One that was stored in parts is deleted just before
    that, as Swift would keep its parts, so a failure then leaves nothing under the key until the next run.
  - An archive that is stored here is not yet queued; C(lab-audio reconcile) does that, or an C(RPUSH) on C(unpack).
  - O(state=absent) deletes an archive that may hold the only copy of recordings. C(lab-audio retention) deletes those
    that are not needed any more.
  - Two runs that store under one key at the same time disturb each other; then one fails and can be run again.
seealso:
  - module: amazon.aws.s3_object
    description: For AWS, with all that S3 offers there.
requirements:
  - boto3 >= 1.36
author:
  - The lab.audio maintainers (@lab-audio)
"""

EXAMPLES = r"""
- name: Store an archive, with endpoint and keys from the environment of the host
  lab.audio.s3_archive:
    batch_id: 20250622-143052-a1b2c3
    src: /var/tmp/20250622-143052-a1b2c3.tar

- name: Store a directory as a tar in Swift, with a CA of one's own
  lab.audio.s3_archive:
    endpoint_url: https://swift.example.edu:8080
    credentials_directory: /etc/lab-audio/credentials
    ca_bundle: /etc/ssl/certs/our-ca.pem
    key: models/policies.tar
    src: /etc/lab-audio/policies

- name: Fetch an archive
  lab.audio.s3_archive:
    state: fetched
    batch_id: 20250622-143052-a1b2c3
    dest: /root/

- name: Delete an object
  lab.audio.s3_archive:
    state: absent
    key: models/policies.tar
"""

RETURN = r"""
bucket:
  description: Name of the bucket.
  returned: on success
  type: str
  sample: audio-pipeline
key:
  description: Key of the object.
  returned: on success
  type: str
  sample: archives/20250622-143052-a1b2c3.tar
size:
  description: Bytes of the object.
  returned: with O(state=present) and O(state=fetched)
  type: int
  sample: 104857600
sha256:
  description: SHA-256 of the object's content. In check mode, of one that is to be fetched, what the store says.
  returned: with O(state=present) and O(state=fetched)
  type: str
  sample: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
etag:
  description: ETag of the object, as the store computes it.
  returned: with O(state=present) and O(state=fetched)
  type: str
  sample: 0cc175b9c0f1b6a831c399e269772661
dest:
  description: File that holds the object.
  returned: with O(state=fetched)
  type: str
  sample: /root/20250622-143052-a1b2c3.tar
plan:
  description: What was done; in check mode, or after a failure, what was to be done.
  returned: always
  type: list
  elements: str
  sample: ["store 104857600 bytes under archives/20250622-143052-a1b2c3.tar"]
"""

import os
import re
import stat
import tarfile
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lab.audio.plugins.module_utils import _s3
from ansible_collections.lab.audio.plugins.module_utils._changes import Changes
from ansible_collections.lab.audio.plugins.module_utils._host import Refused

BATCH_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
ARCHIVES = "archives/"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **_s3.ARGUMENTS,
            "state": {"type": "str", "choices": ["present", "fetched", "absent"], "default": "present"},
            "key": {"type": "str", "no_log": False},
            "batch_id": {"type": "str"},
            "src": {"type": "path"},
            "dest": {"type": "path"},
        },
        required_one_of=[("key", "batch_id")],
        mutually_exclusive=[("key", "batch_id")],
        required_if=[("state", "present", ["src"]), ("state", "fetched", ["dest"])],
        supports_check_mode=True,
    )
    act = {"present": present, "fetched": fetched, "absent": absent}[module.params["state"]]
    changes = Changes()
    try:
        key = key_of(module.params["key"], module.params["batch_id"])
        store = _s3.open_store(module)
        result = act(store, key, module.params, changes, module.check_mode)
    except (Refused, _s3.StoreError) as error:
        module.fail_json(msg=str(error), **changes.result())
    except OSError as error:
        what = error.filename or module.params["src"] or module.params["dest"]
        module.fail_json(msg=f"{what}: {error.strerror}", **changes.result())
    module.exit_json(bucket=store.bucket, key=key, **result, **changes.result())


def key_of(key: str | None, batch_id: str | None) -> str:
    """The object's key. Raises Refused if it is none."""
    if batch_id is not None:
        if not BATCH_ID.fullmatch(batch_id):
            raise Refused(f"batch_id {batch_id!r} is not YYYYMMDD-HHMMSS-xxxxxx")
        return f"{ARCHIVES}{batch_id}.tar"
    if not key or key.startswith("/") or key.endswith("/") or len(key.encode()) > 1024 or not key.isprintable():
        raise Refused(f"key {key!r} is not a name such as models/policies.tar")
    return key


def present(store: _s3.Store, key: str, params: dict[str, t.Any], changes: Changes, check: bool) -> dict[str, t.Any]:
    """Bring a file or a directory to the store."""
    src = params["src"]
    wanted = _s3.digest(read(src), size_of(src))
    result = {"size": wanted.size, "sha256": wanted.sha256, "etag": wanted.etag}
    there = _s3.head(store, key)
    if there is not None and holds(store, key, there, wanted):
        return {**result, "etag": there.etag}
    if there is not None and key.startswith(ARCHIVES):
        raise Refused(
            f"{store.place(key)} holds other content ({there.size} bytes, SHA-256 {there.sha256 or 'unknown'}; {src}"
            f" has {wanted.size} bytes, {wanted.sha256}): an archive is never replaced. Give it another batch_id"
        )
    before = None if there is None else {"size": there.size, "sha256": there.sha256}
    how = "store" if there is None else "replace what is there: store"
    changes.note(f"{how} {wanted.size} bytes under {key}", key, before, {"size": wanted.size, "sha256": wanted.sha256})
    if not check:
        abort_uploads(store, key)
        _s3.upload(store, key, read(src), wanted, there)
    return result


def holds(store: _s3.Store, key: str, there: _s3.Head, wanted: _s3.Digest) -> bool:
    """Whether the store has these bytes; reads them only where nobody said what they are."""
    if there.size != wanted.size:
        return False
    return (there.sha256 or _s3.sha256_of(_s3.blocks(store, key, there))) == wanted.sha256


def fetched(store: _s3.Store, key: str, params: dict[str, t.Any], changes: Changes, check: bool) -> dict[str, t.Any]:
    """Bring an object to a file."""
    there = _s3.head(store, key)
    if there is None:
        raise Refused(f"{store.place(key)} is not in the store")
    dest = params["dest"]
    if os.path.isdir(dest):
        dest = os.path.join(dest, key.rsplit("/", 1)[-1])
    folder = os.path.dirname(dest) or "."
    if not os.path.isdir(folder):
        raise Refused(f"{folder} is not a directory: make it first")
    if os.path.lexists(dest) and not os.path.isfile(dest):
        raise Refused(f"{dest} is there and is not a file")
    result = {"size": there.size, "sha256": there.sha256, "etag": there.etag, "dest": dest}
    before = None
    if os.path.exists(dest):
        before = {"size": os.path.getsize(dest), "sha256": _s3.sha256_of(_s3.file_blocks(dest))}
        if before["size"] == there.size:
            sha256 = there.sha256 or _s3.sha256_of(_s3.blocks(store, key, there))
            if before["sha256"] == sha256:
                return {**result, "sha256": sha256}
    changes.note(f"fetch {there.size} bytes to {dest}", dest, before, {"size": there.size, "sha256": there.sha256})
    free = _s3.room(dest)
    if free < there.size:
        raise Refused(f"{folder} has {free} bytes free, {key} needs {there.size}: make room")
    if not check:
        result["sha256"] = _s3.download(store, key, there, dest)
    return result


def absent(store: _s3.Store, key: str, params: dict[str, t.Any], changes: Changes, check: bool) -> dict[str, t.Any]:
    """Delete an object, and uploads of it that nobody finished."""
    there = _s3.head(store, key)
    if there is not None:
        changes.note(f"delete {key}, {there.size} bytes", key, {"size": there.size, "sha256": there.sha256}, None)
        if not check:
            _s3.delete(store, key)
    unfinished = _s3.unfinished_uploads(store, key)
    if unfinished:
        changes.note(f"abort unfinished uploads of {key}: {len(unfinished)}", "unfinished uploads", len(unfinished), 0)
        if not check:
            abort_uploads(store, key)
    return {}


def abort_uploads(store: _s3.Store, key: str) -> None:
    """Remove what uploads that were cut short have left."""
    for upload in _s3.unfinished_uploads(store, key):
        _s3.abort_upload(store, key, upload)


def read(src: str) -> t.Iterator[bytes]:
    """The bytes of a file, or of the tar that a directory makes. Raises Refused, OSError."""
    return tar_of(src) if os.path.isdir(src) else _s3.file_blocks(src)


def size_of(src: str) -> int:
    """How many bytes `read` gives. Raises Refused, OSError."""
    if not os.path.isdir(src):
        if not stat.S_ISREG(os.stat(src).st_mode):
            raise Refused(f"{src} is neither a file nor a directory")
        return os.path.getsize(src)
    return sum(len(header) + padded(size) for _path, header, size in entries(src)) + 2 * tarfile.BLOCKSIZE


def padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def entries(directory: str) -> list[tuple[str, bytes, int]]:
    """(path, tar header, size) of each file below a directory, in the order of their names there."""
    found = []
    for folder, folders, names in os.walk(directory, onerror=raise_it):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise Refused(f"{path} is neither a file nor a directory, and a tar of others would miss it")
            info = tarfile.TarInfo(os.path.relpath(path, directory))
            info.size = status.st_size
            found.append((info.name, path, info))
    return [
        (path, info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), info.size)
        for _name, path, info in sorted(found, key=lambda entry: os.fsencode(entry[0]))
    ]


def raise_it(error: OSError) -> t.NoReturn:
    raise error


def tar_of(directory: str) -> t.Iterator[bytes]:
    """The tar of a directory, block by block. Raises Refused if a file changes its size meanwhile."""
    for path, header, size in entries(directory):
        yield header
        left = size
        for block in _s3.file_blocks(path):
            left -= len(block)
            yield block
        if left:
            raise Refused(f"{path} was changed while it was read: try again when it is at rest")
        yield b"\0" * (padded(size) - size)
    yield b"\0" * 2 * tarfile.BLOCKSIZE


if __name__ == "__main__":
    main()
