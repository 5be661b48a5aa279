"""The object store room against real stores: SeaweedFS over http, Swift 2.30 over TLS."""

from __future__ import annotations

import hashlib
import io
import random
import signal
import socket
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from lab_audio import s3_utils
from lab_audio.config import S3Settings
from lab_audio.contracts import archive_key
from lab_audio.errors import Fatal, NotFound, Permanent, Retryable
from lab_audio.s3_utils import Bucket, open_bucket

from proxy import Cut, Proxy
from swift import Swift

BATCH = "20250622-143052-a1b2c3"
KEY = archive_key(BATCH)
MIB = 1 << 20
PART = 5 * MIB


def make_file(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(size).randbytes(size))
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Three parts and a bit."""
    return make_file(tmp_path / "batch.tar", 3 * PART + 4321)


def upload(tar: Path, bucket: Bucket, **more: Any) -> str:
    return s3_utils.upload_archive(tar, BATCH, bucket=bucket, part_size=PART, **more)


def keys(bucket: Bucket) -> list[str]:
    return [o["Key"] for o in bucket.client.list_objects_v2(Bucket=bucket.name).get("Contents", [])]


def unfinished(bucket: Bucket) -> list[str]:
    return [u["Key"] for u in bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])]


def operations(bucket: Bucket) -> list[str]:
    """A list that grows by the name of every request that is made."""
    seen: list[str] = []
    bucket.client.meta.events.register("before-call.s3", lambda model, **_: seen.append(model.name))
    return seen


def flip_one_body(proxy: Proxy) -> list[int]:
    """Let the proxy change one bit of the first upload that passes."""
    flipped: list[int] = []

    def on_request(block: bytes) -> bytes:
        if len(block) < 4096 or flipped:
            return block
        flipped.append(len(block))
        return block[:-1] + bytes([block[-1] ^ 1])

    proxy.on_request = on_request
    return flipped


class TestUpload:
    def test_what_comes_back_is_what_went_in(
        self, bucket: Bucket, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SCRATCH_ROOT", str(tmp_path / "scratch"))
        assert upload(tar, bucket, file_count=847) == KEY
        info = s3_utils.head_archive(BATCH, bucket=bucket)
        digest = hashlib.sha256(tar.read_bytes()).hexdigest()
        assert (info.key, info.size, info.sha256, info.file_count) == (KEY, tar.stat().st_size, digest, 847)
        assert info.etag and info.etag.endswith("-4"), "not in parts"
        path = s3_utils.download_archive(KEY, BATCH, bucket=bucket)
        assert path == tmp_path / "scratch" / BATCH / "archive.tar"
        assert path.read_bytes() == tar.read_bytes()
        assert names(path.parent) == ["archive.tar"]
        assert unfinished(bucket) == []

    @pytest.mark.parametrize("size", [0, 1, PART - 1, PART, 2 * PART])
    def test_sizes_around_a_part(self, bucket: Bucket, tmp_path: Path, size: int) -> None:
        tar = make_file(tmp_path / "batch.tar", size)
        upload(tar, bucket)
        path = s3_utils.download_archive(KEY, BATCH, bucket=bucket, dest=tmp_path / "back.tar")
        assert path.read_bytes() == tar.read_bytes()

    def test_no_more_parts_than_a_store_takes(self, bucket: Bucket, tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_utils, "MAX_PARTS", 2)
        upload(tar, bucket)
        assert str(s3_utils.head_archive(BATCH, bucket=bucket).etag).endswith("-2")

    def test_the_given_sha256_is_kept(self, bucket: Bucket, tar: Path) -> None:
        upload(tar, bucket, sha256=hashlib.sha256(tar.read_bytes()).hexdigest())
        with s3_utils.open_archive(s3_utils.head_archive(BATCH, bucket=bucket), bucket=bucket) as stream:
            stream.drain()
            assert stream.sha256() == s3_utils.head_archive(BATCH, bucket=bucket).sha256

    def test_a_second_upload_sends_nothing(self, bucket: Bucket, tar: Path) -> None:
        upload(tar, bucket)
        seen = operations(bucket)
        assert upload(tar, bucket) == KEY
        assert set(seen) == {"ListMultipartUploads", "HeadObject"}

    def test_other_content_is_never_overwritten(self, bucket: Bucket, tar: Path, tmp_path: Path) -> None:
        upload(tar, bucket)
        other = make_file(tmp_path / "other.tar", 2 * PART)
        with pytest.raises(Permanent, match="never overwritten"):
            upload(other, bucket)
        assert s3_utils.head_archive(BATCH, bucket=bucket).size == tar.stat().st_size

    def test_a_foreign_object_is_never_overwritten(self, bucket: Bucket, tar: Path) -> None:
        bucket.client.put_object(Bucket=bucket.name, Key=KEY, Body=b"another client's")
        with pytest.raises(Permanent, match="never overwritten"):
            upload(tar, bucket)
        assert s3_utils.head_archive(BATCH, bucket=bucket).size == 16

    def test_an_upload_that_was_never_verified_is_done_again(self, bucket: Bucket, tar: Path) -> None:
        data = tar.read_bytes()
        metadata = {"sha256": hashlib.sha256(data).hexdigest(), "size": str(len(data))}
        damaged = data[:-1] + bytes([data[-1] ^ 1])
        bucket.client.put_object(Bucket=bucket.name, Key=KEY, Body=damaged, Metadata=metadata)
        upload(tar, bucket)
        with s3_utils.open_archive(s3_utils.head_archive(BATCH, bucket=bucket), bucket=bucket) as stream:
            assert stream.read(len(data)) + stream.read() == data

    def test_parts_of_a_killed_upload_are_removed_and_no_others(self, bucket: Bucket, tar: Path) -> None:
        begin = bucket.client.create_multipart_upload
        for key in (KEY, f"{KEY}.other"):
            upload_id = begin(Bucket=bucket.name, Key=key)["UploadId"]
            bucket.client.upload_part(Bucket=bucket.name, Key=key, UploadId=upload_id, PartNumber=1, Body=b"x" * PART)
        upload(tar, bucket)
        assert unfinished(bucket) == [f"{KEY}.other"]

    def test_a_byte_that_flips_on_the_way_is_noticed(
        self, bucket: Bucket, through_proxy: Bucket, proxy: Proxy, tar: Path
    ) -> None:
        flipped = flip_one_body(proxy)
        with pytest.raises(Retryable, match="received other bytes"):
            upload(tar, through_proxy)
        assert flipped
        assert keys(bucket) == unfinished(bucket) == []
        assert upload(tar, through_proxy) == KEY

    def test_a_connection_that_breaks_leaves_no_parts(
        self, bucket: Bucket, through_proxy: Bucket, proxy: Proxy, tar: Path
    ) -> None:
        passed = 0

        def on_request(block: bytes) -> bytes:
            nonlocal passed
            passed += len(block)
            if len(block) >= 4096 and passed > PART + MIB:
                raise Cut
            return block

        proxy.on_request = on_request
        with pytest.raises(Retryable, match="away"):
            upload(tar, through_proxy)
        assert keys(bucket) == unfinished(bucket) == []

    def test_an_interrupt_leaves_no_parts(
        self, bucket: Bucket, through_proxy: Bucket, proxy: Proxy, tmp_path: Path
    ) -> None:
        tar = make_file(tmp_path / "batch.tar", 12 * PART)
        passed = [0]

        def on_request(block: bytes) -> bytes:
            before, passed[0] = passed[0], passed[0] + len(block)
            if before <= PART < passed[0]:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
            return block

        proxy.on_request = on_request
        with pytest.raises(KeyboardInterrupt):
            upload(tar, through_proxy)
        assert PART < passed[0] < tar.stat().st_size
        assert keys(bucket) == unfinished(bucket) == []


class TestDownload:
    def test_missing_object(self, bucket: Bucket, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=KEY):
            s3_utils.head_archive(BATCH, bucket=bucket)
        with pytest.raises(NotFound, match=KEY):
            s3_utils.download_archive(KEY, BATCH, bucket=bucket, dest=tmp_path / "x.tar")
        assert names(tmp_path) == []

    def test_a_foreign_object_has_no_sha256_and_downloads(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.client.put_object(Bucket=bucket.name, Key=KEY, Body=b"tar of another client")
        info = s3_utils.head_archive(BATCH, bucket=bucket)
        assert (info.size, info.sha256, info.file_count) == (21, None, None)
        path = s3_utils.download_archive(KEY, BATCH, bucket=bucket, dest=tmp_path / "x.tar")
        assert path.read_bytes() == b"tar of another client"

    def test_other_bytes_than_were_promised(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.client.put_object(
            Bucket=bucket.name,
            Key=KEY,
            Body=b"damaged",
            Metadata={"sha256": hashlib.sha256(b"good").hexdigest()},
        )
        with pytest.raises(Permanent, match="damaged in the store"):
            s3_utils.download_archive(KEY, BATCH, bucket=bucket, dest=tmp_path / "x.tar")
        assert names(tmp_path) == []

    def test_a_body_that_breaks_off_is_asked_for_again(
        self, bucket: Bucket, through_proxy: Bucket, proxy: Proxy, tar: Path, tmp_path: Path
    ) -> None:
        upload(tar, bucket)
        blocks = 0

        def on_reply(block: bytes) -> bytes:
            nonlocal blocks
            if len(block) > 4096:
                blocks += 1
                # Once, and well after the header: botocore itself asks again where none came.
                if blocks == 10:
                    raise Cut
            return block

        proxy.on_reply = on_reply
        path = s3_utils.download_archive(KEY, BATCH, bucket=through_proxy, dest=tmp_path / "x.tar")
        assert blocks > 10 and path.read_bytes() == tar.read_bytes()

    def test_a_store_that_keeps_breaking_off_leaves_nothing(
        self, bucket: Bucket, through_proxy: Bucket, proxy: Proxy, tar: Path, tmp_path: Path
    ) -> None:
        upload(tar, bucket)
        passed = 0

        def on_reply(block: bytes) -> bytes:
            nonlocal passed
            passed += len(block)
            if passed > 2 * MIB:
                raise Cut
            return block

        proxy.on_reply = on_reply
        dest = tmp_path / "scratch"
        dest.mkdir()
        with pytest.raises(Retryable, match="away"):
            s3_utils.download_archive(KEY, BATCH, bucket=through_proxy, dest=dest / "x.tar")
        assert names(dest) == []

    def test_a_full_disk_is_no_fault_of_the_archive(self, bucket: Bucket, tar: Path, tmp_path: Path) -> None:
        upload(tar, bucket)
        (tmp_path / "x.tar.part").symlink_to("/dev/full")
        with pytest.raises(Fatal, match="scratch is full"):
            s3_utils.download_archive(KEY, BATCH, bucket=bucket, dest=tmp_path / "x.tar")
        assert names(tmp_path) == ["batch.tar"]


class TestStream:
    def test_a_tar_is_read_as_it_comes(self, bucket: Bucket, tmp_path: Path) -> None:
        chance = random.Random(5)
        members = {f"a/{i:03d}.mp3": chance.randbytes(chance.randrange(100_000)) for i in range(60)}
        tar = tmp_path / "batch.tar"
        with tarfile.open(tar, "w") as out:
            for name, data in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                out.addfile(entry, io.BytesIO(data))
        upload(tar, bucket)
        info = s3_utils.head_archive(BATCH, bucket=bucket)
        with s3_utils.open_archive(info, bucket=bucket, range_size=300_001) as stream:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=MIB) as archive:
                found = {e.name: archive.extractfile(e).read() for e in archive}  # type: ignore[union-attr]
            stream.drain()
            assert found == members
            assert stream.sha256() == info.sha256

    def test_a_range_that_cannot_be_had_is_never_passed_over(
        self, bucket: Bucket, through_proxy: Bucket, proxy: Proxy, tar: Path
    ) -> None:
        upload(tar, bucket)
        info = s3_utils.head_archive(BATCH, bucket=bucket)

        def on_request(block: bytes) -> bytes:
            if f"bytes={2 * MIB}-".encode() in block:
                raise Cut
            return block

        proxy.on_request = on_request
        with s3_utils.open_archive(info, bucket=through_proxy, range_size=MIB) as stream:
            for _ in range(2):
                with pytest.raises(Retryable):
                    stream.drain()
            assert stream.sha256() == hashlib.sha256(tar.read_bytes()[: 2 * MIB]).hexdigest()

    def test_a_changed_object_is_noticed(self, bucket: Bucket, tar: Path, tmp_path: Path) -> None:
        upload(tar, bucket)
        info = s3_utils.head_archive(BATCH, bucket=bucket)
        with s3_utils.open_archive(info, bucket=bucket, range_size=MIB) as stream:
            assert stream.read(100) == tar.read_bytes()[:100]
            other = make_file(tmp_path / "other.tar", info.size + 1)
            bucket.client.put_object(Bucket=bucket.name, Key=KEY, Body=other.read_bytes())  # it is there all the time
            with pytest.raises(Retryable, match="changed"):
                stream.drain()

    def test_a_deleted_object_is_noticed(self, bucket: Bucket, tar: Path) -> None:
        upload(tar, bucket)
        info = s3_utils.head_archive(BATCH, bucket=bucket)
        with s3_utils.open_archive(info, bucket=bucket, range_size=MIB) as stream:
            stream.read(100)
            s3_utils.delete_archive(KEY, bucket=bucket)
            # Swift may still find the manifest and no longer its parts; who then asks again finds nothing.
            with pytest.raises((NotFound, Retryable)):
                stream.drain()

    def test_memory_is_bounded_also_when_the_reader_is_slow(self, bucket: Bucket, tmp_path: Path) -> None:
        tar = make_file(tmp_path / "batch.tar", 40 * MIB)
        upload(tar, bucket)
        info = s3_utils.head_archive(BATCH, bucket=bucket)
        tracemalloc.start()
        try:
            with s3_utils.open_archive(info, bucket=bucket, range_size=MIB) as stream:
                stream.read(1)
                # By the time another has fetched it all, so would this one have, were it not bounded.
                with s3_utils.open_archive(info, bucket=bucket, range_size=MIB) as other:
                    other.drain()
                stream.drain()
                assert stream.sha256() == info.sha256
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Two streams of five ranges each, and what urllib3 holds of those that arrive.
        assert peak < 24 * MIB, f"{peak / MIB:.1f} MiB"

    def test_closing_ends_what_is_in_flight(self, bucket: Bucket, tar: Path) -> None:
        upload(tar, bucket)
        info = s3_utils.head_archive(BATCH, bucket=bucket)
        stream = s3_utils.open_archive(info, bucket=bucket, range_size=PART)
        stream.close()
        deadline = time.monotonic() + 20
        while any(t.name.startswith("archive") for t in threading.enumerate()):
            assert time.monotonic() < deadline, "threads are left"
            time.sleep(0.01)
        with pytest.raises(ValueError):
            stream.read(1)


class TestOpus:
    def test_object_and_metadata(self, bucket: Bucket, tmp_path: Path) -> None:
        opus = make_file(tmp_path / "x.opus", 30_000)
        member = "Aufnahmen/" + "Grüße aus Łódź – " * 30 + ".mp3"
        key = s3_utils.upload_opus(opus, 17, "2025-06-22", bucket=bucket, batch_id=BATCH, member=member)
        assert key == "processed/2025-06-22/17.opus"
        found = bucket.client.get_object(Bucket=bucket.name, Key=key)
        assert found["Body"].read() == opus.read_bytes()
        metadata = found["Metadata"]
        assert metadata["batch_id"] == BATCH
        assert metadata["sha256"] == hashlib.sha256(opus.read_bytes()).hexdigest()
        assert metadata["member-sha1"] == hashlib.sha1(member.encode()).hexdigest()
        assert 250 < len(metadata["member"]) <= 256
        assert member.encode().startswith(unquote_to_bytes(metadata["member"]))

    def test_is_replaced(self, bucket: Bucket, tmp_path: Path) -> None:
        for size in (3000, 2000):
            key = s3_utils.upload_opus(make_file(tmp_path / "x", size), 17, "2025-06-22", bucket=bucket)
        assert bucket.client.head_object(Bucket=bucket.name, Key=key)["ContentLength"] == 2000

    def test_a_byte_that_flips_on_the_way_is_noticed(
        self, bucket: Bucket, through_proxy: Bucket, proxy: Proxy, tmp_path: Path
    ) -> None:
        opus = make_file(tmp_path / "x.opus", 30_000)
        flipped = flip_one_body(proxy)
        with pytest.raises(Retryable, match="BadDigest"):
            s3_utils.upload_opus(opus, 17, "2025-06-22", bucket=through_proxy)
        assert flipped and keys(bucket) == []
        s3_utils.upload_opus(opus, 17, "2025-06-22", bucket=through_proxy)

    def test_another_file_than_was_made(self, bucket: Bucket, tmp_path: Path) -> None:
        opus = make_file(tmp_path / "x.opus", 3000)
        with pytest.raises(Permanent, match="damaged on scratch"):
            s3_utils.upload_opus(opus, 17, "2025-06-22", bucket=bucket, sha256="0" * 64)
        assert keys(bucket) == []


class TestDelete:
    def test_what_is_not_there_is_fine(self, bucket: Bucket, tar: Path, tmp_path: Path) -> None:
        upload(tar, bucket)
        key = s3_utils.upload_opus(make_file(tmp_path / "x", 10), 1, "2025-06-22", bucket=bucket)
        for _ in range(2):
            s3_utils.delete_archive(KEY, bucket=bucket)
            s3_utils.delete_opus(key, bucket=bucket)
        assert keys(bucket) == []

    def test_many_at_once(self, bucket: Bucket) -> None:
        for name in "ab":
            bucket.client.put_object(Bucket=bucket.name, Key=name, Body=b"")
        bucket.client.delete_objects(Bucket=bucket.name, Delete={"Objects": [{"Key": "a"}, {"Key": "b"}]})
        assert keys(bucket) == []


class TestWhatIsWrong:
    def test_missing_bucket(self, bucket: Bucket, tar: Path) -> None:
        missing = Bucket(bucket.client, "not-there")
        for ask in (
            lambda: upload(tar, missing),
            lambda: s3_utils.head_archive(BATCH, bucket=missing),
            lambda: s3_utils.upload_opus(tar, 1, "2025-06-22", bucket=missing),
            lambda: s3_utils.delete_archive(KEY, bucket=missing),
            lambda: s3_utils.check_bucket(missing),
        ):
            with pytest.raises(Fatal, match=r"not-there.*S3_BUCKET"):
                ask()

    def test_ensure_bucket_twice(self, bucket: Bucket) -> None:
        s3_utils.ensure_bucket(bucket)
        s3_utils.check_bucket(bucket)

    @pytest.mark.parametrize("setting", ["s3_secret_key", "s3_access_key"])
    def test_wrong_credentials(self, bucket: Bucket, settings: S3Settings, tar: Path, setting: str) -> None:
        values = settings.model_dump() | {setting: "sesame-open-wide"}
        wrong = open_bucket(S3Settings(**values), attempts=1)
        for ask in (
            lambda: upload(tar, wrong),
            lambda: s3_utils.head_archive(BATCH, bucket=wrong),
            lambda: s3_utils.upload_opus(tar, 1, "2025-06-22", bucket=wrong),
        ):
            with pytest.raises(Fatal, match=r"S3_(ACCESS|SECRET)_KEY") as caught:
                ask()
            said = str(caught.value)
            assert settings.s3_endpoint in said and settings.s3_bucket in said
            for secret in (values["s3_secret_key"], values["s3_access_key"]):
                text = secret if isinstance(secret, str) else secret.get_secret_value()
                assert text not in said

    @pytest.mark.parametrize("store", [Swift], ids=["swift-tls"], indirect=True, scope="session")
    def test_a_certificate_nobody_vouches_for(self, settings: S3Settings) -> None:
        stranger = open_bucket(settings.model_copy(update={"s3_ca_bundle": None}), attempts=1)
        with pytest.raises(Fatal, match=r"certificate is not trusted.*S3_CA_BUNDLE"):
            s3_utils.check_bucket(stranger)

    def test_a_store_that_is_away(self, settings: S3Settings, tar: Path) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
            away = open_bucket(settings.model_copy(update={"s3_endpoint": endpoint}), attempts=1)
            with pytest.raises(Retryable, match=endpoint):
                upload(tar, away)
