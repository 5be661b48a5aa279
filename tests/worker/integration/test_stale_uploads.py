"""Multipart uploads that were given up, against real stores."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lab_audio.operations import retention
from lab_audio.operations.reconcile import Stores
from lab_audio.operations.retention import Removal
from lab_audio.s3_utils import Bucket

MIB = 1 << 20
NOW = timedelta(seconds=-10)  # Swift's seconds are rounded up
KEYS = ["archives/20250622-143052-a1b2c3.tar", "processed/2025-06-22/42.opus", "elsewhere/x"]


def begin(bucket: Bucket, key: str, parts: int) -> str:
    """A multipart upload that was cut off after some parts. Returns its id."""
    client, where = bucket.client, {"Bucket": bucket.name, "Key": key}
    upload_id = client.create_multipart_upload(**where)["UploadId"]
    for number in range(1, parts + 1):
        client.upload_part(**where, UploadId=upload_id, PartNumber=number, Body=bytes(5 * MIB))
    return str(upload_id)


def unfinished(bucket: Bucket) -> list[str]:
    return [u["Key"] for u in bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])]


def test_uploads_that_were_given_up_are_aborted(bucket: Bucket) -> None:
    nothing: Any = None
    stores = Stores(nothing, nothing, bucket)
    for key in KEYS:
        begin(bucket, key, 2)
    begin(bucket, KEYS[0], 0)
    expected = sorted([Removal("upload", key, 10 * MIB) for key in KEYS[:2]] + [Removal("upload", KEYS[0], 0)], key=str)
    assert list(retention.uploads(stores, dry_run=False)) == []
    assert sorted(retention.uploads(stores, NOW, dry_run=True), key=str) == expected
    assert sorted(unfinished(bucket)) == sorted([*KEYS, KEYS[0]])
    assert sorted(retention.uploads(stores, NOW, dry_run=False), key=str) == expected
    assert unfinished(bucket) == ["elsewhere/x"]
    assert list(retention.uploads(stores, NOW, dry_run=False)) == []


def test_one_that_is_gone_meanwhile_does_no_harm(bucket: Bucket) -> None:
    nothing: Any = None
    stores = Stores(nothing, nothing, bucket)
    upload_ids = [begin(bucket, KEYS[0], 1) for _ in range(2)]
    sweep = retention.uploads(stores, NOW, dry_run=False)
    next(sweep)
    for upload_id in upload_ids:
        retention.s3_utils.abort_upload(bucket, retention.s3_utils.Upload(KEYS[0], upload_id, nothing))
    assert len(list(sweep)) == 1
    assert unfinished(bucket) == []
