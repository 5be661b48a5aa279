"""lab.audio.model_sync from a directory, from a real sshd by rsync, and from SeaweedFS."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from needed import missing as cannot_run
from needed import needed

from conftest import CHECKOUT, PYTHON, Run, command, environment, write_arguments
from seaweedfs import SeaweedFS
from sshd import Sshd, make_key

MODULE = "model_sync"
MIB = 1 << 20
KILLS = int(os.environ.get("KILLS", "20"))
Files = dict[str, bytes]
ONE: Files = {
    "base/config.json": b'{"a": 1}',
    "base/weights-1.safetensors": random.Random(1).randbytes(300_000),
    "base/weights-2.safetensors": random.Random(2).randbytes(400_000),
    "cope-a/adapter config.json": b"",
    "cope-a/Zürich.bin": b"x" * 5000,
}
TWO: Files = {**ONE, "base/weights-2.safetensors": random.Random(3).randbytes(400_000), "new/file": b"new"}
BYTES = sum(map(len, ONE.values()))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(revision: str, files: Files) -> bytes:
    listed = [{"path": path, "size": len(data), "sha256": sha256(data)} for path, data in files.items()]
    return json.dumps({"revision": revision, "files": listed}).encode()


class Source:
    """A directory that models are published in, and the module's options to reach it."""

    def __init__(self, root: Path, options: dict[str, Any]) -> None:
        self.root, self.options = root, options
        root.mkdir(parents=True)

    def put(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def drop(self, path: str) -> None:
        (self.root / path).unlink()

    def clear(self) -> None:
        shutil.rmtree(self.root)
        self.root.mkdir()

    def publish(self, files: Files, revision: str | None) -> None:
        """Without a revision: without a manifest."""
        self.clear()
        for path, data in files.items():
            self.put(path, data)
        if revision:
            self.put("manifest.json", manifest(revision, files))


class Bucket(Source):
    def __init__(self, server: SeaweedFS) -> None:
        name = f"models-{uuid.uuid4().hex[:12]}"
        self.options = {
            "src": f"s3://{name}/gemma/",
            "endpoint_url": server.endpoint,
            "access_key": server.access_key,
            "secret_key": server.secret_key,
        }
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )
        client.create_bucket(Bucket=name)
        self.client, self.name = client, name

    def put(self, path: str, data: bytes, **metadata: str) -> None:
        self.client.put_object(Bucket=self.name, Key=f"gemma/{path}", Body=data, Metadata=metadata)

    def drop(self, path: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"gemma/{path}")

    def clear(self) -> None:
        for one in self.client.list_objects_v2(Bucket=self.name).get("Contents", ()):
            self.client.delete_object(Bucket=self.name, Key=one["Key"])


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        with needed():
            if os.getuid():
                raise RuntimeError("needs root, for owners and mounts")
            if not shutil.which("rsync"):
                raise RuntimeError("rsync is missing: apt install rsync")
            running = {
                name: stack.enter_context(kind(tmp_path_factory.mktemp(name)))
                for name, kind in (("sshd", Sshd), ("seaweedfs", SeaweedFS))
            }
        yield running


@pytest.fixture(autouse=True)
def local(servers: dict[str, Any], tmp_path: Path) -> Source:
    return Source(tmp_path / "local", {"src": f"{tmp_path}/local"})


@pytest.fixture
def remote(servers: dict[str, Any], tmp_path: Path) -> Source:
    server = servers["sshd"]
    options = {
        "src": f"{server.user}@127.0.0.1:{tmp_path}/remote",
        "ssh_port": server.port,
        "ssh_key": server.key,
        "known_hosts": server.known_hosts,
    }
    return Source(tmp_path / "remote", options)


@pytest.fixture
def bucket(servers: dict[str, Any]) -> Bucket:
    return Bucket(servers["seaweedfs"])


@pytest.fixture(params=["local", "remote", "bucket"])
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "gemma"


def content(top: Path) -> Files:
    """What a worker finds there, but the manifest."""
    return {
        str(path.relative_to(top)): path.read_bytes()
        for path in top.rglob("*")
        if path.is_file() and path != top / "manifest.json"
    }


def inventory(dest: Path) -> list[str]:
    """The names in the directory of releases, but the module's own two."""
    home = dest.parent / ".releases" / dest.name
    return sorted(path.name for path in home.iterdir() if path.name not in (".hashes.json", ".previous"))


def read_bytes(run_it: list[str], env: dict[str, str]) -> tuple[dict[str, Any], int]:
    """A module's result, and how many bytes it and its children read."""
    between = (
        "import subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "print(done.stdout); print(open('/proc/self/io').readline().split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", between, *run_it], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.split()
    return json.loads(done.stdout[: done.stdout.rindex("}") + 1]), int(lines[-1])


def test_a_model_comes_and_goes(predicted: Run, source: Source, dest: Path) -> None:
    source.publish(ONE, "r1")
    first = predicted(MODULE, **source.options, dest=dest)
    assert (first["revision"], first["previous_revision"], first["releases"]) == ("r1", None, ["r1"])
    assert (first["files"], first["bytes"]) == (len(ONE), BYTES)
    assert dest.is_symlink() and str(dest.readlink()) == ".releases/gemma/r1" and content(dest) == ONE
    assert first["path"] == str(dest.resolve()) and inventory(dest) == ["r1"]
    assert json.loads((dest / "manifest.json").read_text())["revision"] == "r1"

    source.publish(TWO, "r2")
    second = predicted(MODULE, **source.options, dest=dest)
    assert (second["revision"], second["previous_revision"], second["releases"]) == ("r2", "r1", ["r2", "r1"])
    assert (second["files"], second["bytes"]) == (2, 400_003) and content(dest) == TWO
    home = dest.parent / ".releases" / "gemma"
    same = "base/weights-1.safetensors"
    assert (home / "r1" / same).stat().st_ino == (home / "r2" / same).stat().st_ino
    assert content(home / "r1") == ONE

    back = predicted(MODULE, state="rolled_back", dest=dest)
    assert (back["revision"], back["previous_revision"], content(dest)) == ("r1", None, ONE)
    pinned = predicted_unchanged(predicted, **source.options, dest=dest, revision="r1")
    assert pinned["revision"] == "r1"
    forward = predicted(MODULE, **source.options, dest=dest)
    assert (forward["revision"], forward["previous_revision"], forward["files"]) == ("r2", "r1", 0)

    gone = predicted(MODULE, state="absent", dest=dest)
    assert gone["changed"] and list(dest.parent.iterdir()) == []


def predicted_unchanged(predicted: Run, **options: Any) -> dict[str, Any]:
    result = predicted(MODULE, **options)
    assert result["changed"] is False and result["plan"] == [], result
    return result


def test_a_source_without_a_manifest(predicted: Run, run: Run, source: Source, dest: Path) -> None:
    source.publish(ONE, None)
    first = predicted(MODULE, **source.options, dest=dest)
    assert content(dest) == ONE and first["files"] == len(ONE)
    made = json.loads((dest / "manifest.json").read_text())
    assert {one["path"]: one["sha256"] for one in made["files"]} == {p: sha256(data) for p, data in ONE.items()}
    assert made["revision"] == first["revision"]
    source.put("base/weights-2.safetensors", TWO["base/weights-2.safetensors"] + b".")
    second = predicted(MODULE, **source.options, dest=dest)
    assert (second["files"], second["previous_revision"]) == (1, first["revision"])
    # A host that has it can be the source of others, and then it is verified.
    other = dest.with_name("other")
    third = predicted(MODULE, src=str(dest), dest=other)
    assert third["revision"] == second["revision"] and content(other) == content(dest)
    # With a name
    named = predicted(MODULE, **source.options, dest=dest, revision="2026-06")
    assert (named["revision"], named["files"]) == ("2026-06", 0)
    source.put("base/config.json", b"other now")
    assert run(MODULE, **source.options, dest=dest, revision="2026-06")["changed"] is False


def test_a_run_that_changes_nothing_reads_no_content(source: Source, dest: Path, tmp_path: Path) -> None:
    source.publish({"weights": b"w" * 40 * MIB}, "r1")
    run_it = command(MODULE, write_arguments(tmp_path / "arguments.json", {**source.options, "dest": dest}))
    first, much = read_bytes(run_it, environment())
    again, little = read_bytes(run_it, environment())
    print(f"read: {much} bytes at first, {little} later")
    assert (first["changed"], again["changed"]) == (True, False) and much > 40 * MIB
    assert little < 20 * MIB  # Python itself, and boto3


def test_damage_is_noticed_and_made_good(predicted: Run, run: Run, source: Source, dest: Path) -> None:
    source.publish(ONE, "r1")
    run(MODULE, **source.options, dest=dest)
    with (dest / "base/weights-1.safetensors").open("r+b") as file:
        file.write(b"damaged")
    (dest / "cope-a/Zürich.bin").unlink()
    said = predicted(MODULE, **source.options, dest=dest)
    assert said["files"] == 2 and "base/weights-1.safetensors has the SHA-256" in said["plan"][0]
    assert "Zürich.bin is missing" in said["plan"][0] and content(dest) == ONE and inventory(dest) == ["r1"]
    with (dest / "base/weights-1.safetensors").open("r+b") as file:
        file.write(b"damaged")
    assert run(MODULE, **source.options, dest=dest, verify="size")["changed"] is False
    assert run(MODULE, **source.options, dest=dest, revision="r1")["files"] == 1 and content(dest) == ONE
    (dest / "manifest.json").write_text("{")
    assert predicted(MODULE, **source.options, dest=dest)["files"] == 0 and content(dest) == ONE


def test_a_wrong_hash_is_moved_away_and_named(run: Run, source: Source, dest: Path) -> None:
    source.publish(ONE, "r1")
    run(MODULE, **source.options, dest=dest)
    source.publish(TWO, "r2")
    source.put("base/weights-2.safetensors", b"y" * 400_000)
    said = run(MODULE, **source.options, dest=dest)
    assert "base/weights-2.safetensors has the SHA-256" in said["msg"] and "is as it was" in said["msg"]
    assert content(dest) == ONE and "copy 2 files" in said["plan"][0]
    (partial,) = (name for name in inventory(dest) if name.endswith(".partial"))
    assert set(inventory(dest)) == {"quarantine-r2", "r1", partial, ".spare"} - ({".spare"} - set(inventory(dest)))
    home = dest.parent / ".releases" / "gemma"
    assert (home / "quarantine-r2" / "base/weights-2.safetensors").read_bytes() == b"y" * 400_000
    source.put("base/weights-2.safetensors", TWO["base/weights-2.safetensors"])
    right = run(MODULE, **source.options, dest=dest)
    assert right["files"] == 1 and content(dest) == TWO and inventory(dest) == ["r1", "r2"]


def test_sizes_only_if_asked(run: Run, source: Source, dest: Path) -> None:
    source.publish(ONE, "r1")
    source.put("base/weights-2.safetensors", b"y" * 400_000)
    assert run(MODULE, **source.options, dest=dest, verify="size")["changed"]
    assert run(MODULE, **source.options, dest=dest, verify="size")["changed"] is False
    said = run(MODULE, **source.options, dest=dest)
    assert "base/weights-2.safetensors has the SHA-256" in said["msg"]


def test_a_directory_that_is_there_is_compared_and_linked(predicted: Run, run: Run, source: Source, dest: Path) -> None:
    source.publish(ONE, "r1")
    for path, data in ONE.items():
        (dest / path).parent.mkdir(parents=True, exist_ok=True)
        (dest / path).write_bytes(data)
    inode = (dest / "base/weights-1.safetensors").stat().st_ino
    adopted = predicted(MODULE, **source.options, dest=dest)
    assert (adopted["files"], adopted["bytes"], adopted["releases"]) == (0, 0, ["r1"])
    assert dest.is_symlink() and content(dest) == ONE and inventory(dest) == ["r1"]
    assert (dest / "base/weights-1.safetensors").stat().st_ino == inode
    assert "no previous release" in run(MODULE, state="rolled_back", dest=dest)["msg"]


def test_a_directory_with_something_of_its_own_is_kept(predicted: Run, run: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    shutil.copytree(local.root, dest)
    (dest / "notes").write_text("mine")
    (dest / "base/weights-2.safetensors").write_bytes(b"old")
    (dest / "link").symlink_to("notes")
    found = content(dest)
    namesake = dest.parent / ".releases/gemma" / f"found-{dest.stat().st_ino}"  # as after a move from another disk
    (namesake / "other").mkdir(parents=True)
    adopted = predicted(MODULE, **local.options, dest=dest)
    (name,) = set(inventory(dest)) - {"r1", namesake.name}
    assert name.startswith("found-") and adopted["previous_revision"] == name
    shutil.rmtree(namesake)
    assert (adopted["files"], content(dest)) == (1, ONE) and content(dest.parent / ".releases/gemma" / name) == found
    back = predicted(MODULE, state="rolled_back", dest=dest)
    assert back["revision"] == name and content(dest) == found and (dest / "link").is_symlink()
    predicted(MODULE, **local.options, dest=dest)
    for number in (2, 3):
        local.publish({**ONE, "n": b"%d" % number}, f"r{number}")
        kept = predicted(MODULE, **local.options, dest=dest, keep=1)
    assert inventory(dest) == [name, "r2", "r3"] and set(kept["releases"]) == {name, "r2", "r3"}
    said = predicted(MODULE, state="absent", dest=dest)
    assert f"did not make {dest.parent}/.releases/gemma/{name}:" in said["msg"] and "by hand" in said["msg"]
    assert inventory(dest) == [name, "r2", "r3"]
    shutil.rmtree(dest.parent / ".releases/gemma" / name)
    assert predicted(MODULE, state="absent", dest=dest)["changed"] and list(dest.parent.iterdir()) == []


def test_what_is_found_does_not_count(predicted: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    predicted(MODULE, **local.options, dest=dest)
    local.publish(TWO, "r2")
    predicted(MODULE, **local.options, dest=dest)
    dest.unlink()
    dest.mkdir()
    (dest / "notes").write_text("mine")
    adopted = predicted(MODULE, **local.options, dest=dest)
    assert adopted["releases"][:2] == ["r2", "r1"] and adopted["releases"][2].startswith("found-")


def test_what_is_written_into_the_directory_meanwhile_is_kept(
    predicted: Run, run: Run, local: Source, dest: Path, tmp_path: Path
) -> None:
    local.publish(ONE, "r1")
    shutil.copytree(local.root, dest)
    (dest / "cope-a/Zürich.bin").unlink()
    found = {**content(dest), "notes": b"mine\n"}
    env = shim(tmp_path / "bin", after=f"echo mine >{dest}/notes")
    adopted = run(MODULE, env=env, **local.options, dest=dest)
    name = adopted["previous_revision"]
    assert set(adopted["releases"]) == {name, "r1"} and "written to meanwhile: keep" in adopted["plan"][-1]
    assert content(dest) == ONE and content(dest.parent / ".releases/gemma" / name) == found
    predicted_unchanged(predicted, **local.options, dest=dest)
    assert predicted(MODULE, state="rolled_back", dest=dest)["revision"] == name and content(dest) == found


def test_what_is_found_twice_is_kept_twice(predicted: Run, run: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    for text in ("mine", "MINE"):
        dest.mkdir()
        (dest / "notes").write_text(text)
        os.utime(dest / "notes", (1, 1))
        run(MODULE, **local.options, dest=dest)
        dest.unlink()
    found = {path.read_text() for path in (dest.parent / ".releases/gemma").glob("found-*/notes")}
    assert found == {"mine", "MINE"}


def test_a_directory_that_a_killed_run_found(predicted: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    predicted(MODULE, **local.options, dest=dest)
    aside = dest.parent / ".releases/gemma/.link"
    aside.mkdir()
    (aside / "notes").write_text("mine")
    assert f"did not make {aside}:" in predicted(MODULE, state="absent", dest=dest)["msg"]
    dest.unlink()
    dest.mkdir()
    assert f"{aside} is one that was found" in predicted(MODULE, **local.options, dest=dest)["msg"]
    assert (aside / "notes").read_text() == "mine"
    dest.rmdir()
    name = predicted(MODULE, **local.options, dest=dest)["previous_revision"]
    assert content(dest) == ONE and content(dest.parent / ".releases/gemma" / name) == {"notes": b"mine"}


def test_a_directory_without_a_manifest_is_compared_by_time(predicted: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, None)
    shutil.copytree(local.root, dest)
    assert predicted(MODULE, **local.options, dest=dest)["files"] == 0
    assert content(dest) == ONE and len(inventory(dest)) == 1


def test_how_many_are_kept(predicted: Run, local: Source, dest: Path) -> None:
    for number in range(1, 6):
        local.publish({"n": b"%d" % number, "same": b"same"}, f"r{number}")
        result = predicted(MODULE, **local.options, dest=dest, keep=3)
    assert inventory(dest) == ["r3", "r4", "r5"] and result["releases"] == ["r5", "r4", "r3"]
    assert (dest / "same").stat().st_nlink == 3
    fewer = predicted(MODULE, **local.options, dest=dest, keep=1)
    assert fewer["changed"] and inventory(dest) == ["r4", "r5"]
    back = predicted(MODULE, **local.options, dest=dest, revision="r4", keep=1)
    assert (back["revision"], back["previous_revision"], back["files"]) == ("r4", "r5", 0)


def test_owner_group_and_mode(predicted: Run, run: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    assert predicted(MODULE, **local.options, dest=dest, owner="nobody", group="nogroup")["changed"]
    for path in (dest.resolve(), *dest.resolve().rglob("*")):
        status = path.stat()
        assert (path.owner(), path.group()) == ("nobody", "nogroup")
        assert stat.S_IMODE(status.st_mode) == (0o750 if path.is_dir() else 0o640)
    changed = predicted(MODULE, **local.options, dest=dest, owner="0", mode="0755")
    assert "set owner, group or mode" in changed["plan"][0] and len(changed["plan"]) == 1
    assert (dest / "base").owner() == "root" and stat.S_IMODE((dest / "base").stat().st_mode) == 0o755
    assert stat.S_IMODE((dest / "base/config.json").stat().st_mode) == 0o644
    assert "does not exist on this host" in run(MODULE, **local.options, dest=dest, owner="nosuchuser")["msg"]
    assert "octal" in run(MODULE, **local.options, dest=dest, mode="rwx")["msg"]


def test_a_revision_is_asked_for(predicted: Run, run: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    said = predicted(MODULE, **local.options, dest=dest, revision="r2")
    assert "has revision r1, not r2" in said["msg"] and not dest.exists() and list(dest.parent.iterdir()) == []
    run(MODULE, **local.options, dest=dest, revision="r1")
    local.publish(TWO, "r1")
    assert run(MODULE, **local.options, dest=dest, revision="r1")["changed"] is False
    assert "under another revision" in predicted(MODULE, **local.options, dest=dest)["msg"]
    local.clear()
    assert run(MODULE, **local.options, dest=dest, revision="r1")["changed"] is False, "the source is not asked"


HOSTILE: dict[str, tuple[str, str]] = {
    "absolute": ("/etc/cron.d/x", "is not a path that may be written"),
    "up": ("../../x", "is not a path that may be written"),
    "up within": ("a/../../x", "is not a path that may be written"),
    "dot": ("./x", "is not a path that may be written"),
    "empty": ("", "is not a path that may be written"),
    "control": ("a\nb", "is not a path that may be written"),
    "nul": ("a\0b", "is not a path that may be written"),
    "surrogate": ("a\udcff", "is not a path that may be written"),
    "long": ("x" * 300, "is not a path that may be written"),
    "itself": ("manifest.json", "is not a manifest"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_hostile_names_in_a_manifest(run: Run, local: Source, dest: Path, case: str) -> None:
    path, said = HOSTILE[case]
    local.publish(ONE, "r1")
    local.put("manifest.json", manifest("r1", {**ONE, path: b"x"}))
    assert said in run(MODULE, **local.options, dest=dest)["msg"]
    assert list(dest.parent.iterdir()) == []


BROKEN: dict[str, tuple[bytes, str]] = {
    "no json": (b"{", "is not a manifest"),
    "no object": (b"[]", "is not a manifest"),
    "deep": (b"[" * 100_000, "is not a manifest"),
    "size": (b'{"revision": "r", "files": [{"path": "a", "size": -1, "sha256": "' + b"0" * 64 + b'"}]}', "file a"),
    "hash": (b'{"revision": "r", "files": [{"path": "a", "size": 1, "sha256": "x"}]}', "file a"),
    "path": (manifest("r", {"a": b""})[:-2] + b', {"path": 5, "size": 0, "sha256": "' + b"0" * 64 + b'"}]}', "file 5"),
    "no files": (b'{"revision": "r", "files": []}', "there are no files"),
    "revision": (manifest("../r", {"a": b""}), "is not a name such as"),
    "reserved": (manifest("r.partial", {"a": b""}), "is not a name such as"),
    "twice": (manifest("r", {"a": b""})[:-2] + b"," + manifest("r", {"a": b""})[28:], "is there twice"),
    "file in file": (manifest("r", {"a": b"", "a/b": b""}), "a is a file and a directory"),
    "not there": (manifest("r", {"nothing": b"x"}), "there is no such file"),
    "other size": (manifest("r", {"base/config.json": b"x"}), "but there is 8 bytes"),
    "large": (b" " * (16 * MIB + 1), "too much for a manifest"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_manifests(predicted: Run, local: Source, dest: Path, case: str) -> None:
    text, said = BROKEN[case]
    local.publish(ONE, None)
    local.put("manifest.json", text)
    assert said in predicted(MODULE, **local.options, dest=dest)["msg"]
    assert list(dest.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "directory link", "fifo", "control", "not utf-8", "backslash"])
def test_what_is_no_plain_file_at_the_source(predicted: Run, remote: Source, dest: Path, kind: str) -> None:
    remote.publish(ONE, None)
    odd = {"control": "a\nb", "not utf-8": os.fsdecode(b"a\xff"), "backslash": "a\\#012b"}
    if kind in odd:
        remote.put(odd[kind], b"x")
    elif kind == "fifo":
        os.mkfifo(remote.root / "odd")
    else:
        (remote.root / "odd").symlink_to("/etc/passwd" if kind == "link" else "/etc")
    said = predicted(MODULE, **remote.options, dest=dest)
    words = {"link": "Publish the files", "directory link": "Publish the files", "fifo": "Publish the files"}
    words["not utf-8"] = "not a path that may be written"
    assert words.get(kind, "no name should have") in said["msg"]
    assert list(dest.parent.iterdir()) == []


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown host": ({"known_hosts": "{tmp}/other_hosts"}, "pin it in known_hosts"),
    "changed host": ({"known_hosts": "{tmp}/changed_hosts"}, "somebody else answers"),
    "wrong key": ({"ssh_key": "{tmp}/other_key"}, "authorized_keys"),
    "no key": ({"ssh_key": "{tmp}/nothing"}, "cannot be read"),
    "odd key": ({"ssh_key": "/a b"}, "is not a path of letters"),
    "no source": ({"src": "root@127.0.0.1:/nonexistent/x"}, "correct src"),
    "nobody there": ({"ssh_port": 1}, "can this host reach it?"),
    "no port": ({"ssh_port": 70000}, "is not a port"),
    "injection": ({"src": "root@127.0.0.1:/x;touch {tmp}/pwned"}, "is not host:/path"),
    "option": ({"src": "-oProxyCommand=touch@x:/x"}, "is not host:/path"),
    "relative": ({"src": "host:x"}, "is not host:/path"),
    "no prefix": ({"src": "s3://bucket"}, "is not s3://bucket/prefix"),
    "no src": ({"src": None}, "src"),
    "keep": ({"keep": 0}, "at least 1"),
    "revision": ({"revision": "../x"}, "is not a name such as"),
    "dest": ({"dest": "relative"}, "is not an absolute path"),
    "dest name": ({"dest": "/data/.releases"}, "is not an absolute path"),
    "no parent": ({"dest": "/nonexistent/models/gemma"}, "mount its disk, or make it"),
    "mount point": ({"dest": "/proc"}, "is a mount point"),
    "file": ({"dest": "/etc/passwd"}, "is neither a directory nor a link"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_wrong_is_said_with_what_to_do(
    predicted: Run, remote: Source, dest: Path, tmp_path: Path, wrong: str
) -> None:
    remote.publish(ONE, "r1")
    (tmp_path / "other_hosts").write_text(f"example.org {make_key(tmp_path / 'other_key')}\n")
    key = (tmp_path / "other_key.pub").read_text()
    (tmp_path / "changed_hosts").write_text(f"[127.0.0.1]:{remote.options['ssh_port']} {key}")
    changes, said = WRONG[wrong]
    options = {**remote.options, "dest": dest}
    options |= {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    result = predicted(MODULE, **{k: v for k, v in options.items() if v is not None})
    assert said in result["msg"], result
    assert list(dest.parent.iterdir()) == [] and not (tmp_path / "pwned").exists()


def test_source_and_dest_lie_apart(predicted: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    before = sorted(local.root.rglob("*"))
    for src, to in ((local.root, local.root), (local.root, local.root / "in"), (local.root / "base", local.root)):
        assert "lie within each other" in predicted(MODULE, src=src, dest=to)["msg"]
    file = local.root / "base/weights-1.safetensors"
    assert f"src {file} is not a directory" in predicted(MODULE, src=file, dest=dest)["msg"]
    assert sorted(local.root.rglob("*")) == before


def test_nothing_in_the_store(predicted: Run, bucket: Bucket, dest: Path) -> None:
    assert "has no objects" in predicted(MODULE, **bucket.options, dest=dest)["msg"]
    bucket.publish(ONE, "r1")
    bucket.put("base/", b"")  # as some clients show a directory
    wrong_key = {**bucket.options, "secret_key": "wrong"}
    assert "check secret_key" in predicted(MODULE, **wrong_key, dest=dest)["msg"]
    assert predicted(MODULE, **bucket.options, dest=dest)["changed"] and content(dest) == ONE


def test_hashes_of_the_store_are_used_without_a_manifest(predicted: Run, bucket: Bucket, dest: Path) -> None:
    bucket.put("a", b"same", sha256=sha256(b"same"))
    bucket.put("b", b"other", sha256=sha256(b"other"))
    dest.mkdir()
    (dest / "a").write_bytes(b"same")
    assert predicted(MODULE, **bucket.options, dest=dest)["files"] == 1


def test_dest_that_is_another_s(predicted: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    dest.symlink_to("/etc")
    for state in ("present", "rolled_back", "absent"):
        assert "did not make" in predicted(MODULE, **local.options, dest=dest, state=state)["msg"]
    dest.unlink()
    dest.mkdir()
    assert "remove it by hand" in predicted(MODULE, dest=dest, state="absent")["msg"]
    assert "without releases" in predicted(MODULE, dest=dest, state="rolled_back")["msg"]
    dest.rmdir()
    assert "no previous release" in predicted(MODULE, dest=dest, state="rolled_back")["msg"]
    predicted_unchanged(predicted, dest=dest, state="absent")


def test_a_damaged_previous_release_is_not_gone_back_to(predicted: Run, run: Run, local: Source, dest: Path) -> None:
    for number, files in ((1, ONE), (2, TWO)):
        local.publish(files, f"r{number}")
        run(MODULE, **local.options, dest=dest)
    previous = dest.parent / ".releases/gemma/r1"
    (previous / "base/weights-2.safetensors").write_bytes(b"y" * 400_000)
    assert "the previous release is damaged" in predicted(MODULE, dest=dest, state="rolled_back")["msg"]
    assert content(dest) == TWO
    (previous / "manifest.json").unlink()
    assert "is no manifest of it" in predicted(MODULE, dest=dest, state="rolled_back")["msg"]
    shutil.rmtree(previous)
    assert "no previous release" in predicted(MODULE, dest=dest, state="rolled_back")["msg"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MiB."""
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", tmp_path / "small"], check=True)
    yield tmp_path / "small"
    subprocess.run(["umount", tmp_path / "small"], check=True)


def test_room_is_looked_for_first(predicted: Run, run: Run, source: Source, small: Path) -> None:
    source.publish({"a": b"a" * MIB, "large": b"x" * 4 * MIB}, "r1")
    said = predicted(MODULE, **source.options, dest=small / "gemma")
    assert "bytes free" in said["msg"] and "make room" in said["msg"] and list(small.iterdir()) == []
    source.publish({"a": b"a" * MIB}, "r1")
    assert predicted(MODULE, **source.options, dest=small / "gemma")["changed"]
    # What is here already needs no room.
    source.publish({"a": b"a" * MIB, "b": b"b" * MIB}, "r2")
    assert predicted(MODULE, **source.options, dest=small / "gemma")["bytes"] == MIB
    # What a killed run left counts as room.
    left = small / ".releases" / "gemma" / "r0.123.partial"
    left.mkdir()
    (left / "a").write_bytes(b"z" * MIB)
    spare = small / ".releases" / "gemma" / ".spare"
    spare.mkdir()
    (spare / "b").write_bytes(b"z" * MIB)
    source.publish({"c": b"c" * MIB}, "r3")
    assert predicted(MODULE, **source.options, dest=small / "gemma", keep=1)["bytes"] == MIB


def test_a_quarantine_does_not_take_the_room_of_what_is_right(run: Run, local: Source, small: Path) -> None:
    local.publish({"a": b"a" * 3 * MIB}, "r1")
    local.put("a", b"y" * 3 * MIB)
    for _time in range(2):
        assert "a has the SHA-256" in run(MODULE, **local.options, dest=small / "gemma")["msg"]
    assert inventory(small / "gemma").count("quarantine-r1") == 1
    local.publish({"a": b"a" * 3 * MIB}, "r2")
    assert run(MODULE, **local.options, dest=small / "gemma")["changed"] and inventory(small / "gemma") == ["r2"]


def test_what_may_go_is_named_where_there_is_no_room(predicted: Run, local: Source, small: Path) -> None:
    for number in (1, 2):
        local.publish({"a": b"%d" % number * MIB}, f"r{number}")
        predicted(MODULE, **local.options, dest=small / "gemma")
    local.publish({"a": b"3" * (2 * MIB + MIB // 2)}, "r3")
    said = predicted(MODULE, **local.options, dest=small / "gemma", keep=1)
    old = small / ".releases/gemma/r1"
    assert said["msg"].endswith(f"make room; {small}/gemma can do without {old}")
    shutil.rmtree(old)
    assert predicted(MODULE, **local.options, dest=small / "gemma", keep=1)["changed"]


def shim(directory: Path, before: str = "", after: str = "") -> dict[str, str]:
    """An environment with an rsync that runs a line of shell before or after it copies."""
    directory.mkdir()
    program = directory / "rsync"
    copies = 'case "$*" in *files-from*) {};; esac\n'
    steps = [copies.format(before or ":"), f'{shutil.which("rsync")} "$@"\ncode=$?\n', copies.format(after or ":")]
    program.write_text("#!/bin/sh\n" + "".join(steps) + "exit $code\n")
    program.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_a_disk_that_fills_up_meanwhile(run: Run, remote: Source, small: Path, tmp_path: Path) -> None:
    remote.publish({"a": b"a" * MIB, "b": b"b" * MIB}, "r1")
    env = shim(tmp_path / "bin", before=f"head -c 4M /dev/zero >{small}/ballast")
    said = run(MODULE, env=env, **remote.options, dest=small / "gemma")
    assert "make room" in said["msg"] and "No space left" in said["msg"] and not (small / "gemma").exists()
    (small / "ballast").unlink()
    assert run(MODULE, **remote.options, dest=small / "gemma")["changed"]


def test_a_disk_that_cannot_be_written(run: Run, local: Source, small: Path) -> None:
    local.publish(ONE, "r1")
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    said = run(MODULE, **local.options, dest=small / "gemma")
    assert "Read-only file system" in said["msg"] and said["plan"]


def test_two_runs_at_once(run: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    run(MODULE, **local.options, dest=dest)
    held = os.open(dest.parent / ".releases/gemma", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "another run is at work" in run(MODULE, **local.options, dest=dest)["msg"]
    waiting = threading.Timer(1.0, os.close, (held,))
    waiting.start()
    assert run(MODULE, **local.options, dest=dest)["changed"] is False, "it waits a little"
    waiting.join()


def test_a_copy_that_broke_off_goes_on(run: Run, local: Source, dest: Path) -> None:
    local.publish(ONE, "r1")
    local.put("base/weights-2.safetensors", b"y" * 400_000)
    assert run(MODULE, **local.options, dest=dest)["failed"]
    (partial,) = (dest.parent / ".releases/gemma").glob("*.partial")
    # Strays that a killed run can leave, and what somebody else put there
    (partial / "base" / ".weights-2.safetensors.Ab12Cd").write_bytes(b"half")
    (partial / "cope-a" / "Zürich.bin").write_bytes(b"z" * 5000)
    (partial / "out").symlink_to("/etc")
    local.put("base/weights-2.safetensors", ONE["base/weights-2.safetensors"])
    went_on = run(MODULE, **local.options, dest=dest)
    assert went_on["files"] == 2 and content(dest.resolve()) == ONE and inventory(dest) == ["r1"]


def test_a_source_that_changes_meanwhile(run: Run, local: Source, dest: Path, tmp_path: Path) -> None:
    local.publish(ONE, None)
    env = shim(tmp_path / "bin", after=f"echo >>{local.root}/base/config.json")
    said = run(MODULE, env=env, **local.options, dest=dest)
    assert "was changed while it was copied" in said["msg"] and not dest.exists()
    assert run(MODULE, **local.options, dest=dest)["changed"]
    assert content(dest) == {**ONE, "base/config.json": ONE["base/config.json"] + b"\n"} and len(inventory(dest)) == 1


@pytest.mark.parametrize("missing", ["rsync", "ssh"])
def test_a_missing_program_is_named(run: Run, remote: Source, dest: Path, tmp_path: Path, missing: str) -> None:
    remote.publish(ONE, "r1")
    # Ansible looks in /sbin and its like too, so they must not have it either.
    if any(Path(folder, missing).exists() for folder in ("/sbin", "/usr/sbin", "/usr/local/sbin")):
        cannot_run(f"{missing} is in /usr/sbin")
    (tmp_path / "bin").mkdir()
    if missing == "ssh":
        (tmp_path / "bin" / "rsync").symlink_to(shutil.which("rsync") or "")
    said = run(MODULE, env={"PATH": str(tmp_path / "bin")}, **remote.options, dest=dest)
    assert f"{missing} is not installed on this host" in said["msg"]


class Reader(threading.Thread):
    """A worker that opens the model all the time. `half`: what was no whole model; `seen`: how many were."""

    def __init__(self, dest: Path) -> None:
        super().__init__(daemon=True)
        self.dest, self.seen, self.end = dest, 0, threading.Event()
        self.half: list[str] = []

    def run(self) -> None:
        while not self.end.wait(0.01):
            here = self.target()
            if here is None:
                continue
            problem = self.look(self.dest.parent / here)
            if problem and self.target() == here:
                self.half.append(problem)
            self.seen += not problem

    def target(self) -> str | None:
        """Where dest points, or its own name if it is a directory."""
        if self.dest.is_symlink():
            return str(self.dest.readlink())
        return self.dest.name if self.dest.is_dir() else None

    def look(self, top: Path) -> str:
        try:
            said = json.loads((top / "manifest.json").read_bytes())
            for one in said["files"]:
                if sha256((top / one["path"]).read_bytes()) != one["sha256"]:
                    return f"{one['path']} of {said['revision']} is not right"
        except (OSError, ValueError) as error:
            return f"{top}: {error}"
        return ""


@pytest.mark.timeout(300 + 15 * KILLS)
def test_killed_at_any_moment_no_half_model_is_seen(
    run: Run, local: Source, remote: Source, bucket: Bucket, dest: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    dice = random.Random(seed)
    common = {f"same-{n}": dice.randbytes(500_000) for n in range(5)}

    def new_files() -> Files:
        return {**common, **{f"d{n}/new": dice.randbytes(dice.randrange(2 * MIB)) for n in range(5)}}

    sources = [local, remote, bucket]
    took = {one.options["src"]: 1.0 for one in sources}
    reader = Reader(dest)
    reader.start()
    killed = number = 0
    while killed < KILLS:
        number += 1
        assert number < 4 * KILLS, f"only {killed} of {number} runs were killed before their end"
        source = sources[number % 3]
        revision, files = f"r{number}", new_files()
        source.publish(files, revision)
        if number % 4 == 3:  # an operator's own copy is in the place of the link
            own = tmp_path / "own"
            shutil.copytree(dest.resolve(), own)
            if dice.random() < 0.5:
                (own / "notes").write_text("mine")
            for found in (dest.parent / ".releases/gemma").glob("found-*"):
                shutil.rmtree(found)
            run(MODULE, state="absent", dest=dest)
            own.rename(dest)
        state = "rolled_back" if number % 7 == 6 else "present"
        arguments = write_arguments(tmp_path / "arguments.json", {**source.options, "dest": dest, "state": state})
        child = subprocess.Popen(command(MODULE, arguments), env=environment(), stdout=subprocess.DEVNULL)
        try:
            child.wait(took[source.options["src"]] * dice.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            killed += 1
        child.send_signal(signal.SIGKILL)
        child.wait()
        if dice.random() < 0.4:  # what was begun is not wanted any more
            revision, files = f"r{number}-again", new_files()
            source.publish(files, revision)
        begun = time.monotonic()
        after = run(MODULE, **source.options, dest=dest)
        took[source.options["src"]] = time.monotonic() - begun
        assert after.get("failed") is None and after["revision"] == revision, after
        assert content(dest) == files
        assert run(MODULE, **source.options, dest=dest)["changed"] is False
        assert sorted(after["releases"]) == inventory(dest), "strays"
        assert {path.name for path in dest.parent.iterdir()} == {"gemma", ".releases"}
    reader.end.set()
    reader.join()
    print(f"{killed} of {number} killed before their end; {reader.seen} whole models seen, {len(reader.half)} half")
    assert reader.half == [] and reader.seen > 0


def test_through_ansible_itself(remote: Source, dest: Path) -> None:
    remote.publish(ONE, "r1")
    options = {name: str(value) for name, value in remote.options.items()} | {"dest": str(dest)}
    ansible = [sys.executable, "-m", "ansible", "adhoc", "localhost", "-c", "local", "-m", "lab.audio.model_sync"]
    env = environment(ANSIBLE_COLLECTIONS_PATH=str(CHECKOUT / "collections"), ANSIBLE_PYTHON_INTERPRETER=PYTHON)
    for more, changed in ((["--check", "--diff"], "true"), (["--diff"], "true"), ([], "false")):
        done = subprocess.run([*ansible, "-a", json.dumps(options), *more], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and f'"changed": {changed}' in done.stdout, done.stdout + done.stderr
    assert content(dest) == ONE
