# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The object store, for modules: one function for each call, whose errors name operation and place and say what to do.

What was stored is compared with the ETag that the store computed: the MD5 of a single PUT, the MD5 of the parts' MD5s
of a multipart upload (https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html).
Private: it may change with any release.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import hashlib
import ipaddress
import os
import re
import stat
import traceback
import typing as t
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib
from ansible_collections.lab.audio.plugins.module_utils._credentials import credential

try:
    import boto3
    from botocore import exceptions as aws
    from botocore.config import Config
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    BOTO3_ERROR = None
except ImportError:
    BOTO3_ERROR = traceback.format_exc()

MIB = 1 << 20
PART_SIZE = 16 * MIB
MAX_PARTS = 1000  # Swift's own limit; others take more
TRIES = 4
BOTO3 = [1, 36]
SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"
SHA256 = re.compile(r"[0-9a-f]{64}")
OTHERS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # where others may have put something

ARGUMENTS: dict[str, t.Any] = {
    "endpoint_url": {"type": "str", "fallback": (env_fallback, ["S3_ENDPOINT"])},
    "access_key": {"type": "str", "no_log": True, "fallback": (env_fallback, ["S3_ACCESS_KEY"])},
    "secret_key": {"type": "str", "no_log": True, "fallback": (env_fallback, ["S3_SECRET_KEY"])},
    "credentials_directory": {"type": "path", "fallback": (env_fallback, ["CREDENTIALS_DIRECTORY"])},
    "bucket": {"type": "str", "fallback": (env_fallback, ["S3_BUCKET"])},
    "region": {"type": "str", "fallback": (env_fallback, ["S3_REGION"])},
    "ca_bundle": {"type": "path", "fallback": (env_fallback, ["S3_CA_BUNDLE"])},
}

Function = t.TypeVar("Function", bound=t.Callable[..., t.Any])


class StoreError(Exception):
    """The store did not do it; the message says what, where, and what to do."""


class Missing(StoreError):
    """The object is not there."""


class Store(t.NamedTuple):
    """A bucket, and the client that reaches it."""

    client: t.Any
    bucket: str
    endpoint: str

    def place(self, key: str = "") -> str:
        return "/".join(filter(None, [self.endpoint, self.bucket, key]))


class Head(t.NamedTuple):
    """What the store says of an object; `sha256` is None if whoever put it did not say."""

    size: int
    etag: str
    sha256: str | None


class Digest(t.NamedTuple):
    """Of bytes that are to be stored: how many, their SHA-256 in hex, the MD5 of each part, and the ETag to come."""

    size: int
    sha256: str
    parts: tuple[bytes, ...]
    etag: str


def open_store(module: AnsibleModule) -> Store:
    """The store of these options; fails if one is missing or wrong. The store is not asked yet."""
    if BOTO3_ERROR:
        module.fail_json(msg=missing_required_lib("boto3"), exception=BOTO3_ERROR)
    if [int(part) for part in re.findall(r"[0-9]+", boto3.__version__)[:2]] < BOTO3:
        module.fail_json(msg=f"boto3 {boto3.__version__} is too old; {'.'.join(map(str, BOTO3))} or newer is needed")
    given = module.params
    endpoint = (given["endpoint_url"] or "").rstrip("/")
    access_key = credential(module, "access_key", "s3_access_key")
    secret_key = credential(module, "secret_key", "s3_secret_key")
    missing = [
        f"{option} (or {variable} in the environment of the host{also})"
        for option, variable, also, value in (
            ("endpoint_url", "S3_ENDPOINT", "", endpoint),
            ("access_key", "S3_ACCESS_KEY", ", or credentials_directory", access_key),
            ("secret_key", "S3_SECRET_KEY", ", or credentials_directory", secret_key),
        )
        if not value
    ]
    if missing:
        module.fail_json(msg=f"not given: {', '.join(missing)}")
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        parts = urlsplit("")
    if parts.password:
        module.no_log_values.add(parts.password)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        module.fail_json(msg="endpoint_url must be a URL such as https://swift.example.edu:8080, without credentials")
    ca_bundle = given["ca_bundle"]
    if ca_bundle and not os.path.isfile(ca_bundle):
        module.fail_json(msg=f"ca_bundle: {ca_bundle} is not a file")
    verify = ca_bundle or (SYSTEM_CA if os.path.isfile(SYSTEM_CA) else None)
    try:
        client = boto3.Session().client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=given["region"] or "us-east-1",
            verify=verify,
            config=Config(
                signature_version="s3v4",
                # Hashing a payload for its signature protects nothing that TLS does not.
                s3={
                    "addressing_style": "path",
                    "payload_signing_enabled": not (parts.scheme == "https" or is_loopback(parts.hostname)),
                },
                # Swift before 2.35 answers 501 to the checksums that botocore would send over TLS.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"mode": "standard", "total_max_attempts": TRIES},
                connect_timeout=10,
                read_timeout=60,
            ),
        )
    except (ValueError, aws.BotoCoreError) as error:
        module.fail_json(msg=f"endpoint_url or region cannot be used: {error}")
    return Store(client, given["bucket"] or "audio-pipeline", endpoint)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def operation(name: str) -> t.Callable[[Function], Function]:
    """Make a call of the client raise nothing but StoreError: `function(store, key, ...)`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def asking(store: Store, key: str = "", *arguments: t.Any, **named: t.Any) -> t.Any:
            try:
                return function(store, key, *arguments, **named)
            except aws.ClientError as error:
                raise refused(error, f"{name} {store.place(key)}") from error
            except (aws.BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
                raise StoreError(f"{name} {store.place(key)}: {unreachable(str(error))}") from error
            except KeyError as error:  # something before the store said 200 for nothing
                said = f"the answer has no {error.args[0]}; is that the store's answer?"
                raise StoreError(f"{name} {store.place(key)}: {said}") from error
            except (ResponseParserError, ValueError, ArithmeticError, RuntimeError) as error:
                said = f"{str(error).splitlines()[0]}; is that the store's answer?"
                raise StoreError(f"{name} {store.place(key)}: {said}") from error

        return asking  # type: ignore[return-value]

    return decorate


ADVICE = {
    "InvalidAccessKeyId": "check access_key",
    "SignatureDoesNotMatch": "check secret_key",
    "RequestTimeTooSkewed": "set this host's clock right",
    "NoSuchBucket": "create the bucket, or correct its name",
    "AuthorizationHeaderMalformed": "check region",
    "EntityTooLarge": "see whether a quota of the store is used up",
}
ADVICE_BY_STATUS = {
    301: "check region and endpoint_url",
    400: "check region and endpoint_url",
    401: "check access_key and secret_key",
    403: "check access_key and secret_key, what their owner may do in this bucket, and this host's clock",
    501: "this store cannot do it",
}


def refused(error: t.Any, where: str) -> StoreError:
    said = error.response.get("Error", {})
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(said.get("Code", ""))
    words = dict.fromkeys(filter(None, (str(status or ""), code, " ".join(str(said.get("Message", "")).split())[:200])))
    what = f"{where}: {' '.join(words)}"
    if code == "NoSuchKey" or (status == 404 and code in ("404", "NotFound")):
        return Missing(f"{what}; there is no such object")
    return StoreError(f"{what}; {ADVICE.get(code) or ADVICE_BY_STATUS.get(status, 'try again later')}")


def unreachable(said: str) -> str:
    said = " ".join(said.split())[:300]
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return f"{said}; the store's certificate is not trusted: set ca_bundle to the file of its authority"
    return f"{said}; is endpoint_url right, and can this host reach it?"


@operation("HeadBucket")
def check_bucket(store: Store, key: str = "") -> None:
    try:
        store.client.head_bucket(Bucket=store.bucket)
    except aws.ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
            raise StoreError(f"bucket {store.place()} does not exist: create it, or correct its name") from error
        raise


@operation("HeadObject")
def head(store: Store, key: str) -> Head | None:
    """What is under a key; None if nothing is, though the bucket is there."""
    try:
        found = store.client.head_object(Bucket=store.bucket, Key=key)
    except aws.ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:
            raise
        check_bucket(store)  # a 404 to HEAD does not say what is missing
        return None
    sha256 = found["Metadata"].get("sha256", "").lower()
    return Head(found["ContentLength"], found["ETag"].strip('"'), sha256 if SHA256.fullmatch(sha256) else None)


@operation("PutObject")
def put(store: Store, key: str, data: bytes | bytearray, md5: bytes, metadata: dict[str, str]) -> None:
    store.client.put_object(
        Bucket=store.bucket, Key=key, Body=data, Metadata=metadata, ContentMD5=base64.b64encode(md5).decode()
    )


@operation("CreateMultipartUpload")
def begin_upload(store: Store, key: str, metadata: dict[str, str]) -> str:
    return str(store.client.create_multipart_upload(Bucket=store.bucket, Key=key, Metadata=metadata)["UploadId"])


@operation("UploadPart")
def put_part(store: Store, key: str, upload: str, number: int, data: bytes | bytearray, md5: bytes) -> dict[str, t.Any]:
    answer = store.client.upload_part(
        Bucket=store.bucket,
        Key=key,
        UploadId=upload,
        PartNumber=number,
        Body=data,
        ContentMD5=base64.b64encode(md5).decode(),
    )
    return {"PartNumber": number, "ETag": answer["ETag"]}


@operation("CompleteMultipartUpload")
def end_upload(store: Store, key: str, upload: str, parts: list[dict[str, t.Any]]) -> None:
    store.client.complete_multipart_upload(
        Bucket=store.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
    )


@operation("ListMultipartUploads")
def unfinished_uploads(store: Store, key: str) -> list[str]:
    """Uploads of this key that somebody began and did not end."""
    pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=key)
    return [one["UploadId"] for page in pages for one in page.get("Uploads", ()) if one["Key"] == key]


@operation("AbortMultipartUpload")
def abort_upload(store: Store, key: str, upload: str) -> None:
    with contextlib.suppress(store.client.exceptions.NoSuchUpload):
        store.client.abort_multipart_upload(Bucket=store.bucket, Key=key, UploadId=upload)


@operation("ListObjects")
def keys(store: Store, prefix: str) -> list[tuple[str, int]]:
    """Key and size of each object whose key begins so."""
    pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=prefix)
    return [(one["Key"], one["Size"]) for page in pages for one in page.get("Contents", ())]


@operation("DeleteObject")
def delete(store: Store, key: str) -> None:
    store.client.delete_object(Bucket=store.bucket, Key=key)


@operation("GetObject")
def get_from(store: Store, key: str, start: int, etag: str) -> t.Any:
    """The body of an object from a byte on, as long as it is the one with this ETag."""
    return store.client.get_object(Bucket=store.bucket, Key=key, Range=f"bytes={start}-", IfMatch=f'"{etag}"')["Body"]


@operation("GetObject")
def read_block(store: Store, key: str, body: t.Any) -> bytes:
    return body.read(MIB)


def blocks(store: Store, key: str, found: Head) -> t.Iterator[bytes]:
    """An object's bytes. A body that breaks off is asked for again from there. Raises StoreError."""
    at, tries = 0, 0
    body = None
    while at < found.size:
        try:
            body = body or get_from(store, key, at, found.etag)
            block = read_block(store, key, body)
            if not block:
                raise StoreError(f"GetObject {store.place(key)}: ended after {at} of {found.size} bytes")
        except Missing:
            raise
        except StoreError:
            tries += 1
            if tries >= TRIES:
                raise
            body = None
            continue
        at += len(block)
        yield block


def part_size(size: int) -> int:
    """Bytes of a part, for an object of this size."""
    return max(PART_SIZE, -(-size // MAX_PARTS // MIB) * MIB)


def parts_of(stream: t.Iterable[bytes], size: int) -> t.Iterator[bytearray]:
    """The same bytes in parts of that size, which is more than a block's; the last is shorter.

    Takes the memory of one part, if the caller lets go of each before it asks for the next.
    """
    part = bytearray()
    for block in stream:
        missing = size - len(part)
        part += block[:missing]
        if len(part) == size:
            yield part
            part = bytearray(block[missing:])
    if part:
        yield part


def digest(stream: t.Iterable[bytes], size: int) -> Digest:
    """Read all of what is to be stored; `size`: how much it should be."""
    whole, parts, length = hashlib.sha256(), [], 0
    for part in parts_of(stream, part_size(size)):
        whole.update(part)
        parts.append(md5_of(part))
        length += len(part)
        del part
    parts = parts or [md5_of(b"")]
    etag = parts[0].hex() if len(parts) == 1 else f"{md5_of(b''.join(parts)).hex()}-{len(parts)}"
    return Digest(length, whole.hexdigest(), tuple(parts), etag)


def upload(store: Store, key: str, stream: t.Iterable[bytes], wanted: Digest, instead_of: Head | None = None) -> None:
    """Store bytes that were read before, and see that the store has them. What is there is replaced at the end.

    Raises StoreError, also if they are others than before.
    """
    metadata = {"sha256": wanted.sha256, "size": str(wanted.size)}
    parts = parts_of(stream, part_size(wanted.size))
    if len(wanted.parts) == 1:
        data = unchanged(next(parts, b""), wanted.parts[0])
        remove_parts(store, key, instead_of)
        put(store, key, data, wanted.parts[0], metadata)
    else:
        upload_parts(store, key, parts, wanted, metadata, instead_of)
    there = head(store, key)
    if there is None or (there.etag, there.size) != (wanted.etag, wanted.size):
        if there is not None and there.sha256 != wanted.sha256:
            raise StoreError(f"{store.place(key)}: another run has stored something else there meanwhile; it is left")
        delete(store, key)
        raise StoreError(
            f"{store.place(key)}: the store has {there or 'nothing'}, sent were {wanted.size} bytes with ETag"
            f" {wanted.etag}: damaged on the way; it is deleted, try again"
        )


def remove_parts(store: Store, key: str, there: Head | None) -> None:
    """Delete an object that was stored in parts: Swift would keep the parts of what is overwritten for ever.

    It is missing until the call after this one.
    """
    if there is not None and "-" in there.etag:
        delete(store, key)


def upload_parts(
    store: Store,
    key: str,
    parts: t.Iterator[bytes],
    wanted: Digest,
    metadata: dict[str, str],
    instead_of: Head | None,
) -> None:
    upload_id = begin_upload(store, key, metadata)
    try:
        done = []
        for number, md5 in enumerate(wanted.parts, 1):
            done.append(put_part(store, key, upload_id, number, unchanged(next(parts, b""), md5), md5))
        remove_parts(store, key, instead_of)
        end_upload(store, key, upload_id, done)
    except BaseException:
        with contextlib.suppress(StoreError):  # what went wrong first is what to say
            abort_upload(store, key, upload_id)
        raise


def unchanged(data: bytes | bytearray, md5: bytes) -> bytes | bytearray:
    """The same data. Raises StoreError if they are not what was read before."""
    if md5_of(data) != md5:
        raise StoreError("what is to be stored was changed while it was read: try again when it is at rest")
    return data


def md5_of(data: bytes | bytearray) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def file_blocks(path: str) -> t.Iterator[bytes]:
    with open(path, "rb") as file:
        while True:
            block = file.read(MIB)
            if not block:
                return
            yield block


def sha256_of(stream: t.Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for block in stream:
        whole.update(block)
    return whole.hexdigest()


def room(path: str) -> int:
    """Bytes that `download` may write: those free there, and those of what a killed run left."""
    there = os.statvfs(os.path.dirname(path) or ".")
    free = there.f_bavail * there.f_frsize
    with contextlib.suppress(FileNotFoundError):
        free += os.lstat(f"{path}.part").st_blocks * 512
    return free


def download(store: Store, key: str, found: Head, path: str) -> str:
    """Write an object to a file, whole or not at all; its SHA-256. Raises StoreError, OSError.

    Others may not read a new file. One that is replaced keeps its mode and, as far as that may be, its owner.
    """
    part, whole = f"{path}.part", hashlib.sha256()
    with alone(part) as file:
        try:
            for block in blocks(store, key, found):
                whole.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if found.sha256 not in (None, whole.hexdigest()):
                raise StoreError(
                    f"{store.place(key)}: its SHA-256 is {whole.hexdigest()}, but it was stored as {found.sha256}: it"
                    " is damaged in the store"
                )
            with contextlib.suppress(FileNotFoundError):
                was = os.stat(path)
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), was.st_uid, was.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(was.st_mode))
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
    return whole.hexdigest()


@contextlib.contextmanager
def alone(path: str) -> t.Iterator[t.BinaryIO]:
    """A new file to write to, which no other run writes to; what a killed run left there is dropped."""
    with contextlib.suppress(FileNotFoundError), open(os.open(path, os.O_RDONLY | OTHERS), "rb") as left:
        lock(left, path)
        os.unlink(path)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OTHERS, 0o600), "wb") as file:
        lock(file, path)
        yield file


def lock(file: t.IO[bytes], path: str) -> None:
    """Raises StoreError if another run has the file, or has put its own in its place."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise StoreError(f"{path} is being written by another run: try again when it has ended")
