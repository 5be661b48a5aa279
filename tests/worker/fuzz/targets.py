"""What takes bytes from strangers, each as a function of bytes that fails where it breaks its word."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from hostile import cases

from lab_audio import config, jobs, s3_utils, source
from lab_audio.contracts import MAX_INTEGER, archive_key, is_utf8, opus_path
from lab_audio.errors import ConfigError, LabAudioError, Permanent
from lab_audio.media import archive, canary, transcode

BATCH = "20260101-000000-000001"


@dataclass(frozen=True)
class Target:
    """`seeds`: good ones, from which others are made."""

    check: Callable[[bytes], None]
    seeds: list[bytes]


def tar(data: bytes) -> None:
    """Every member is clean, none is twice, and no more comes out than went in."""
    names, total = set(), 0
    with contextlib.suppress(archive.ArchiveBroken):
        for member in archive.read(io.BytesIO(data)):
            assert member.name not in names
            assert member.name and is_utf8(member.name) and "\0" not in member.name
            assert 0 <= member.size <= MAX_INTEGER
            assert (member.file is None) == (member.problem is not None)
            names.add(member.name)
            if member.file is not None:
                body = member.file.read()
                assert len(body) == member.size
                total += len(body)
    assert total <= len(data)


def compressed_tar(data: bytes) -> None:
    """What comes out is bounded."""
    total = 0
    with contextlib.suppress(archive.ArchiveBroken):
        for member in archive.read(io.BytesIO(data), compressed=True):
            if member.file is not None:
                total += len(member.file.read())
    assert total <= archive.MAX_RATIO * len(data) + archive.CHUNK


def tar_sources(data: bytes) -> None:
    """Each source file can be entered."""
    with contextlib.suppress(archive.ArchiveBroken):
        for file in archive.sources(io.BytesIO(data)):
            assert 0 <= file.size <= MAX_INTEGER
            assert abs(file.mtime_ns) <= MAX_INTEGER


def unpack_job(data: bytes) -> None:
    """A job that is taken is of its own batch."""
    with contextlib.suppress(Permanent):
        job = jobs.parse_unpack_job(data.decode("utf-8", "surrogateescape"))
        assert job.s3_key == archive_key(job.batch_id)
        assert 0 <= job.file_count < 2**31


def transcribe_job(data: bytes) -> None:
    """A job that is taken names an item of its own batch, and nothing that leads elsewhere."""
    with contextlib.suppress(Permanent):
        job = jobs.parse_transcribe_job(data.decode("utf-8", "surrogateescape"))
        path = opus_path(Path("/data/scratch"), job.batch_id, job.item)
        assert re.fullmatch(r"/data/scratch/[0-9]{8}-[0-9]{6}-[0-9a-f]{6}/[0-9a-f]{16}\.opus", str(path))


def opus(data: bytes) -> None:
    """A duration is one."""
    with tempfile.NamedTemporaryFile(suffix=".opus") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(Permanent):
            assert 0 <= transcode.duration(Path(file.name)) <= MAX_INTEGER / 48_000


def listing(data: bytes) -> None:
    """A listing that is taken can be entered, and its paths lie inside the source."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        host = source.Source("ssh://fuzz", "/", ("/bin/sh", "-c", f"exec cat {file.name}"), "fuzz")
        with contextlib.suppress(LabAudioError):
            for found in source.settled(host, 0):
                source.check_path(found.path)
                assert 0 <= found.size <= MAX_INTEGER
                assert abs(found.mtime_ns) <= MAX_INTEGER


def metadata(data: bytes) -> None:
    """An object's metadata can be entered, or are left out."""
    lines = [line.partition(b":")[::2] for line in data.split(b"\n")]
    answered.clear()
    answered.update({"Content-Length": "1", "ETag": '"0"'})
    answered.update({name.decode("latin-1").strip(): value.decode("latin-1").strip() for name, value in lines if name})
    with contextlib.suppress(LabAudioError):
        info = s3_utils.head_archive(BATCH, bucket=bucket())
        assert info.sha256 is None or re.fullmatch("[0-9a-f]{64}", info.sha256)
        assert info.file_count is None or 0 <= info.file_count < 2**31
        assert info.source is None or (is_utf8(info.source) and "\0" not in info.source)
        if info.source_file is not None:
            assert "\0" not in info.source_file.path
            assert abs(info.source_file.mtime_ns) <= MAX_INTEGER


answered: dict[str, str] = {}  # the headers with which the store answers


class Body:
    """As urllib3 gives it."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield b""


@cache
def bucket() -> s3_utils.Bucket:
    """Of the real client, to whose requests nobody is asked."""
    client = boto3.client(
        "s3",
        endpoint_url="http://127.0.0.1:1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}),
    )
    client.meta.events.register(
        "before-send.s3", lambda request, **_: AWSResponse(request.url, 200, dict(answered), Body())
    )
    return s3_utils.Bucket(client, "b")


def environment(data: bytes) -> None:
    """Settings are taken, or refused by name and without the value."""
    lines = [line.partition(b"=")[::2] for line in data.split(b"\n")]
    with contextlib.ExitStack() as stack:
        before = dict(os.environb)
        stack.callback(lambda: (os.environb.clear(), os.environb.update(before)))
        os.environb.clear()
        for name, value in lines:
            if name and b"\0" not in name + value:
                os.environb[name] = value
        for kind in (config.TransferSettings, config.UnpackSettings, config.GpuSettings, config.ReconcileSettings):
            try:
                config.load(kind)
            except ConfigError as error:
                assert "xyzzy" not in str(error)


ENVIRONMENT = b"""DATABASE_URL=postgresql://u:xyzzy@h/d
REDIS_URL=redis://:xyzzy@h:6379/0
S3_ENDPOINT=https://h:8080
S3_ACCESS_KEY=xyzzy
S3_SECRET_KEY=xyzzy
SOURCE=ssh://u@h:22/in
SCRATCH_ROOT=/data/scratch
DEVICES=cuda:0,cuda:1
LAB_HOST=h1
SETTLE_SECONDS=60
ALLOW_UNSANDBOXED=false
"""
HEADERS = b"""x-amz-meta-sha256: %s
x-amz-meta-file-count: 12
x-amz-meta-source: ssh://u@h:22/in
x-amz-meta-source-path: a/%%C3%%BC.tar
x-amz-meta-source-mtime-ns: 1700000000000000000
Last-Modified: Fri, 27 Nov 2026 10:00:00 GMT
""" % (b"0" * 64)
FAR_OFF = [HEADERS.replace(b"2026", year) for year in (b"2" + b"0" * 36, b"2" + b"0" * 30 + b"h0")]
FOUND = b"1700000000.000000000\0" + b"".join(
    b"12 1700000000.000000001 1700000000.000000001 ./%s\0" % name for name in (b"a.mp3", b"d/b.MP3", b"\xff.tar")
)
JOB = {"batch_id": BATCH, "s3_key": archive_key(BATCH), "file_count": 3, "transferred_at": "2026-01-01T00:00:00Z"}
ITEM = {"batch_id": BATCH, "opus_path": f"/data/scratch/{BATCH}/{'0' * 16}.opus", "original_filename": "a.mp3"}
TARS = [case.data for case in cases() if len(case.data) < 40_000]

TARGETS = {
    "tar": Target(tar, TARS),
    "compressed_tar": Target(compressed_tar, [case.data for case in cases() if case.name.startswith("packed: ")]),
    "tar_sources": Target(tar_sources, TARS),
    "unpack_job": Target(unpack_job, [json.dumps(JOB).encode()]),
    "transcribe_job": Target(transcribe_job, [json.dumps(ITEM).encode()]),
    "opus": Target(opus, [canary.OPUS.read_bytes()]),
    "listing": Target(listing, [FOUND]),
    "metadata": Target(metadata, [HEADERS, *FAR_OFF]),
    "environment": Target(environment, [ENVIRONMENT]),
}
