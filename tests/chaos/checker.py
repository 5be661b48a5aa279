"""Whether all that was planted is accounted for. Reads SQL, bucket, Redis and disks; knows nothing of lab_audio."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import redis
from botocore.config import Config

from recordings import POLICIES, Planted, Recording, score, speaks

MAX_ATTEMPTS = 5
READ_BACK = 300  # objects that are fetched whole; of the others the store's ETag is compared
SHOWN = 5


@dataclass(frozen=True)
class Stores:
    """The three stores, and the directories of source and hosts."""

    database_url: str
    redis_url: str
    s3: Any
    bucket: str
    source: Path
    scratches: Sequence[Path]

    @classmethod
    def of(cls, env: dict[str, str], source: Path, scratches: Sequence[Path]) -> Stores:
        s3 = boto3.client(
            "s3",
            endpoint_url=env["S3_ENDPOINT"],
            aws_access_key_id=env["S3_ACCESS_KEY"],
            aws_secret_access_key=env["S3_SECRET_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 8, "mode": "standard"}),
        )
        return cls(env["DATABASE_URL"], env["REDIS_URL"], s3, env["S3_BUCKET"], source, scratches)

    def rows(self, query: str) -> list[Any]:
        connection = psycopg2.connect(self.database_url)
        try:
            with connection.cursor() as cursor:
                cursor.execute(query)
                return list(cursor.fetchall())
        finally:
            connection.close()

    def do(self, statement: str) -> None:
        connection = psycopg2.connect(self.database_url)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement)
        finally:
            connection.close()

    def objects(self) -> dict[str, str]:
        """Key to ETag of all that is in the bucket."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return {entry["Key"]: entry["ETag"].strip('"') for page in pages for entry in page.get("Contents", [])}

    def queue(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url, decode_responses=True)


def wrongs(planted: Planted, stores: Stores) -> list[str]:
    """What is wrong, in plain words; nothing if every recording is accounted for."""
    objects = stores.objects()
    wrong = list(wrong_items(planted, stores))
    wrong += wrong_results(planted, stores)
    wrong += wrong_objects(planted, stores, objects)
    wrong += wrong_batches(planted, stores, objects)
    wrong += left_over(planted, stores)
    return wrong


def expected_of(planted: Planted, stores: Stores) -> dict[tuple[str, str], Recording]:
    """(batch_id, member) of each planted recording. Which batch holds a source file, the ledger says."""
    where = {
        name: batch
        for batch, name in stores.rows(
            "SELECT batch_id, convert_from(path, 'UTF8') FROM source_files WHERE struck IS NULL"
        )
    }
    expected = {(where.get(name, "no batch"), name): recording for name, recording in planted.files.items()}
    for batch, members in planted.archives.items():
        if batch not in planted.damaged:
            expected |= {(batch, member): recording for member, recording in members.items()}
    return expected


def wrong_items(planted: Planted, stores: Stores) -> Iterable[str]:
    """Each planted recording is done or dead, exactly once, as its fate says; no attempt more than allowed."""
    doubled = stores.rows(
        "SELECT source, convert_from(path, 'UTF8'), count(*) FROM source_files WHERE struck IS NULL"
        " GROUP BY 1, 2 HAVING count(*) > 1"
    )
    yield from some("source files in two batches", doubled)
    expected = expected_of(planted, stores)
    rows = stores.rows("SELECT batch_id, member, state, attempts, reason, item FROM audio_files")
    count = Counter((batch, member) for batch, member, *_ in rows)
    yield from some("recordings that are lost", [key for key in expected if not count[key]])
    yield from some("recordings with more rows than one", [key for key in expected if count[key] > 1])
    yield from some("rows that nobody planted", [key for key in count if key not in expected])
    yield from some("items twice in a batch", [k for k, n in Counter((r[0], r[5]) for r in rows).items() if n > 1])
    for batch, member, state, attempts, reason, _ in rows:
        recording = expected.get((batch, member))
        if recording is None:
            continue
        about = f"{batch} {member} ({recording.fate}): {state} after {attempts} attempts, reason {reason!r}"
        wanted = "done" if recording.fate == "done" else "dead"
        if state != wanted:
            yield f"should be {wanted}: {about}"
        elif (state == "dead") != bool(reason):
            yield f"dead without a reason, or done with one: {about}"
        # BEGIN counts before it sees that the tries are used up; and again, if its process dies before BURY.
        elif attempts > MAX_ATTEMPTS:
            yield f"too many attempts: {about}"
        elif recording.fate in ("noise", "foreign") and attempts:
            yield f"never decodable, yet tried: {about}"


def wrong_results(planted: Planted, stores: Stores) -> Iterable[str]:
    """One transcript for each done row, saying what was recorded, and a label for each policy where there is speech."""
    expected = expected_of(planted, stores)
    transcripts = stores.rows(
        "SELECT a.batch_id, a.member, a.state, count(t.audio_id), max(t.text), bool_or(t.speech)"
        " FROM audio_files a LEFT JOIN transcripts t USING (audio_id) GROUP BY a.audio_id"
    )
    labels: Counter[tuple[str, str]] = Counter()
    for batch, member, policy, value, label in stores.rows(
        "SELECT batch_id, member, policy, c.score, label FROM classifications c JOIN audio_files USING (audio_id)"
    ):
        labels[batch, member] += 1
        recording = expected.get((batch, member))
        if recording and (
            value != score(recording.words, policy) or label != ("violates" if value >= 0.5 else "complies")
        ):
            yield f"label of another recording: {batch} {member} {policy} {value} {label}"
    for batch, member, state, count, words, speech in transcripts:
        recording = expected.get((batch, member))
        if recording is None:
            continue
        spoken = state == "done" and speaks(recording.words)
        if count != (state == "done"):
            yield f"{batch} {member} is {state} and has {count} transcripts"
        elif state == "done" and (words, speech) != (recording.words if spoken else "", spoken):
            yield f"transcript of another recording: {batch} {member}: {words!r}"
        if labels[batch, member] != (len(POLICIES) if spoken else 0):
            yield f"{batch} {member} is {state} and has {labels[batch, member]} labels"


def wrong_objects(planted: Planted, stores: Stores, objects: dict[str, str]) -> Iterable[str]:
    """Rows and objects are one to one, and each object is what ffmpeg makes of that recording."""
    expected = expected_of(planted, stores)
    rows = stores.rows(
        "SELECT audio_id, batch_id, member, date::text, s3_opus_path FROM audio_files WHERE state = 'done'"
    )
    keys = {row[4]: (row[1], row[2]) for row in rows}
    yield from some("object keys of two rows", [k for k, n in Counter(row[4] for row in rows).items() if n > 1])
    yield from some("objects under another key", [r[4] for r in rows if r[4] != f"processed/{r[3]}/{r[0]}.opus"])
    there = {key for key in objects if key.startswith("processed/")}
    yield from some("done, but its object is not there", sorted(f"{k} {keys[k]}" for k in keys.keys() - there))
    yield from some("objects of no done row", sorted(there - keys.keys()))
    known = [(key, expected[of].opus) for key, of in keys.items() if key in there and of in expected]
    yield from some(
        "objects that are not the recording", [k for k, opus in known if objects[k] != hashlib.md5(opus).hexdigest()]
    )
    for key, opus in random.Random(len(known)).sample(known, min(READ_BACK, len(known))):
        if stores.s3.get_object(Bucket=stores.bucket, Key=key)["Body"].read() != opus:
            yield f"object that is not the recording: {key}"


def wrong_batches(planted: Planted, stores: Stores, objects: dict[str, str]) -> Iterable[str]:
    """Each batch is complete, or failed where its archive was damaged; no host keeps one; each archive is there."""
    batches = stores.rows("SELECT batch_id, state, host, reason, archive_gone_at IS NOT NULL FROM batches")
    ids = {batch for batch, *_ in batches}
    yield from some("archives that are in no batch", sorted(planted.archives.keys() - ids))
    for batch, state, host, reason, _ in batches:
        wanted = "failed" if batch in planted.damaged else "complete"
        if (state, host) != (wanted, None):
            yield f"batch {batch} is {state} on {host or 'no host'} ({reason}), should be {wanted}"
    archives = {key for key in objects if key.startswith("archives/")}
    needed = {batch for batch, member in stores.rows("SELECT batch_id, member FROM audio_files WHERE state = 'dead'")}
    gone = {batch for batch, *_, gone in batches if gone}
    yield from some("archives deleted, though something in them is dead", sorted(gone & (needed | planted.damaged)))
    wanted_archives = {f"archives/{batch}.tar" for batch in ids - gone}
    yield from some("archives missing", sorted(wanted_archives - archives))
    yield from some("archives of no batch", sorted(archives - wanted_archives))
    unfated = "SELECT count(*) FROM source_files WHERE fate_at IS NULL AND struck IS NULL"
    if (open_ := stores.rows(unfated)[0][0]) != 0:
        yield f"{open_} source files whose fate was not done"


def left_over(planted: Planted, stores: Stores) -> Iterable[str]:
    """Nothing of the work is left: source, scratch, Redis, unfinished uploads."""
    yield from some("files left at the source", [str(p) for p in stores.source.rglob("*") if p.is_file()])
    for scratch in stores.scratches:
        left = sorted(path.name for path in scratch.iterdir()) if scratch.exists() else []
        yield from some(f"left on {scratch}", [name for name in left if name not in (".id", ".locks")])
    uploads = stores.s3.list_multipart_uploads(Bucket=stores.bucket).get("Uploads", [])
    yield from some("unfinished uploads", [upload["Key"] for upload in uploads])
    client = stores.queue()
    left = [key for key in client.scan_iter(count=1000) if key != "dead"]
    yield from some("left in Redis", sorted(left))
    yield from some("in dead, and good", [p for p in client.lrange("dead", 0, -1) if p not in planted.nonsense])


BEHIND = """
local jobs, behind = {}, {}
for _, name in ipairs(redis.call('KEYS', '*')) do
    if redis.call('TYPE', name).ok == 'list' then
        for _, job in ipairs(redis.call('LRANGE', name, 0, -1)) do jobs[job] = true end
    end
end
for _, key in ipairs(redis.call('KEYS', 'batch:*:total')) do
    local batch, flying = string.match(key, 'batch:(.*):total'), 0
    for job in pairs(jobs) do
        if string.find(job, batch, 1, true) and string.find(job, 'opus_path', 1, true) then flying = flying + 1 end
    end
    local processed = tonumber(redis.call('GET', 'batch:' .. batch .. ':processed') or '0')
    if tonumber(redis.call('GET', key)) - processed > flying then behind[#behind + 1] = batch end
end
return behind
"""


def counters_behind(stores: Stores) -> list[str]:
    """Batches whose counter does not cover the items that have no job any more; holds where Redis loses nothing."""
    with stores.queue() as client:
        return list(client.eval(BEHIND, 0))


def some(what: str, found: Sequence[Any]) -> Iterable[str]:
    """A line on what was found, with the first few; nothing if nothing was."""
    if found:
        more = ", ..." if len(found) > SHOWN else ""
        yield f"{what}: {len(found)} ({', '.join(str(one) for one in found[:SHOWN])}{more})"
