"""Two hosts and three GPU processes share one Redis and one ledger: 200 recordings, each exactly once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

import corpus
from lab import Lab, as_user

BATCHES, FILES = 5, 40
USERS = (61001, 61002)  # of nobody


def own_users(models: Path) -> tuple[int, int] | tuple[None, None]:
    """A user for each host, where we may become them and they can read the programs."""
    if os.getuid() != 0:
        warnings.warn("NOT SHOWN: hosts with users of their own (this needs root); both run as this user", stacklevel=2)
        return None, None
    probe = f"import lab_audio, os; os.listdir({str(models)!r})"
    probed = run_as(USERS[0], sys.executable, "-c", probe)
    if probed.returncode:
        why = probed.stderr.strip().splitlines()[-1:]
        warnings.warn(f"NOT SHOWN: hosts with users of their own; both run as root: {why}", stacklevel=2)
        return None, None
    return USERS


def run_as(uid: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*as_user(uid), *command], cwd="/", capture_output=True, text=True)


@pytest.mark.timeout(600)
def test_two_hosts_share_the_work_and_nothing_is_done_twice(lab: Lab, models: Path) -> None:
    texts = corpus.make_many(lab.source, BATCHES * FILES)
    assert len(texts) == BATCHES * FILES
    users = own_users(models)
    hosts = [lab.host(f"h{number}", uid) for number, uid in enumerate(users, 1)]
    gpus = [lab.start(hosts[0], "gpu-worker", DEVICES="cpu,cpu"), lab.start(hosts[1], "gpu-worker", DEVICES="cpu")]
    unpacks = [lab.start(host, "unpack-worker", TRANSCODE_THREADS="1") for host in hosts]
    for host, *programs in zip(hosts, gpus, unpacks, strict=True):
        lab.wait_ready(host, *programs)
        if host.uid is not None:
            other = hosts[host is hosts[0]].scratch
            assert "Permission denied" in run_as(host.uid, "ls", str(other)).stderr
    lab.run(lab.host("transfer"), "transfer-worker", "--once", BATCH_FILES=str(FILES))
    lab.wait_ended(BATCHES, *gpus, *unpacks, seconds=500)

    lab.account(BATCHES * FILES, *hosts)
    assert lab.rows("SELECT file_count, flags FROM batches") == [(FILES, [])] * BATCHES
    assert lab.rows("SELECT DISTINCT attempts FROM audio_files") == [(1,)]
    done = [Counter(event["audio_id"] for event in gpu.events("recording done")) for gpu in gpus]
    assert all(done)
    assert (done[0] + done[1]) == Counter(row[0] for row in lab.rows("SELECT audio_id FROM audio_files"))
    assert [sorted(event["slot"] for event in gpu.events("gpu slot ready")) for gpu in gpus] == [[0, 1], [0]]
    unpacked = [len(unpack.events("batch unpacked")) for unpack in unpacks]
    assert sum(unpacked) == BATCHES and all(unpacked)
    heard = dict(lab.rows("SELECT member, text FROM audio_files JOIN transcripts USING (audio_id)"))
    assert corpus.word_error_rate((truth, heard[name]) for name, truth in texts.items()) <= 0.20
    for program in (*unpacks, *gpus):
        assert program.terminate() == 0, program.tail()
