"""lab.audio.s3_archive against SeaweedFS and Swift 2.30 over TLS."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from needed import needed

from conftest import CHECKOUT, PYTHON, Run, command, environment, write_arguments
from proxy import Cut, Proxy
from seaweedfs import SeaweedFS
from swift import Swift

MODULE = "s3_archive"
MIB = 1 << 20
BATCH = "20250622-143052-a1b2c3"
ARCHIVE = f"archives/{BATCH}.tar"
KILLS = int(os.environ.get("KILLS", "20"))


@pytest.fixture(scope="module", params=[SeaweedFS, Swift], ids=["seaweedfs", "swift-tls"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with ExitStack() as stack:
        with needed():
            running = stack.enter_context(request.param(tmp_path_factory.mktemp("store")))
        yield running


class Bucket:
    """A bucket of this test's own, the client that looks into it, and the module's options for it."""

    def __init__(self, server: Any) -> None:
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.options = {
            "endpoint_url": server.endpoint,
            "access_key": server.access_key,
            "secret_key": server.secret_key,
            "bucket": self.name,
            "ca_bundle": server.ca_bundle,
        }
        self.s3 = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
            verify=str(server.ca_bundle) if server.ca_bundle else None,
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self.s3.create_bucket(Bucket=self.name)

    def put(self, key: str, data: bytes, **metadata: str) -> None:
        self.s3.put_object(Bucket=self.name, Key=key, Body=data, Metadata=metadata)

    def get(self, key: str) -> bytes:
        data: bytes = self.s3.get_object(Bucket=self.name, Key=key)["Body"].read()
        return data

    def keys(self) -> list[str]:
        return [one["Key"] for one in self.s3.list_objects_v2(Bucket=self.name).get("Contents", ())]

    def uploads(self) -> list[str]:
        return [one["Key"] for one in self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", ())]


@pytest.fixture
def bucket(server: Any) -> Bucket:
    return Bucket(server)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 16 * MIB, 16 * MIB + 1, 40 * MIB])
def test_a_file_goes_there_and_back(predicted: Run, bucket: Bucket, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "a.tar").write_bytes(data)
    stored = predicted(MODULE, **bucket.options, batch_id=BATCH, src=tmp_path / "a.tar")
    assert (stored["changed"], stored["key"], stored["size"], stored["sha256"]) == (True, ARCHIVE, size, sha256(data))
    assert sha256(bucket.get(ARCHIVE)) == sha256(data)
    head = bucket.s3.head_object(Bucket=bucket.name, Key=ARCHIVE)
    assert (head["ETag"].strip('"'), head["Metadata"]["sha256"]) == (stored["etag"], sha256(data))
    back = predicted(MODULE, **bucket.options, state="fetched", batch_id=BATCH, dest=tmp_path / "back.tar")
    assert (back["dest"], back["sha256"]) == (str(tmp_path / "back.tar"), sha256(data))
    assert sha256((tmp_path / "back.tar").read_bytes()) == sha256(data)
    gone = predicted(MODULE, **bucket.options, state="absent", batch_id=BATCH)
    assert gone["changed"] and bucket.keys() == [] and bucket.uploads() == []


def make_directory(path: Path) -> dict[str, bytes]:
    """Files whose names and depths a tar finds hard; what is in each, by its path."""
    files = {
        "b.txt": b"b" * 513,
        "a/a.txt": b"",
        "a/Zürich/ü.txt": b"x" * 512,
        "a/" + "n" * 120 + "/" + "m" * 140: b"long",
        os.fsdecode(b"a/not-utf8-\xff"): b"bytes",
    }
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    (path / "empty").mkdir(exist_ok=True)
    return files


def test_a_directory_becomes_the_same_tar_wherever_it_lies(predicted: Run, bucket: Bucket, tmp_path: Path) -> None:
    files = make_directory(tmp_path / "one")
    make_directory(tmp_path / "two")
    for number, path in enumerate(sorted((tmp_path / "two").rglob("*"))):
        os.utime(path, (number, number))
        path.chmod(0o700)
    first = predicted(MODULE, **bucket.options, key="models/p.tar", src=tmp_path / "one")
    assert first["changed"] and first["size"] == len(bucket.get("models/p.tar"))
    with tarfile.open(fileobj=io.BytesIO(bucket.get("models/p.tar"))) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == files  # type: ignore[union-attr]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
        names = [os.fsencode(m.name) for m in tar]
        assert names == sorted(names)
    again = predicted(MODULE, **bucket.options, key="models/q.tar", src=tmp_path / "two")
    assert again["sha256"] == first["sha256"]


def test_what_is_no_regular_file_in_a_directory_is_refused(predicted: Run, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to("/etc/shadow")
    said = predicted(MODULE, **bucket.options, key="x.tar", src=tmp_path / "d")
    assert "link is neither a file nor a directory" in said["msg"] and bucket.keys() == []
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file" in predicted(MODULE, **bucket.options, key="x.tar", src=tmp_path / "fifo")["msg"]
    assert "No such file" in predicted(MODULE, **bucket.options, key="x.tar", src=tmp_path / "nothing")["msg"]


def test_an_archive_is_never_replaced_and_other_objects_are(predicted: Run, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    bucket.put(ARCHIVE, b"old")
    bucket.put("models/x", b"old")
    said = predicted(MODULE, **bucket.options, batch_id=BATCH, src=tmp_path / "new")
    assert "an archive is never replaced" in said["msg"] and bucket.get(ARCHIVE) == b"old"
    replaced = predicted(MODULE, **bucket.options, key="models/x", src=tmp_path / "new")
    assert replaced["diff"]["before"] == {"models/x": {"size": 3, "sha256": None}} and bucket.get("models/x") == b"new"


def test_an_object_of_another_client_is_read_to_be_compared(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"same")
    bucket.put(ARCHIVE, b"same")
    assert run(MODULE, **bucket.options, batch_id=BATCH, src=tmp_path / "a")["changed"] is False
    fetched = run(MODULE, **bucket.options, state="fetched", batch_id=BATCH, dest=tmp_path / "a")
    assert (fetched["changed"], fetched["sha256"]) == (False, sha256(b"same"))
    (tmp_path / "a").write_bytes(b"else")
    fetched = run(MODULE, **bucket.options, state="fetched", batch_id=BATCH, dest=tmp_path / "a")
    assert fetched["changed"] and (tmp_path / "a").read_bytes() == b"same"


def test_an_object_that_is_not_what_was_stored_is_not_fetched(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    bucket.put(ARCHIVE, b"damaged", sha256=sha256(b"whole"))
    (tmp_path / "a").write_bytes(b"before")
    said = run(MODULE, **bucket.options, state="fetched", batch_id=BATCH, dest=tmp_path / "a")
    assert "damaged in the store" in said["msg"]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".json"] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_where_it_is_fetched_to(predicted: Run, run: Run, bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("models/x.tar", b"x")
    (tmp_path / "d").mkdir()
    fetched = predicted(MODULE, **bucket.options, state="fetched", key="models/x.tar", dest=tmp_path / "d")
    assert fetched["dest"] == str(tmp_path / "d" / "x.tar")
    for dest, said in ((tmp_path / "no" / "x", "make it first"), (tmp_path / "fifo", "is not a file")):
        if not (tmp_path / "fifo").exists():
            os.mkfifo(tmp_path / "fifo")
        assert said in predicted(MODULE, **bucket.options, state="fetched", key="models/x.tar", dest=dest)["msg"]
    assert "is not in the store" in run(MODULE, **bucket.options, state="fetched", key="none", dest=tmp_path)["msg"]


def test_others_may_read_what_is_fetched_only_where_they_could_before(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("x", b"new")
    (tmp_path / "before").write_bytes(b"old")
    (tmp_path / "before").chmod(0o640)
    (tmp_path / "new.part").touch(0o644)  # a killed run's, of whatever mode
    for name, mode in (("new", 0o600), ("before", 0o640)):
        run(MODULE, **bucket.options, state="fetched", key="x", dest=tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new" and (tmp_path / name).stat().st_mode & 0o777 == mode


def test_absent_removes_unfinished_uploads_too(predicted: Run, bucket: Bucket) -> None:
    bucket.s3.create_multipart_upload(Bucket=bucket.name, Key="models/x")
    bucket.s3.create_multipart_upload(Bucket=bucket.name, Key="models/xy")
    gone = predicted(MODULE, **bucket.options, state="absent", key="models/x")
    assert gone["plan"] == ["abort unfinished uploads of models/x: 1"] and bucket.uploads() == ["models/xy"]


def test_memory_does_not_follow_the_size_of_a_file(bucket: Bucket, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(300 * MIB)
    options = {**bucket.options, "key": "large"}
    # A small process between: Linux counts what the parent has as its child's maximum, and this one has much.
    between = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    for more in ({"src": tmp_path / "large"}, {"state": "fetched", "dest": tmp_path / "back"}):
        arguments = write_arguments(tmp_path / "arguments.json", {**options, **more})
        run_it = [sys.executable, "-c", between, *command(MODULE, arguments)]
        done = subprocess.run(run_it, env=environment(), capture_output=True, text=True, check=True)
        result, maximum = (json.loads(line) for line in done.stdout.split("\n")[-3:-1])
        assert result["changed"], result
        print(f"{more.get('state', 'present')}: {maximum} KiB")
        assert maximum * 1024 < 150_000_000


@pytest.mark.timeout(300 + 15 * KILLS)
def test_killed_at_any_moment_the_next_run_ends_well(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    dice = random.Random(seed)
    data = dice.randbytes(33 * MIB)
    (tmp_path / "a").write_bytes(data)
    there = {**bucket.options, "batch_id": BATCH, "src": tmp_path / "a"}
    back = {**bucket.options, "batch_id": BATCH, "state": "fetched", "dest": tmp_path / "back"}
    for number in range(KILLS):
        wanted = (there, back)[number % 2]
        if wanted is back:
            (tmp_path / "back").unlink(missing_ok=True)
        arguments = write_arguments(tmp_path / "arguments.json", wanted)
        child = subprocess.Popen(command(MODULE, arguments), env=environment(), stdout=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.2, 2.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (tmp_path / "back").exists():
            assert sha256((tmp_path / "back").read_bytes()) == sha256(data), "half an object is visible"
        assert run(MODULE, **wanted).get("failed") is None
        assert run(MODULE, **wanted)["changed"] is False
        assert bucket.uploads() == [] and not (tmp_path / "back.part").exists()
        if wanted is back:
            assert sha256((tmp_path / "back").read_bytes()) == sha256(data)
            run(MODULE, **bucket.options, batch_id=BATCH, state="absent")
            if number + 1 < KILLS:
                continue
    assert bucket.keys() in ([], [ARCHIVE])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "secret": ({"secret_key": "wrong-sesame"}, "check secret_key"),
    "access key": ({"access_key": "nobody"}, "check access_key"),
    "bucket": ({"bucket": "no-such-bucket"}, "does not exist: create it, or correct its name"),
    "port": ({"endpoint_url": "http://127.0.0.1:1"}, "is endpoint_url right"),
    "no directory": ({"access_key": None, "credentials_directory": "/nonexistent"}, "/nonexistent is not a directory"),
    "no address": ({"endpoint_url": "http://[x"}, "endpoint_url must be a URL"),
    "no name": ({"endpoint_url": "http://a b"}, "endpoint_url or region cannot be used"),
    "region": ({"region": "a b"}, "endpoint_url or region cannot be used"),
    "no url": ({"endpoint_url": "swift.example.edu"}, "endpoint_url must be a URL"),
    "url with a secret": ({"endpoint_url": "http://u:wrong-sesame@x"}, "without credentials"),
    "ca": ({"ca_bundle": "/nonexistent"}, "is not a file"),
    "batch": ({"batch_id": "../x", "key": None}, "YYYYMMDD"),
    "key": ({"key": "/etc/x"}, "is not a name"),
    "no keys": ({"access_key": None}, "not given: access_key (or S3_ACCESS_KEY"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_wrong_is_said_with_what_to_do(run: Run, bucket: Bucket, tmp_path: Path, wrong: str) -> None:
    changes, said = WRONG[wrong]
    (tmp_path / "a").write_bytes(b"x")
    options = {**bucket.options, "key": "a", "src": tmp_path / "a", **changes}
    result = run(MODULE, **{name: value for name, value in options.items() if value is not None})
    assert said in result["msg"] or (wrong in ("secret", "access key") and "check access_key" in result["msg"]), result
    assert "wrong-sesame" not in json.dumps(result)


@pytest.mark.parametrize("server", [Swift], ids=["swift-tls"], indirect=True)
def test_a_certificate_that_nobody_vouches_for(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    said = run(MODULE, **{**bucket.options, "ca_bundle": None}, key="a", src=tmp_path / "a")
    assert "set ca_bundle" in said["msg"]


def test_secrets_come_from_files(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    options = dict(bucket.options)
    (tmp_path / "s3_access_key").write_text(options.pop("access_key") + "\n")
    (tmp_path / "s3_secret_key").write_text(options.pop("secret_key") + "\n")
    (tmp_path / "a").write_bytes(b"x")
    result = run(MODULE, **options, credentials_directory=tmp_path, key="a", src=tmp_path / "a")
    assert result["changed"] and bucket.options["secret_key"] not in json.dumps(result)
    (tmp_path / "s3_access_key").unlink()
    (tmp_path / "s3_access_key").mkdir()
    said = run(MODULE, **options, credentials_directory=tmp_path, key="a", src=tmp_path / "a")
    assert "cannot be read" in said["msg"]


@pytest.mark.parametrize(("size", "call"), [(MIB, "PutObject"), (33 * MIB, "UploadPart")])
def test_what_is_damaged_on_the_way_is_noticed_and_replaces_nothing(
    run: Run, server: Any, bucket: Bucket, tmp_path: Path, size: int, call: str
) -> None:
    (tmp_path / "a").write_bytes(b"a" * size)
    run(MODULE, **bucket.options, key="a", src=tmp_path / "a")
    (tmp_path / "a").write_bytes(b"b" * size + b"\0")
    with Proxy(server) as proxy:
        proxy.on_request = lambda block: block.replace(b"\0", b"\1")
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None, "key": "a"}
        said = run(MODULE, **options, src=tmp_path / "a")
    assert said["failed"] and f"{call} {proxy.endpoint}/{bucket.name}/a: 4" in said["msg"], said
    assert sha256(bucket.get("a")) == sha256(b"a" * size) and bucket.uploads() == []


def test_what_another_run_stored_meanwhile_is_left(run: Run, server: Any, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    ours, others = ([sha256(d).encode(), hashlib.md5(d).hexdigest().encode()] for d in (b"a", b"b"))
    with Proxy(server) as proxy:
        proxy.on_reply = lambda block: block.replace(ours[0], others[0]).replace(ours[1], others[1])
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None, "key": "a"}
        said = run(MODULE, **options, src=tmp_path / "a")
    assert "another run has stored something else there" in said["msg"] and bucket.keys() == ["a"]


@pytest.mark.parametrize("size", [MIB, 33 * MIB])
def test_what_the_store_holds_is_compared(run: Run, server: Any, bucket: Bucket, tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(b"a" * size)
    etag = run(MODULE, **bucket.options, key="b", src=tmp_path / "a")["etag"].encode()
    with Proxy(server) as proxy:
        proxy.on_reply = lambda block: block.replace(etag, etag[:32][::-1] + etag[32:])
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None, "key": "a"}
        said = run(MODULE, **options, src=tmp_path / "a")
    assert "damaged on the way; it is deleted" in said["msg"], said
    assert bucket.keys() == ["b"]


@pytest.mark.parametrize("size", [1 << 20, 17 << 20])
def test_an_answer_without_an_etag_is_no_answer(
    run: Run, server: Any, bucket: Bucket, tmp_path: Path, size: int
) -> None:
    """Of something before the store that says 200 for nothing: of one PUT, and of a part."""
    (tmp_path / "a").write_bytes(bytes(size))
    with Proxy(server) as proxy:
        proxy.on_reply = lambda block: re.sub(rb"(?i)\r\netag:", b"\r\nx-tag:", block)
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None, "key": "a"}
        said = run(MODULE, **options, src=tmp_path / "a")
    assert "the answer has no ETag; is that the store's answer?" in said["msg"], said


@pytest.mark.parametrize("when", ["soon", "Fri, 2" + 36 * "0"])
def test_an_answer_that_cannot_be_understood_is_no_answer(
    run: Run, server: Any, bucket: Bucket, tmp_path: Path, when: str
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    run(MODULE, **bucket.options, key="a", src=tmp_path / "a")
    with Proxy(server) as proxy:
        dated = f"\r\nLast-Modified: {when}".encode()
        proxy.on_reply = lambda block: re.sub(rb"(?i)\r\nlast-modified:[^\r]*", dated, block)
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None, "key": "a"}
        said = run(MODULE, **options, src=tmp_path / "a")
    assert when in said["msg"] and "is that the store's answer?" in said["msg"], said


@pytest.mark.parametrize("size", [MIB, 33 * MIB])
@pytest.mark.parametrize("src", ["d", "d/a"])
def test_what_changes_while_it_is_read_is_not_stored(
    run: Run, server: Any, bucket: Bucket, tmp_path: Path, size: int, src: str
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"a" * size)

    def change(block: bytes) -> bytes:
        if block.startswith(b"HEAD"):  # the first pass is done
            (tmp_path / "d" / "a").write_bytes(b"a" * (size - 1) + b"b")
        return block

    with Proxy(server) as proxy:
        proxy.on_request = change
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None, "key": "a"}
        said = run(MODULE, **options, src=tmp_path / src)
    assert "changed while it was read" in said["msg"], said
    assert bucket.keys() == [] and bucket.uploads() == []


def test_a_body_that_breaks_off_is_asked_for_from_there(run: Run, server: Any, bucket: Bucket, tmp_path: Path) -> None:
    data = random.Random(7).randbytes(4 * MIB)
    bucket.put("a", data)
    passed: list[int] = []

    def cut_once(block: bytes) -> bytes:
        passed.append(len(block))
        if sum(passed) > MIB >= sum(passed[:-1]):
            raise Cut
        return block

    with Proxy(server) as proxy:
        proxy.on_reply = cut_once
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None, "key": "a"}
        fetched = run(MODULE, **options, state="fetched", dest=tmp_path / "b")
    assert fetched["changed"] and (tmp_path / "b").read_bytes() == data
    assert sum(passed) < 6 * MIB


def test_a_store_that_goes_away_leaves_nothing_half(run: Run, server: Any, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(random.Random(8).randbytes(33 * MIB))
    bucket.put("b", b"b" * 4 * MIB)
    passed = 0

    def cut_after(block: bytes) -> bytes:
        nonlocal passed
        passed += len(block)
        if passed > limit:
            raise Cut
        return block

    with Proxy(server) as proxy:
        options = {**bucket.options, "endpoint_url": proxy.endpoint, "ca_bundle": None}
        limit, proxy.on_request = 20 * MIB, cut_after
        said = run(MODULE, **options, key="a", src=tmp_path / "a")
        assert "UploadPart" in said["msg"] and "can this host reach it?" in said["msg"], said
        limit, passed, proxy.on_request, proxy.on_reply = MIB, 0, lambda block: block, cut_after
        said = run(MODULE, **options, key="b", state="fetched", dest=tmp_path / "c")
        assert "GetObject" in said["msg"] and "can this host reach it?" in said["msg"], said
    assert bucket.keys() == ["b"] and not list(tmp_path.glob("c*"))
    assert run(MODULE, **bucket.options, key="a", src=tmp_path / "a")["changed"] and bucket.uploads() == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "small"], check=True)
    yield tmp_path / "small"
    subprocess.run(["umount", tmp_path / "small"], check=True)


def test_room_is_looked_for_first(predicted: Run, bucket: Bucket, small: Path) -> None:
    bucket.put("large", b"x" * 5 * MIB)
    said = predicted(MODULE, **bucket.options, state="fetched", key="large", dest=small)
    assert "make room" in said["msg"] and not list(small.iterdir())
    bucket.put("fits", b"x" * 3 * MIB)
    (small / "fits.part").write_bytes(b"y" * 3 * MIB)  # a run was killed here
    assert predicted(MODULE, **bucket.options, state="fetched", key="fits", dest=small)["changed"]
    assert [path.name for path in small.iterdir()] == ["fits"]


def test_what_another_writes_to_is_left_alone(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a", b"x")
    options = {**bucket.options, "state": "fetched", "key": "a", "dest": tmp_path / "a"}
    with (tmp_path / "a.part").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("other")
        other.flush()
        assert "is being written by another run" in run(MODULE, **options)["msg"]
        assert (tmp_path / "a.part").read_text() == "other"
    (tmp_path / "a.part").unlink()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.part").symlink_to("precious")
    assert f"{tmp_path}/a.part: " in run(MODULE, **options)["msg"]
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_missing_library_is_named(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "boto3.py").write_text("raise ImportError('not here')")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    said = run(MODULE, env={"PYTHONPATH": path}, **bucket.options, key="a", src=tmp_path)
    assert "(boto3)" in said["msg"]


def test_through_ansible_itself(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    options = {k: str(v) for k, v in bucket.options.items() if v is not None}
    options |= {"key": "a", "src": str(tmp_path / "a")}
    ansible = [sys.executable, "-m", "ansible", "adhoc", "localhost", "-c", "local", "-m", "lab.audio.s3_archive"]
    env = environment(ANSIBLE_COLLECTIONS_PATH=str(CHECKOUT / "collections"), ANSIBLE_PYTHON_INTERPRETER=PYTHON)
    for more, changed in ((["--check", "--diff"], "true"), (["--diff"], "true"), ([], "false")):
        done = subprocess.run([*ansible, "-a", json.dumps(options), *more], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and f'"changed": {changed}' in done.stdout, done.stdout + done.stderr
        assert bucket.options["secret_key"] not in done.stdout + done.stderr
