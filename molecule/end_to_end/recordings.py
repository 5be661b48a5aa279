"""Recordings for the acts, and what becomes of them. DIR is where they were made.

recordings.py make DIR                 a directory for each act, DIR/ACT/*.mp3, and a tar of them, DIR.tar
recordings.py held HOST                wait until HOST is in the middle of a batch
recordings.py settle DIR ACT HOST...   wait until all that came up to ACT is done with, and settle the account

How to reach the stores comes from the environment, as a worker has it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import redis
from botocore.config import Config

STACK = Path(__file__).parents[2] / "tests" / "stack"
sys.path.insert(0, str(STACK))

# From a directory that is named only now.
import corpus  # noqa: E402
from account import account  # noqa: E402
from models import POLICIES  # noqa: E402

# How many come in each act; in the first, all that the demo has.
ACTS = {"deployed": 12, "joined": 16, "destroyed": 16, "upgraded": 20, "rolled_back": 16}
ACTS |= {"rebooted": 16, "restored": 16, "rotated": 16}
WORST_WER = 0.20
SECONDS = 1200


def make(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)  # an earlier run's
    texts = {}
    for number, (act, count) in enumerate(ACTS.items()):
        if act == "deployed":
            shutil.copytree(corpus.SOUNDS, directory / act)
            said = corpus.true_texts()
        else:
            said = corpus.make_many(directory / act, count, seed=number)
        texts[act] = {f"{act}/{name}": text for name, text in said.items()}
    (directory / "texts.json").write_text(json.dumps(texts))
    shutil.make_archive(str(directory), "tar", directory)


def held(ledger: Any, host: str) -> None:
    pending = "audio_files a JOIN batches b USING (batch_id) WHERE b.host = %s AND a.state = 'pending'"

    def look() -> str:
        return "" if one(ledger, f"SELECT count(*) FROM {pending}", host) else f"{host} has nothing in hand"

    wait(look)


def settle(ledger: Any, directory: Path, act: str, hosts: list[str]) -> None:
    texts = json.loads((directory / "texts.json").read_text())
    acts = list(texts)[: list(texts).index(act) + 1]
    truth = {path: text for act in acts for path, text in texts[act].items()}

    def look() -> str:
        settled = one(ledger, "SELECT count(*) FROM audio_files WHERE state <> 'pending'")
        opened = one(
            ledger, "SELECT count(*) FROM batches WHERE state NOT IN ('complete', 'failed') OR host IS NOT NULL"
        )
        if (settled, opened) != (len(truth), 0):
            return f"{settled} of {len(truth)} settled, {opened} batches open"
        return "; ".join(wrongs(ledger, truth, hosts))  # a job that came twice is dropped a moment later

    wait(look)


def wrongs(ledger: Any, truth: dict[str, str], hosts: list[str]) -> Iterator[str]:
    policies = len(list(POLICIES.glob("*.txt")))
    left = sum(map(on_scratch, hosts))
    with redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True) as queue:
        stores = (ledger, store(), os.environ["S3_BUCKET"], queue)
        for name, expected, found in account(*stores, files=len(truth), policies=policies, on_scratch=left):
            if expected != found:
                yield f"{name}: {found}, not {expected}"
    with ledger.cursor() as cursor:
        cursor.execute("SELECT member, text FROM audio_files JOIN transcripts USING (audio_id)")
        heard = dict(cursor.fetchall())
    rate = corpus.word_error_rate((text, heard.get(path) or "") for path, text in truth.items())
    if rate > WORST_WER:
        yield f"word error rate: {rate:.1%}, at most {WORST_WER:.0%}"


def wait(what: Callable[[], str]) -> None:
    """Until it has nothing more to say."""
    deadline = time.monotonic() + SECONDS
    while said := what():
        if time.monotonic() > deadline:
            sys.exit(f"after {SECONDS} s: {said}")
        time.sleep(0.5)


def one(ledger: Any, query: str, *values: object) -> Any:
    with ledger.cursor() as cursor:
        cursor.execute(query, values)
        return cursor.fetchone()[0]


def store() -> Any:
    return boto3.client(
        "s3",
        endpoint_url=os.environ["S3_ENDPOINT"],
        aws_access_key_id=os.environ["S3_ACCESS_KEY"],
        aws_secret_access_key=os.environ["S3_SECRET_KEY"],
        verify=os.environ["S3_CA_BUNDLE"],
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def on_scratch(host: str) -> int:
    """Bytes of batches on a host's scratch."""
    find = "find /data/scratch -mindepth 1 -not -path '*/.*' -printf '%s\\n'"
    done = subprocess.run(
        ["ssh", "-F", os.environ["SSH_CONFIG"], host, find], capture_output=True, text=True, check=True
    )
    return sum(map(int, done.stdout.split()))


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "make":
        make(Path(words[0]))
        return
    ledger = psycopg2.connect(os.environ["DATABASE_URL"])
    ledger.autocommit = True
    if command == "held":
        held(ledger, *words)
        return
    directory, act, *hosts = words
    settle(ledger, Path(directory), act, hosts)


if __name__ == "__main__":
    main()
