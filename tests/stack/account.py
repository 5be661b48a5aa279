"""The closing account: every recording came through exactly once, and nothing of the work is left.

It reads SQL, bucket and Redis, and knows nothing of lab_audio.
"""

from __future__ import annotations

from typing import Any


def account(
    ledger: Any, s3: Any, bucket: str, queue: Any, *, files: int, policies: int, on_scratch: int
) -> list[tuple[str, int, int]]:
    """Lines of the account, each with what is expected and what was found. `on_scratch`: bytes, of all hosts."""

    def count(query: str) -> int:
        with ledger.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {query}")
            return int(cursor.fetchone()[0])

    with ledger.cursor() as cursor:
        cursor.execute("SELECT s3_opus_path FROM audio_files WHERE state = 'done'")
        keys = {row[0] for row in cursor.fetchall()}
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="processed/")
    objects = {found["Key"] for page in pages for found in page.get("Contents", [])}
    return [
        ("recordings in the source", files, files),
        ("rows done in audio_files", files, count("audio_files WHERE state = 'done'")),
        ("rows in audio_files", files, count("audio_files")),
        ("rows in transcripts", files, count("transcripts")),
        (
            "rows in classifications (one a policy, where there is speech)",
            policies * count("transcripts WHERE speech"),
            count("classifications"),
        ),
        ("objects under processed/", files, len(objects)),
        ("objects that a row names", files, len(objects & keys)),
        ("batches not complete", 0, count("batches WHERE state <> 'complete' OR flags <> '{}'")),
        ("bytes left on scratch", 0, on_scratch),
        ("jobs left in Redis lists", 0, sum(queue.llen(name) for name in queue.scan_iter(_type="list"))),
        ("batch keys left in Redis", 0, sum(1 for _ in queue.scan_iter("batch:*"))),
    ]
