"""Jobs: the payloads on `unpack` and `transcribe`, as other programs push and read them."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lab_audio.contracts import ITEM, archive_key, check_batch_id
from lab_audio.errors import Permanent

MAX_PAYLOAD_BYTES = 64 * 1024


class _Payload(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    def payload(self) -> str:
        return json.dumps(self.model_dump())


class UnpackJob(_Payload):
    """A job on `unpack`. A pushed payload stays byte-identical until it is acknowledged."""

    batch_id: str
    s3_key: str
    file_count: int = Field(ge=0, le=2**31 - 1)
    transferred_at: str = Field(max_length=64)


def new_unpack_job(batch_id: str, file_count: int) -> str:
    """The payload of a job made now."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return UnpackJob(
        batch_id=batch_id, s3_key=archive_key(batch_id), file_count=file_count, transferred_at=now
    ).payload()


class TranscribeJob(_Payload):
    """A job on `transcribe` or `transcribe:{host}`."""

    batch_id: str
    opus_path: str = Field(max_length=4096)
    original_filename: str = Field(max_length=4096)

    @property
    def item(self) -> str:
        return PurePosixPath(self.opus_path).stem


def _parse(model: type[Any], payload: str) -> Any:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Permanent(f"payload of {len(payload)} characters; at most {MAX_PAYLOAD_BYTES}")
    try:
        return model.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "payload"
        raise Permanent(f"{where}: {first['msg']}") from None


def parse_unpack_job(payload: str) -> UnpackJob:
    """Raises Permanent, naming the field, for anything but a job whose s3_key is its own batch's archive."""
    job: UnpackJob = _parse(UnpackJob, payload)
    if job.s3_key != archive_key(job.batch_id):
        raise Permanent(f"s3_key {job.s3_key[:120]!r} is not {archive_key(job.batch_id)}")
    return job


def parse_transcribe_job(payload: str) -> TranscribeJob:
    """Raises Permanent, naming the field, unless opus_path is `.../{batch_id}/{16 hex}.opus`.

    The root of the path is for the batch's host to check.
    """
    job: TranscribeJob = _parse(TranscribeJob, payload)
    check_batch_id(job.batch_id)
    path = PurePosixPath(job.opus_path)
    if not (
        path.is_absolute() and path.parent.name == job.batch_id and ITEM.fullmatch(path.stem) and path.suffix == ".opus"
    ):
        raise Permanent(f"opus_path {job.opus_path[:120]!r} is outside batch {job.batch_id}")
    return job
