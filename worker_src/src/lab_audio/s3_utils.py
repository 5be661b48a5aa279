"""The object store: archives, processed recordings, and the one way of talking to S3.

One configuration serves AWS, SeaweedFS and Swift. What was stored is checked against the ETag that the store
itself computed, which has to be an MD5 (or, of a multipart upload, the MD5 of its parts' MD5s): no SSE-KMS.
"""

from __future__ import annotations

import base64
import hashlib
import io
import ipaddress
import os
import re
import shutil
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date as calendar_date
from datetime import datetime
from email.utils import mktime_tz, parsedate_tz
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from lab_audio import metrics, notify
from lab_audio.config import HostSettings, S3Settings, load
from lab_audio.contracts import BATCH_ID, MAX_INTEGER, SourceFile, archive_key, check_batch_id, is_utf8, processed_key
from lab_audio.errors import ConfigError, Fatal, LabAudioError, NotFound, Permanent, Retryable
from lab_audio.scratch import batch_dir, cleanup_scratch, is_full, prepare

__all__ = [
    "ArchiveInfo",
    "ArchiveStream",
    "Bucket",
    "Origin",
    "Upload",
    "abort_upload",
    "archives",
    "as_header",
    "asking",
    "check_bucket",
    "cleanup_scratch",
    "delete_archive",
    "delete_opus",
    "download_archive",
    "download_opus",
    "ensure_bucket",
    "get_s3_client",
    "head_archive",
    "open_archive",
    "open_bucket",
    "origin",
    "processed",
    "processed_dates",
    "prove",
    "stored_at",
    "unfinished_uploads",
    "upload_archive",
    "upload_opus",
    "upload_size",
]

STORE = "object store"
ATTEMPTS = 6
READ_SECONDS = 60.0
MIB = 1 << 20
PART_SIZE = 64 * MIB
MAX_PARTS = 1000  # Swift's own default; AWS allows more
RANGE_SIZE = 16 * MIB
IN_FLIGHT = 4
MAX_METADATA = 256  # bytes of one value, on Swift

SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Bucket:
    """A bucket and the client that reaches it; may be shared by threads."""

    client: Any = field(repr=False)
    name: str


@dataclass(frozen=True)
class ArchiveInfo:
    """What the store says of an archive; `sha256`, `file_count` and `source` are None if another client put it.

    `source_file`: of an archive that lay at the source as it is.
    """

    key: str
    size: int
    sha256: str | None
    file_count: int | None
    etag: str | None = None
    source: str | None = None
    source_file: SourceFile | None = None


def get_s3_client(
    settings: S3Settings | None = None, *, attempts: int = ATTEMPTS, seconds: float = READ_SECONDS
) -> Any:
    """A boto3 S3 client that tries each request `attempts` times, `seconds` long. Raises ConfigError."""
    settings = settings or load(S3Settings)
    endpoint = urlsplit(settings.s3_endpoint)
    client = boto3.Session().client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        aws_access_key_id=settings.s3_access_key.get_secret_value(),
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
        region_name=settings.s3_region,
        verify=_ca_bundle(settings),
        config=Config(
            signature_version="s3v4",
            s3={
                "addressing_style": "path",
                # Hashing each payload costs a pass over it and protects nothing that TLS does not.
                "payload_signing_enabled": not (endpoint.scheme == "https" or _is_loopback(endpoint.hostname)),
            },
            # Swift before 2.35 answers 501 to the checksum trailers that botocore would send over TLS.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=32,
            connect_timeout=5,
            read_timeout=seconds,
            tcp_keepalive=True,
        ),
    )
    client.meta.events.register("before-call.s3.DeleteObjects", _add_content_md5)
    return client


def open_bucket(
    settings: S3Settings | None = None, *, attempts: int = ATTEMPTS, seconds: float = READ_SECONDS
) -> Bucket:
    """The bucket of these settings, or of the environment; the store is not asked yet. Raises ConfigError."""
    settings = settings or load(S3Settings)
    return Bucket(get_s3_client(settings, attempts=attempts, seconds=seconds), settings.s3_bucket)


def check_bucket(bucket: Bucket) -> None:
    """Raises Fatal unless the bucket is there and may be used, Retryable while the store is away."""
    try:
        with asking(bucket, "HeadBucket"):
            bucket.client.head_bucket(Bucket=bucket.name)
    except NotFound:
        raise Fatal(f"{_place(bucket)} does not exist: create the bucket, or correct S3_BUCKET") from None


def prove(bucket: Bucket, key: str) -> float:
    """Put an object, get it and delete it. Returns by how many seconds this host's clock is ahead of the store's, 0 if
    that tells no time.

    Another run with the same key puts the same bytes; and where it deletes them in between, they are put once more.
    """
    check_bucket(bucket)
    data = key.encode()
    try:
        try:
            ahead, found = _put_and_get(bucket, key, data)
        except NotFound:
            ahead, found = _put_and_get(bucket, key, data)
    finally:
        _delete(bucket, key)
    if found != data:
        raise Retryable(f"GetObject {_place(bucket, key)}: other bytes came back than were put", STORE)
    return ahead


def _put_and_get(bucket: Bucket, key: str, data: bytes) -> tuple[float, bytes]:
    with asking(bucket, "PutObject", key):
        answer = bucket.client.put_object(Bucket=bucket.name, Key=key, Body=data)
    told = parsedate_tz(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
    ahead = time.time() - mktime_tz(told) if told else 0.0
    with asking(bucket, "GetObject", key):
        return ahead, bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read()


def ensure_bucket(bucket: Bucket) -> bool:
    """Create the bucket if it is missing, and tell whether it was."""
    try:
        with asking(bucket, "HeadBucket"):
            bucket.client.head_bucket(Bucket=bucket.name)
    except NotFound:
        region = bucket.client.meta.region_name
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        with asking(bucket, "CreateBucket"):
            try:
                bucket.client.create_bucket(Bucket=bucket.name, **where)
            except aws.ClientError as error:
                if error.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":
                    raise
                return False
        return True
    return False


def upload_archive(
    local_path: Path,
    batch_id: str,
    *,
    bucket: Bucket | None = None,
    sha256: str | None = None,
    file_count: int | None = None,
    source: str | None = None,
    source_file: SourceFile | None = None,
    part_size: int = PART_SIZE,
) -> str:
    """Store a batch's tar and return its key; done already if these bytes are there.

    `sha256` is that of the file, computed if not given. `source` and, of an archive that lay there as it is,
    `source_file` are kept with it, so that a database restored from an older dump can be brought up to date.
    Raises Permanent if other bytes are stored under the key; Retryable if the store is away or received other bytes
    than these (nothing is left of those); Fatal.
    """
    bucket = bucket or open_bucket()
    key = archive_key(batch_id)
    size = local_path.stat().st_size
    part_size = max(part_size, -(-size // MAX_PARTS // MIB) * MIB)
    sha256, etag = _digests(local_path, part_size if size >= part_size else None, sha256)
    # An upload that was killed left parts that are paid for and never seen again.
    _abort_uploads(bucket, key)
    if _is_stored(bucket, key, size, sha256, etag):
        return key
    metadata = {"sha256": sha256, "size": str(size)}
    if file_count is not None:
        metadata["file-count"] = str(file_count)
    if source is not None:
        metadata["source"] = as_header(source)
    if source_file is not None:
        metadata |= {"source-path": as_header(source_file.path), "source-mtime-ns": str(source_file.mtime_ns)}
    with _storing(bucket, key), asking(bucket, "Upload", key):
        # boto3 aborts a multipart upload on any exception. Its other transfer client ignores endpoint_url.
        bucket.client.upload_file(
            str(local_path),
            bucket.name,
            key,
            ExtraArgs={"Metadata": metadata, "ContentType": "application/x-tar"},
            Callback=lambda _bytes: notify.progress(),
            Config=TransferConfig(
                multipart_threshold=part_size,
                multipart_chunksize=part_size,
                max_concurrency=4,
                preferred_transfer_client="classic",
            ),
        )
    stored = _head_stored(bucket, key)
    if _etag(stored) != etag or stored["ContentLength"] != size:
        delete_archive(key, bucket=bucket)
        raise Retryable(
            f"Upload {_place(bucket, key)}: the store received other bytes than {local_path} "
            f"(ETag {_etag(stored)}, not {etag}); they were deleted. "
            "Upload again; if it recurs, look for a bad network or disk",
            STORE,
        )
    _count_bytes(key, "out", size)
    return key


def _count_bytes(key: str, direction: str, count: int) -> None:
    metrics.BYTES.labels("archive" if key.startswith("archives/") else "opus", direction).inc(count)


def head_archive(batch_id: str, *, bucket: Bucket | None = None) -> ArchiveInfo:
    """What the store says of a batch's archive. Raises NotFound, Retryable, Fatal."""
    return _info(bucket or open_bucket(), archive_key(batch_id))


def download_archive(s3_key: str, batch_id: str, *, bucket: Bucket | None = None, dest: Path | None = None) -> Path:
    """Fetch an archive to `dest` (SCRATCH_ROOT/{batch_id}/archive.tar) whole, or leave nothing there.

    Raises NotFound, Permanent if its bytes are not those its metadata names, Retryable, Fatal (a full disk).
    """
    check_batch_id(batch_id)
    bucket = bucket or open_bucket()
    if dest is None:
        root = load(HostSettings).scratch_root
        prepare(root)
        dest = batch_dir(root, batch_id) / "archive.tar"
    try:
        dest.parent.mkdir(mode=0o750, exist_ok=True)
        _download(bucket, s3_key, dest)
    except OSError as error:
        if is_full(error):
            raise Fatal(f"scratch is full: {dest}: {error.strerror}; make room there") from error
        raise
    return dest


def download_opus(key: str, dest: Path, *, bucket: Bucket | None = None) -> int:
    """Fetch a processed recording to `dest` whole, or leave nothing there; its size in bytes.

    Raises NotFound, Permanent if its bytes are not those its metadata names, Retryable, Fatal; OSError.
    """
    return _download(bucket or open_bucket(), key, dest)


def _download(bucket: Bucket, key: str, dest: Path) -> int:
    info = _info(bucket, key)
    part = dest.with_name(f"{dest.name}.part")
    try:
        with open_archive(info, bucket=bucket) as stream, part.open("wb") as file:
            shutil.copyfileobj(stream, file, MIB)
            file.flush()
            os.fsync(file.fileno())
        if info.sha256 not in (None, stream.sha256()):
            raise Permanent(
                f"{_place(bucket, key)} has sha256 {stream.sha256()}, but was stored as {info.sha256}: "
                "it was damaged in the store, or replaced"
            )
        part.replace(dest)
    finally:
        part.unlink(missing_ok=True)
    return info.size


def open_archive(info: ArchiveInfo, *, bucket: Bucket | None = None, range_size: int = RANGE_SIZE) -> ArchiveStream:
    """The archive's bytes in order, for `tarfile.open(fileobj=..., mode="r|", bufsize=1 << 20)`."""
    return ArchiveStream(bucket or open_bucket(), info, range_size)


class ArchiveStream(io.RawIOBase):
    """An object read through a few range GETs in flight, in constant memory (at most five ranges).

    Reading raises NotFound if the object goes away, Retryable if it changes or the store is away; then every
    further read raises it again: no gap is ever passed over.
    """

    def __init__(self, bucket: Bucket, info: ArchiveInfo, range_size: int) -> None:
        self._bucket = bucket
        self._info = info
        self._range_size = range_size
        self._starts = iter(range(0, info.size, range_size))
        self._stopped = threading.Event()
        self._hash = hashlib.sha256()
        self._current = memoryview(b"")
        self._ranges: deque[Future[bytearray]] = deque()
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="archive")
        self._request_ranges()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._checkClosed()
        if not self._current and self._ranges:
            self._current = memoryview(self._ranges[0].result())
            self._ranges.popleft()
            self._request_ranges()
        count = min(len(buffer), len(self._current))
        buffer[:count] = self._current[:count]
        self._hash.update(self._current[:count])
        # An empty slice would keep its whole range in memory.
        self._current = self._current[count:] or memoryview(b"")
        return count

    def sha256(self) -> str:
        """Hex digest of everything read so far."""
        return self._hash.hexdigest()

    def drain(self) -> None:
        """Read on to the end, so that `sha256` covers the whole object."""
        buffer = bytearray(MIB)
        while self.readinto(buffer):
            pass

    def close(self) -> None:
        if not self.closed:
            self._stopped.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._ranges.clear()
            self._current = memoryview(b"")
        super().close()

    def _request_ranges(self) -> None:
        for start in islice(self._starts, IN_FLIGHT - len(self._ranges)):
            self._ranges.append(self._pool.submit(self._fetch, start))

    def _fetch(self, start: int) -> bytearray:
        """One range. botocore tries a request again, but not a body that breaks off: that is done here."""
        length = min(self._range_size, self._info.size - start)
        try:
            return self._ask_for(start, length)
        except NotFound as error:
            _head(self._bucket, self._info.key)
            raise Retryable(f"{error}, though it is there: is that the store's answer?", STORE) from error

    def _ask_for(self, start: int, length: int) -> bytearray:
        conditions = {"IfMatch": f'"{self._info.etag}"'} if self._info.etag else {}
        with asking(self._bucket, "GetObject", self._info.key):
            for last in (False, False, True):
                response = self._bucket.client.get_object(
                    Bucket=self._bucket.name,
                    Key=self._info.key,
                    Range=f"bytes={start}-{start + length - 1}",
                    **conditions,
                )
                if response["ContentLength"] != length:
                    where = _place(self._bucket, self._info.key)
                    raise Retryable(
                        f"GetObject {where}: {response['ContentLength']} bytes came "
                        f"for {length} at {start}: the object has changed. Ask again",
                        STORE,
                    )
                try:
                    return self._read(response["Body"], length)
                except (aws.BotoCoreError, HTTPError, OSError):
                    if last or self._stopped.is_set():
                        raise
        raise AssertionError

    def _read(self, body: Any, length: int) -> bytearray:
        data = bytearray(length)
        view, filled = memoryview(data), 0
        try:
            while filled < length:
                count = body.readinto(view[filled : filled + MIB])
                if not count or self._stopped.is_set():
                    raise aws.IncompleteReadError(actual_bytes=filled, expected_bytes=length)
                filled += count
                notify.progress()
            _count_bytes(self._info.key, "in", length)
        except BaseException:
            body.close()
            raise
        return data


def upload_opus(
    local_path: Path,
    audio_id: int,
    date: str,
    *,
    bucket: Bucket | None = None,
    batch_id: str | None = None,
    member: str | None = None,
    sha256: str | None = None,
) -> str:
    """Store a recording under `processed/{date}/{audio_id}.opus` (date YYYY-MM-DD) and return the key.

    What is there is replaced. Raises Permanent if the file is not the one of `sha256`; Retryable, Fatal.
    """
    bucket = bucket or open_bucket()
    key = processed_key(date, audio_id)
    data = local_path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if sha256 not in (None, digest):
        raise Permanent(f"{local_path} has sha256 {digest}, not {sha256}: it was damaged on scratch. Unpack it again")
    md5 = hashlib.md5(data, usedforsecurity=False)
    metadata = {"sha256": digest}
    if batch_id is not None:
        metadata["batch_id"] = batch_id
    if member is not None:
        metadata |= _member_metadata(member)
    with _storing(bucket, key), asking(bucket, "PutObject", key):
        bucket.client.put_object(
            Bucket=bucket.name,
            Key=key,
            Body=data,
            ContentMD5=base64.b64encode(md5.digest()).decode(),
            ContentType="audio/ogg; codecs=opus",
            Metadata=metadata,
        )
    stored = _head_stored(bucket, key)  # what the store answered to PUT says less than what it has
    if _etag(stored) != md5.hexdigest():
        raise Retryable(
            f"PutObject {_place(bucket, key)}: the store has ETag {_etag(stored)}, not {md5.hexdigest()}. "
            "Upload again; if it recurs, see that the bucket is not encrypted with SSE-KMS",
            STORE,
        )
    _count_bytes(key, "out", len(data))
    return key


def archives(bucket: Bucket) -> Iterator[str]:
    """The batch_id of every archive in the store, in order; other objects there are passed over."""
    for key in _keys(bucket, "archives/"):
        batch_id = key.removeprefix("archives/").removesuffix(".tar")
        if BATCH_ID.fullmatch(batch_id) and key == archive_key(batch_id):
            yield batch_id


def processed_dates(bucket: Bucket) -> list[str]:
    """Each date (YYYY-MM-DD) of which there are processed recordings."""
    with asking(bucket, "ListObjects"):
        pages = bucket.client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket.name, Prefix="processed/", Delimiter="/"
        )
        prefixes = [prefix["Prefix"].split("/")[1] for page in pages for prefix in page.get("CommonPrefixes", [])]
    return sorted(date for date in prefixes if is_date(date))


def is_date(text: str) -> bool:
    """Whether a text is a day of the calendar as YYYY-MM-DD; other folders below processed/ are not ours."""
    try:
        return calendar_date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def processed(bucket: Bucket, date: str) -> dict[int, str]:
    """The processed recordings of a date: audio_id to key."""
    found = {}
    for key in _keys(bucket, f"processed/{date}/"):
        if match := re.fullmatch(r"processed/[0-9-]{10}/([0-9]{1,18})\.opus", key):
            found[int(match[1])] = key
    return found


def _keys(bucket: Bucket, prefix: str) -> Iterator[str]:
    with asking(bucket, "ListObjects"):
        for page in bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=prefix):
            yield from (entry["Key"] for entry in page.get("Contents", []))


@dataclass(frozen=True)
class Origin:
    """Where a processed recording comes from. `member` is cut where it is long; `member_sha1` is that of the whole."""

    batch_id: str
    member: str
    member_sha1: str


def origin(bucket: Bucket, key: str) -> Origin | None:
    """Where a processed recording comes from, as its metadata say; None if another client put it. Raises NotFound."""
    found = _head(bucket, key)["Metadata"]
    batch_id, member, sha1 = found.get("batch_id"), from_header(found.get("member")), found.get("member-sha1", "")
    if not (batch_id and BATCH_ID.fullmatch(batch_id) and member and re.fullmatch(r"[0-9a-f]{40}", sha1)):
        return None
    return Origin(batch_id, member, sha1)


def stored_at(bucket: Bucket, key: str) -> datetime | None:
    """When an object was stored, by the store's clock; None if it is not there."""
    try:
        at: datetime = _head(bucket, key)["LastModified"]
    except NotFound:
        return None
    return at


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was not finished; `began` by the store's clock."""

    key: str
    upload_id: str
    began: datetime


def unfinished_uploads(bucket: Bucket, prefix: str) -> list[Upload]:
    """Multipart uploads of keys that begin so. Raises Retryable, Fatal."""
    with asking(bucket, "ListMultipartUploads", prefix):
        pages = bucket.client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket.name, Prefix=prefix)
        found = [entry for page in pages for entry in page.get("Uploads", ())]
    return [Upload(entry["Key"], entry["UploadId"], entry["Initiated"]) for entry in found]


def upload_size(bucket: Bucket, upload: Upload) -> int:
    """Bytes that an unfinished upload takes in the store; 0 if it is not there any more. Raises Retryable, Fatal."""
    where = {"Bucket": bucket.name, "Key": upload.key, "UploadId": upload.upload_id}
    with asking(bucket, "ListParts", upload.key), suppress(bucket.client.exceptions.NoSuchUpload):
        pages = bucket.client.get_paginator("list_parts").paginate(**where)
        return sum(part["Size"] for page in pages for part in page.get("Parts", ()))
    return 0


def abort_upload(bucket: Bucket, upload: Upload) -> None:
    """Delete the parts of an unfinished upload; one that is not there is fine. Raises Retryable, Fatal."""
    with asking(bucket, "AbortMultipartUpload", upload.key), suppress(bucket.client.exceptions.NoSuchUpload):
        bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=upload.key, UploadId=upload.upload_id)


def delete_archive(s3_key: str, *, bucket: Bucket | None = None) -> None:
    """Delete an archive; one that is not there is fine. Raises Retryable, Fatal."""
    _delete(bucket or open_bucket(), s3_key)


def delete_opus(key: str, *, bucket: Bucket | None = None) -> None:
    """Delete a processed recording; one that is not there is fine. Raises Retryable, Fatal."""
    _delete(bucket or open_bucket(), key)


@contextmanager
def asking(bucket: Bucket, operation: str, key: str = "") -> Iterator[None]:
    """Around calls of the client: what boto3 or those below it raise becomes Retryable, NotFound, Fatal."""
    try:
        yield
        notify.progress()
    except (
        aws.BotoCoreError,
        aws.ClientError,
        Boto3Error,
        ResponseParserError,
        HTTPError,
        ssl.SSLError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise _translate(error, bucket, f"{operation} {_place(bucket, key)}") from error
    except KeyError as error:
        if error.args != ("ETag",):
            raise
        # s3transfer relies on it; something before the store said 200 for nothing.
        where = f"{operation} {_place(bucket, key)}"
        raise Retryable(f"{where}: the answer has no ETag; is that the store's answer?", STORE) from error
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if not _is_of_botocore(error):
            raise
        where = f"{operation} {_place(bucket, key)}"
        raise Retryable(f"{where}: {error}; is that the store's answer?", STORE) from error


def _is_of_botocore(error: Exception) -> bool:
    """Whether botocore, and none of ours after it, raised this: over headers that are none of a store."""
    modules: list[str] = [frame.f_globals["__name__"].split(".")[0] for frame, _line in walk_tb(error.__traceback__)]
    return [name for name in modules if name in ("botocore", "lab_audio")][-1] == "botocore"


_RETRYABLE_CODES = frozenset(
    [
        "BadDigest",
        "BrokenMPU",
        "IncompleteBody",
        "InvalidPart",
        "NoSuchUpload",
        "OperationAborted",
        "ConditionalRequestConflict",
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    ]
)
_CHECK_KEYS = "check S3_ACCESS_KEY and S3_SECRET_KEY, what their owner may do in this bucket, and this host's clock"
_CHECK_REGION = "check S3_REGION and S3_ENDPOINT"
_ADVICE = {
    "InvalidAccessKeyId": "check S3_ACCESS_KEY",
    "SignatureDoesNotMatch": "check S3_SECRET_KEY",
    "RequestTimeTooSkewed": "set this host's clock right",
    "NoSuchBucket": "create the bucket, or correct S3_BUCKET",
    "EntityTooLarge": "see whether a quota of the store is used up",
    "AuthorizationHeaderMalformed": _CHECK_REGION,
    "IllegalLocationConstraintException": _CHECK_REGION,
    "InvalidLocationConstraint": _CHECK_REGION,
    "PermanentRedirect": _CHECK_REGION,
}
_ADVICE_BY_STATUS = {
    301: _CHECK_REGION,
    400: _CHECK_REGION,
    401: _CHECK_KEYS,
    403: _CHECK_KEYS,
    501: "this store cannot do it",
}


def _translate(error: Exception, bucket: Bucket, where: str) -> LabAudioError:
    if isinstance(error, Boto3Error) and isinstance(error.__context__, aws.ClientError):
        error = error.__context__
    if isinstance(error, aws.ClientError):
        return _refused(error, bucket, where)
    what = f"{where}: {_without_secrets(bucket, str(error))}"
    if "CERTIFICATE_VERIFY_FAILED" in what:
        return Fatal(f"{what}; the object store's certificate is not trusted: set S3_CA_BUNDLE to the file of its CA")
    if isinstance(error, aws.BotoCoreError) and not isinstance(
        error, (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError)
    ):
        return Fatal(what)
    return Retryable(f"{what}; the object store is away, or the way to it is broken", STORE)


def _refused(error: aws.ClientError, bucket: Bucket, where: str) -> LabAudioError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    message = str(error.response.get("Error", {}).get("Message", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    words = dict.fromkeys(filter(None, (str(status or ""), code, _without_secrets(bucket, message))))
    what = f"{where}: {' '.join(words)}"
    if code in _ADVICE:
        return Fatal(f"{what}; {_ADVICE[code]}")
    if code == "NoSuchKey" or (status == 404 and code in ("", "404", "NotFound")):
        return NotFound(f"{what}; the object is not in the store")
    if status in (412, 416):
        return Retryable(f"{what}; the object has changed meanwhile: ask again", STORE)
    if code in _RETRYABLE_CODES or status in (408, 429) or (status >= 500 and status != 501):
        return Retryable(f"{what}; try again later", STORE)
    return Fatal(f"{what}; {_ADVICE_BY_STATUS.get(status, 'the store refuses this request')}")


def _without_secrets(bucket: Bucket, text: str) -> str:
    """A store's own words, which might repeat what it was sent."""
    keys = bucket.client._request_signer._credentials
    for secret in (keys.secret_key, keys.access_key):
        text = text.replace(secret, "***")
    return " ".join(text.split())[:300]


def _place(bucket: Bucket, key: str = "") -> str:
    parts = urlsplit(bucket.client.meta.endpoint_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/{bucket.name}" + (f"/{key}" if key else "")


def _ca_bundle(settings: S3Settings) -> str | None:
    """The settings' or the system's certificates; None leaves it to botocore, which brings its own."""
    if settings.s3_ca_bundle is not None:
        if not settings.s3_ca_bundle.is_file():
            raise ConfigError(f"S3_CA_BUNDLE: {settings.s3_ca_bundle} is not a file")
        return str(settings.s3_ca_bundle)
    for path in (os.environ.get("AWS_CA_BUNDLE"), ssl.get_default_verify_paths().cafile, SYSTEM_CA):
        if path and Path(path).is_file():
            return path
    return None


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _add_content_md5(params: dict[str, Any], **_: Any) -> None:
    """Swift before 2.35 refuses DeleteObjects without it, and botocore no longer sends it."""
    body = params["body"]
    digest = hashlib.md5(body.encode() if isinstance(body, str) else body, usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _digests(path: Path, part_size: int | None, sha256: str | None) -> tuple[str, str]:
    """(sha256, the ETag of a multipart upload in parts of this size, or of a single PUT)."""
    whole = None if sha256 else hashlib.sha256()
    parts: list[bytes] = []
    with path.open("rb", buffering=0) as file:
        while True:
            md5, left = hashlib.md5(usedforsecurity=False), part_size
            while block := file.read(MIB if left is None else min(MIB, left)):
                md5.update(block)
                notify.progress()
                if whole:
                    whole.update(block)
                if left is not None:
                    left -= len(block)
            if part_size is not None and left == part_size:
                break
            parts.append(md5.digest())
            if part_size is None:
                break
    etag = parts[0].hex()
    if part_size is not None:
        etag = f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
    return sha256 or (whole.hexdigest() if whole else ""), etag


def _is_stored(bucket: Bucket, key: str, size: int, sha256: str, etag: str) -> bool:
    """Whether these bytes are under the key. Raises Permanent if others are."""
    try:
        found = _head(bucket, key)
    except NotFound:
        return False
    claimed = found["Metadata"].get("sha256")
    if _etag(found) == etag and found["ContentLength"] == size and claimed in (None, sha256):
        return True
    if claimed != sha256:
        raise Permanent(
            f"{_place(bucket, key)} holds other bytes already ({found['ContentLength']} bytes, sha256 "
            f"{claimed or 'unknown'}; here {size} bytes, {sha256}): an archive is never overwritten. "
            "Give this batch a new id, or remove the object if it is known to be worthless"
        )
    # Our own upload of these bytes, cut off before it was verified.
    _delete(bucket, key)
    return False


def _abort_uploads(bucket: Bucket, key: str) -> None:
    for upload in unfinished_uploads(bucket, key):
        if upload.key == key:
            abort_upload(bucket, upload)


def _head(bucket: Bucket, key: str) -> dict[str, Any]:
    try:
        with asking(bucket, "HeadObject", key):
            found: dict[str, Any] = bucket.client.head_object(Bucket=bucket.name, Key=key)
            return found
    except NotFound:
        # A 404 to HEAD does not say what is missing; were it the bucket, no object would be to blame.
        check_bucket(bucket)
        raise


@contextmanager
def _storing(bucket: Bucket, key: str) -> Iterator[None]:
    """What is being stored cannot be missing: a 404 comes from something before the store, unless the bucket is."""
    try:
        yield
    except NotFound as error:
        check_bucket(bucket)
        raise Retryable(f"{error}, though it was to be stored: is that the store's answer?", STORE) from error


def _head_stored(bucket: Bucket, key: str) -> dict[str, Any]:
    """What the store has of an object that it has just said to have stored."""
    try:
        return _head(bucket, key)
    except NotFound:
        raise Retryable(f"{_place(bucket, key)}: the store said that it has it, and has it not", STORE) from None


def _info(bucket: Bucket, key: str) -> ArchiveInfo:
    found = _head(bucket, key)
    source, path = from_header(found["Metadata"].get("source")), from_header(found["Metadata"].get("source-path"))
    if source is not None and not is_utf8(source):
        source = None
    mtime_ns = found["Metadata"].get("source-mtime-ns", "")
    sha256 = found["Metadata"].get("sha256", "").lower()
    count = found["Metadata"].get("file-count", "")
    return ArchiveInfo(
        key,
        found["ContentLength"],
        sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else None,
        int(count) if re.fullmatch(r"[0-9]{1,9}", count) else None,
        _etag(found),
        source,
        SourceFile(path, found["ContentLength"], int(mtime_ns))
        if path and re.fullmatch(r"-?[0-9]{1,19}", mtime_ns) and abs(int(mtime_ns)) <= MAX_INTEGER
        else None,
    )


def _delete(bucket: Bucket, key: str) -> None:
    with suppress(NotFound), asking(bucket, "DeleteObject", key):
        bucket.client.delete_object(Bucket=bucket.name, Key=key)


def _etag(response: dict[str, Any]) -> str:
    return str(response.get("ETag", "")).strip('"')


def as_header(text: str) -> str:
    """Any text as the value of a header; it can be read back if it has at most MAX_METADATA characters."""
    return quote(text.encode("utf-8", "surrogateescape"), safe="/")


def from_header(value: str | None) -> str | None:
    """What `as_header` was given; None also for what no path can be: anybody may write metadata."""
    text = None if value is None else unquote_to_bytes(value).decode("utf-8", "surrogateescape")
    return None if text is None or "\0" in text else text


def _member_metadata(member: str) -> dict[str, str]:
    """A member's path as a header can carry it, cut to what Swift keeps, and the hash of the whole."""
    value = as_header(member)
    if len(value) > MAX_METADATA:
        value = re.sub(r"%[0-9A-F]?$", "", value[:MAX_METADATA])
    raw = member.encode("utf-8", "surrogateescape")
    return {"member": value, "member-sha1": hashlib.sha1(raw, usedforsecurity=False).hexdigest()}
