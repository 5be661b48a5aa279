"""What the object store room makes of answers and settings; no store is asked."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import boto3.exceptions
import pytest
import urllib3.exceptions
from botocore import exceptions as aws
from botocore.awsrequest import AWSResponse
from botocore.parsers import ResponseParserError
from botocore.stub import Stubber
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_audio import s3_utils
from lab_audio.config import S3Settings
from lab_audio.contracts import item_of
from lab_audio.errors import ConfigError, Fatal, LabAudioError, NotFound, Permanent, Retryable
from lab_audio.s3_utils import Bucket, asking, open_bucket

BATCH = "20250622-143052-a1b2c3"
KEY = f"archives/{BATCH}.tar"
ENDPOINT = "https://store.example.edu:8080"
ACCESS, SECRET = "the-access-key", "the-secret-key"


def settings_for(endpoint: str = ENDPOINT, **more: Any) -> S3Settings:
    return S3Settings(s3_endpoint=endpoint, s3_access_key=ACCESS, s3_secret_key=SECRET, **more)  # type: ignore[arg-type]


@pytest.fixture
def bucket() -> Bucket:
    return open_bucket(settings_for(), attempts=1)


@pytest.mark.parametrize(
    ("status", "code", "kind", "advice"),
    [
        (500, "InternalError", Retryable, "try again"),
        (502, "", Retryable, "try again"),
        (503, "SlowDown", Retryable, "try again"),
        (507, "InsufficientStorage", Retryable, "try again"),
        (429, "TooManyRequests", Retryable, "try again"),
        (400, "RequestTimeout", Retryable, "try again"),
        (400, "BadDigest", Retryable, "try again"),
        (400, "XAmzContentSHA256Mismatch", Retryable, "try again"),
        (409, "OperationAborted", Retryable, "try again"),
        (412, "PreconditionFailed", Retryable, "changed"),
        (404, "NoSuchUpload", Retryable, "try again"),
        (404, "NoSuchKey", NotFound, "not in the store"),
        (404, "404", NotFound, "not in the store"),
        (404, "NoSuchBucket", Fatal, "S3_BUCKET"),
        (403, "InvalidAccessKeyId", Fatal, "S3_ACCESS_KEY"),
        (403, "SignatureDoesNotMatch", Fatal, "S3_SECRET_KEY"),
        (403, "AccessDenied", Fatal, "S3_ACCESS_KEY"),
        (403, "403", Fatal, "clock"),
        (401, "Unauthorized", Fatal, "S3_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", Fatal, "clock"),
        (400, "AuthorizationHeaderMalformed", Fatal, "S3_REGION"),
        (301, "PermanentRedirect", Fatal, "S3_REGION"),
        (501, "NotImplemented", Fatal, "cannot do it"),
        (413, "EntityTooLarge", Fatal, "quota"),
    ],
)
def test_refusals(bucket: Bucket, status: int, code: str, kind: type[LabAudioError], advice: str) -> None:
    with Stubber(bucket.client) as store:
        message = f"no,\nnot with {ACCESS} and {SECRET}"
        store.add_client_error("get_object", code, message, http_status_code=status)
        with pytest.raises(LabAudioError) as caught, asking(bucket, "GetObject", KEY):
            bucket.client.get_object(Bucket=bucket.name, Key=KEY)
    said = str(caught.value)
    assert type(caught.value) is kind
    for part in ("GetObject", f"{ENDPOINT}/audio-pipeline/{KEY}", code, str(status), advice):
        assert part in said
    assert ACCESS not in said and SECRET not in said and "\n" not in said


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (aws.EndpointConnectionError(endpoint_url=ENDPOINT), Retryable),
        (aws.ConnectTimeoutError(endpoint_url=ENDPOINT), Retryable),
        (aws.ReadTimeoutError(endpoint_url=ENDPOINT), Retryable),
        (aws.ConnectionClosedError(endpoint_url=ENDPOINT), Retryable),
        (aws.IncompleteReadError(actual_bytes=1, expected_bytes=2), Retryable),
        (aws.SSLError(endpoint_url=ENDPOINT, error="EOF occurred in violation of protocol"), Retryable),
        (aws.SSLError(endpoint_url=ENDPOINT, error="[SSL: CERTIFICATE_VERIFY_FAILED]"), Fatal),
        (ResponseParserError("not XML"), Retryable),
        (urllib3.exceptions.ProtocolError("broken"), Retryable),
        (ConnectionResetError(104, "reset"), Retryable),
        (TimeoutError("slow"), Retryable),
        (boto3.exceptions.S3UploadFailedError("of no known cause"), Retryable),
        (aws.ParamValidationError(report="Bucket"), Fatal),
        (aws.NoCredentialsError(), Fatal),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_failures(bucket: Bucket, error: Exception, kind: type[LabAudioError]) -> None:
    where = f"^GetObject {ENDPOINT}/audio-pipeline/k: "
    with pytest.raises(LabAudioError, match=where) as caught, asking(bucket, "GetObject", "k"):
        raise error
    assert type(caught.value) is kind


@pytest.mark.parametrize("code", ["NoSuchKey", "404"])
def test_deleting_what_is_not_there_is_fine(bucket: Bucket, code: str) -> None:
    with Stubber(bucket.client) as store:
        store.add_client_error("delete_object", code, http_status_code=404)
        s3_utils.delete_archive(KEY, bucket=bucket)
        store.assert_no_pending_responses()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("batch.tar"),
        PermissionError("x"),
        Permanent("x"),
        KeyError("x"),
        ValueError("x"),
        OverflowError(),
    ],
)
def test_what_is_not_of_the_store_passes(bucket: Bucket, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, asking(bucket, "GetObject"):
        raise error
    assert caught.value is error


def test_a_missing_bucket_is_no_fault_of_the_archive(bucket: Bucket) -> None:
    with Stubber(bucket.client) as store:
        store.add_client_error("head_object", "404", http_status_code=404)
        store.add_client_error("head_bucket", "404", http_status_code=404)
        with pytest.raises(Fatal, match="S3_BUCKET"):
            s3_utils.head_archive(BATCH, bucket=bucket)


def test_passwords_in_an_endpoint_are_not_said() -> None:
    bucket = open_bucket(settings_for("https://user:hush@store.example.edu"), attempts=1)
    with pytest.raises(Retryable) as caught, asking(bucket, "GetObject", "k"):
        raise TimeoutError
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "signed"),
    [
        ("https://store.example.edu", False),
        ("http://127.0.0.1:8080", False),
        ("http://[::1]:8080", False),
        ("http://localhost:8080", False),
        ("http://store.example.edu", True),
        ("http://10.0.0.7:8080", True),
        ("http://127.0.0.1.example.edu", True),
    ],
)
def test_payloads_are_signed_where_others_could_change_them(endpoint: str, signed: bool) -> None:
    sent: list[str] = []
    bucket = open_bucket(settings_for(endpoint), attempts=1)

    def answer(request: Any, **_: Any) -> None:
        sent.append(request.headers["X-Amz-Content-SHA256"].decode())
        raise TimeoutError

    bucket.client.meta.events.register("before-send.s3.PutObject", answer)
    with pytest.raises(Retryable), asking(bucket, "PutObject", "k"):
        bucket.client.put_object(Bucket="b", Key="k", Body=b"data")
    assert sent[0] == (hashlib.sha256(b"data").hexdigest() if signed else "UNSIGNED-PAYLOAD")


def test_a_ca_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="S3_CA_BUNDLE"):
        open_bucket(settings_for(s3_ca_bundle=tmp_path / "ca.pem"))


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match="S3_ENDPOINT"):
        s3_utils.get_s3_client()
    monkeypatch.setenv("S3_ENDPOINT", ENDPOINT)
    monkeypatch.setenv("S3_ACCESS_KEY", ACCESS)
    monkeypatch.setenv("S3_SECRET_KEY", SECRET)
    monkeypatch.setenv("S3_BUCKET", "other")
    assert s3_utils.get_s3_client().meta.endpoint_url == ENDPOINT
    assert open_bucket().name == "other"


@pytest.mark.parametrize("batch_id", ["../../etc/passwd", f"{BATCH}\n", "", f"x{BATCH}"])
def test_keys_and_paths_are_made_of_nothing_but_a_batch_id(bucket: Bucket, tmp_path: Path, batch_id: str) -> None:
    asks: list[Callable[[], object]] = [
        lambda: s3_utils.head_archive(batch_id, bucket=bucket),
        lambda: s3_utils.upload_archive(tmp_path, batch_id, bucket=bucket),
        lambda: s3_utils.download_archive(KEY, batch_id, bucket=bucket),
    ]
    for ask in asks:
        with pytest.raises(Permanent, match="batch_id"):
            ask()


@pytest.mark.parametrize(
    ("metadata", "sha256", "file_count"),
    [
        ({}, None, None),
        ({"sha256": "A" * 64, "file-count": "0847"}, "a" * 64, 847),
        ({"sha256": "abc", "file-count": "many"}, None, None),
        ({"sha256": "", "file-count": "-1"}, None, None),
    ],
)
def test_metadata_of_others(
    bucket: Bucket, metadata: dict[str, str], sha256: str | None, file_count: int | None
) -> None:
    with Stubber(bucket.client) as store:
        answer = {"ContentLength": 5, "Metadata": metadata, "ETag": '"e"'}
        store.add_response("head_object", answer, {"Bucket": "audio-pipeline", "Key": KEY})
        info = s3_utils.head_archive(BATCH, bucket=bucket)
    assert info == s3_utils.ArchiveInfo(KEY, 5, sha256, file_count, "e")


def test_a_store_that_sends_another_length_than_was_asked_for(bucket: Bucket) -> None:
    info = s3_utils.ArchiveInfo(KEY, 10, None, None)
    with Stubber(bucket.client) as store:
        store.add_response("get_object", {"ContentLength": 12, "Body": io.BytesIO(b"another body")})
        with (
            s3_utils.open_archive(info, bucket=bucket) as stream,
            pytest.raises(Retryable, match="12 bytes came for 10"),
        ):
            stream.drain()


class Recorder:
    """A client that takes one PutObject."""

    def put_object(self, **request: Any) -> None:
        self.request = request

    def head_object(self, **_: Any) -> dict[str, str]:
        return {"ETag": f'"{hashlib.md5(self.request["Body"]).hexdigest()}"'}


@settings(deadline=None)
@given(member=st.text(st.characters(exclude_categories=["Cs"]), max_size=400) | st.binary().map(os.fsdecode))
def test_any_member_fits_into_metadata(tmp_path_factory: pytest.TempPathFactory, member: str) -> None:
    opus = tmp_path_factory.getbasetemp() / "x.opus"
    opus.write_bytes(b"sound")
    client = Recorder()
    key = s3_utils.upload_opus(opus, 7, "2025-06-22", bucket=Bucket(client, "b"), batch_id=BATCH, member=member)
    metadata = client.request["Metadata"]
    raw = member.encode("utf-8", "surrogateescape")
    kept = metadata["member"]
    assert key == client.request["Key"] == "processed/2025-06-22/7.opus"
    assert kept.isascii() and len(kept) <= 256 and kept == kept.strip()
    # The whole of it, or as much as fits; each escape whole.
    assert raw.startswith(unquote_to_bytes(kept))
    assert unquote_to_bytes(kept) == raw or len(kept) > 253
    assert metadata["member-sha1"] == hashlib.sha1(raw).hexdigest()
    assert metadata["member-sha1"].startswith(item_of(member))
    assert base64.b64decode(client.request["ContentMD5"]) == hashlib.md5(b"sound").digest()


def test_an_etag_that_is_no_md5(tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "x.opus").write_bytes(b"sound")
    with Stubber(bucket.client) as store:
        store.add_response("put_object", {})
        store.add_response("head_object", {"ETag": '"of another kind"'})
        with pytest.raises(Retryable, match="SSE-KMS"):
            s3_utils.upload_opus(tmp_path / "x.opus", 1, "2025-06-22", bucket=bucket)


def test_a_put_that_the_store_only_said_it_did(tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "x.opus").write_bytes(b"sound")
    with Stubber(bucket.client) as store:
        store.add_response("put_object", {"ETag": f'"{hashlib.md5(b"sound").hexdigest()}"'})
        store.add_client_error("head_object", "404", http_status_code=404)
        store.add_response("head_bucket", {})
        with pytest.raises(Retryable, match="said that it has it"):
            s3_utils.upload_opus(tmp_path / "x.opus", 1, "2025-06-22", bucket=bucket)


def test_a_404_to_what_is_being_stored_blames_nobody(tmp_path: Path, bucket: Bucket) -> None:
    """A proxy that does not find its backend answers so."""
    (tmp_path / "x.opus").write_bytes(b"sound")
    with Stubber(bucket.client) as store:
        store.add_client_error("put_object", "404", http_status_code=404)
        store.add_response("head_bucket", {})
        with pytest.raises(Retryable, match="though it was to be stored"):
            s3_utils.upload_opus(tmp_path / "x.opus", 1, "2025-06-22", bucket=bucket)


def test_a_404_to_a_part_of_an_archive_that_is_there(bucket: Bucket) -> None:
    info = s3_utils.ArchiveInfo(KEY, 10, None, None)
    with Stubber(bucket.client) as store:
        store.add_client_error("get_object", "404", http_status_code=404)
        store.add_response("head_object", {"ContentLength": 10})
        with (
            s3_utils.open_archive(info, bucket=bucket) as stream,
            pytest.raises(Retryable, match="though it is there"),
        ):
            stream.drain()


def test_headers_that_are_none_of_a_store_are_asked_for_again(bucket: Bucket) -> None:
    def answer(request: Any, **_: Any) -> AWSResponse:
        return AWSResponse(request.url, 200, {"Content-Length": "many"}, Raw())

    bucket.client.meta.events.register("before-send.s3", answer)
    with pytest.raises(Retryable, match=r"many.*is that the store's answer"):
        s3_utils.head_archive(BATCH, bucket=bucket)


class Small:
    """A store before the client; `odd`: what it answers to methods instead, once each."""

    def __init__(self, bucket: Bucket, headers: dict[str, str], **odd: int) -> None:
        self.headers, self.odd, self.objects = headers, odd, dict[str, bytes]()
        bucket.client.meta.events.register("before-send.s3", self.answer)

    def answer(self, request: Any, **_: Any) -> AWSResponse:
        status, body = self.odd.pop(request.method, 200), b""
        if request.method == "PUT":
            self.objects[request.url] = request.body.read()
        elif request.method == "DELETE":
            self.objects.pop(request.url, None)
        elif request.method == "GET":
            body = self.objects.get(request.url, b"")
        return AWSResponse(request.url, status, {**self.headers, "Content-Length": str(len(body))}, Raw(body))


@pytest.mark.parametrize("headers", [{}, {"Date": ""}, {"Date": "soon"}])
def test_a_store_that_tells_no_time_works_all_the_same(bucket: Bucket, headers: dict[str, str]) -> None:
    store = Small(bucket, headers)
    assert s3_utils.prove(bucket, "health/h1") == 0
    assert store.objects == {}


def test_the_clock_of_a_store(bucket: Bucket) -> None:
    Small(bucket, {"Date": "Thu, 01 Jan 1970 00:01:00 GMT"})
    assert s3_utils.prove(bucket, "health/h1") > 1e9


def test_what_another_run_on_this_host_has_deleted_is_put_once_more(bucket: Bucket) -> None:
    store = Small(bucket, {}, GET=404)
    s3_utils.prove(bucket, "health/h1")
    assert store.objects == {} == store.odd


def test_an_object_that_cannot_be_read_is_not_left_behind(bucket: Bucket) -> None:
    store = Small(bucket, {}, GET=503)
    with pytest.raises(Retryable, match="GetObject"):
        s3_utils.prove(bucket, "health/h1")
    assert store.objects == {}


def test_an_answer_without_an_etag_is_asked_for_again(bucket: Bucket, tmp_path: Path) -> None:
    """Something before the store that says 200 for nothing; s3transfer relies on what is not there."""
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(1 << 20))
    headers = {"Content-Length": "0"}
    said = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"

    def answer(request: Any, **_: Any) -> AWSResponse:
        body = said if "uploads" in request.url else b""
        status = 404 if request.method == "HEAD" and KEY in request.url else 200
        return AWSResponse(request.url, status, headers, Raw(body))

    bucket.client.meta.events.register("before-send.s3", answer)
    with pytest.raises(Retryable, match="the answer has no ETag"):
        s3_utils.upload_archive(path, BATCH, bucket=bucket, part_size=1 << 19)


class Raw(io.BytesIO):
    """A body as urllib3 gives it."""

    def stream(self, *_: Any, **__: Any) -> list[bytes]:
        return [self.read()]
