"""What real workers serve to Prometheus while recordings go through them, and what is left for node_exporter."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections import defaultdict
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from lab_audio import metrics
from lab_audio.metrics import PORTS

import corpus
from lab import Lab, Program, wait_for

ADDRESS = "127.83.41.7"  # of this test alone
Labels = frozenset[tuple[str, str]]
NAMES = {one.name.removesuffix("_total") for one in metrics.ALL}


def parsed(text: str) -> dict[str, dict[Labels, float]]:
    """Each sample's values by labels; fails for one that is doubled, or of a metric that nobody has registered."""
    found: dict[str, dict[Labels, float]] = defaultdict(dict)
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.name in NAMES
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            assert labels not in found[sample.name], sample
            found[sample.name][labels] = sample.value
    return found


def served(worker: str) -> dict[str, dict[Labels, float]]:
    """What a worker serves; nothing while it does not."""
    connection = http.client.HTTPConnection(ADDRESS, PORTS[worker], timeout=20)
    try:
        connection.request("GET", "/metrics")
        return parsed(connection.getresponse().read().decode())
    except ConnectionRefusedError:
        return {}
    finally:
        connection.close()


def total(found: dict[str, dict[Labels, float]], name: str, **labels: str) -> float:
    """The sum of a metric over all samples that have these labels."""
    wanted = set(labels.items())
    return sum(value for has, value in found.get(name, {}).items() if wanted <= has)


def log_of(program: Program) -> list[dict[str, str]]:
    return [json.loads(line) for line in program.log.read_text().splitlines() if line.startswith("{")]


def test_workers_tell_what_they_do(lab: Lab, tmp_path: Path) -> None:
    texts = corpus.make_many(lab.source, 12)
    host, transfer = lab.host("h1"), lab.host("transfer")
    gpu = lab.start(host, "gpu-worker", DEVICES="cpu,cpu", METRICS_ADDRESS=ADDRESS)
    unpack = lab.start(host, "unpack-worker", METRICS_ADDRESS=ADDRESS)
    lab.wait_ready(host, gpu, unpack)
    assert wait_for("both devices", lambda: total(served("gpu-worker"), "lab_audio_devices", what="serving") == 2)
    sender = lab.start(transfer, "transfer-worker", METRICS_ADDRESS=ADDRESS)
    lab.wait_ended(1, gpu, unpack, sender)

    sent = served("transfer-worker")
    assert total(sent, "lab_audio_recordings_total", outcome="transferred") == len(texts)
    archive = sum(row[0] for row in lab.rows("SELECT size FROM batches"))
    assert total(sent, "lab_audio_transferred_bytes_total", what="archive", direction="out") == archive
    assert total(sent, "lab_audio_release_info") == 1

    unpacked = served("unpack-worker")
    assert total(unpacked, "lab_audio_recordings_total", outcome="encoded") == len(texts)
    assert total(unpacked, "lab_audio_transferred_bytes_total", what="archive", direction="in") == archive
    assert total(unpacked, "lab_audio_stage_seconds_count", stage="encode") == len(texts)
    disk = os.statvfs(host.scratch)
    assert total(unpacked, "lab_audio_scratch_bytes", what="size") == disk.f_blocks * disk.f_frsize
    assert 0 < total(unpacked, "lab_audio_scratch_bytes", what="batches_may_fill") < disk.f_blocks * disk.f_frsize

    wait_for("the last report", lambda: total(served("gpu-worker"), "lab_audio_recordings_total") == len(texts))
    done = served("gpu-worker")
    for device in ("cpu 0", "cpu 1"):
        assert total(done, "lab_audio_recordings_total", outcome="done", device=device) > 0
        assert total(done, "lab_audio_model_info", device=device) == 3
        for doing in ("work", "wait", "idle"):
            assert total(done, "lab_audio_models_seconds_total", doing=doing, device=device) > 0
    for stage in ("decode", "transcribe", "upload", "enter"):
        assert total(done, "lab_audio_stage_seconds_count", stage=stage) >= len(texts)
    seconds = lab.one("SELECT sum(seconds) FROM audio_files")
    assert abs(total(done, "lab_audio_audio_seconds_total") - seconds) < 0.1 * seconds

    # One id through all hosts.
    for batch_id, item in lab.rows("SELECT batch_id, item FROM audio_files"):
        went = [
            (event["event"], event["host"])
            for program in (sender, unpack, gpu)
            for event in log_of(program)
            if (event.get("batch_id"), event.get("item")) == (batch_id, item)
        ]
        assert went == [("recording uploaded", "transfer"), ("recording encoded", "h1"), ("recording done", "h1")]
    (event,) = [event for event in log_of(gpu) if event.get("event") == "recording done"][:1]
    assert event["attempt"] == 1 and float(event["duration"]) > 0

    # A process that is killed.
    os.kill(gpu.children()[0], signal.SIGKILL)
    wait_for("its death", lambda: total(served("gpu-worker"), "lab_audio_gpu_process_deaths_total", how="killed") == 1)
    wait_for("both devices again", lambda: total(served("gpu-worker"), "lab_audio_devices", what="serving") == 2)

    # The host's own view, while it works.
    lab.run(host, "reconcile", "--quick")
    said = json.loads(lab.run(host, "check-health", "--json"))
    assert {one["check"]: one["what"] for one in said["checks"]}["models loaded"] == "those on disk are loaded"
    for program in (sender, unpack, gpu):
        assert program.terminate() == 0


def test_the_whole_is_told_from_one_place(lab: Lab, tmp_path: Path) -> None:
    host = lab.host("h2")
    told = parsed(lab.run(host, "metrics"))
    assert total(told, "lab_audio_store_up") == 3
    assert set(told["lab_audio_host_model_info"]) > set()
    assert total(told, "lab_audio_open_recordings") == 0

    directory = host.directory / "textfiles"
    directory.mkdir()
    for command in ("metrics", "reconcile", "retention"):
        lab.run(host, command, TEXTFILE_DIRECTORY=str(directory))
    lab.run(host, "reconcile", "--quick", TEXTFILE_DIRECTORY=str(directory))
    files = {path.name: path for path in directory.iterdir()}
    assert sorted(files) == [f"lab_audio{name}.prom" for name in ("", "_audit", "_reconcile", "_retention")]
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o644}
    assert len(parsed(files["lab_audio_retention.prom"].read_text())) == 2
    found = [parsed(files[f"lab_audio_{job}.prom"].read_text()) for job in ("audit", "reconcile")]
    assert not set(found[0]["lab_audio_reconcile_found"]) & set(found[1]["lab_audio_reconcile_found"])
    told = parsed(lab.run(host, "metrics"))
    assert total(told, "lab_audio_run_age_seconds", job="reconcile") >= 0
    jobs = {dict(labels)["job"] for labels in told["lab_audio_run_age_seconds"]}
    assert jobs - {"source"} == {"metrics", "reconcile", "retention", "audit"}


def test_a_store_that_is_away_is_told_as_such(lab: Lab) -> None:
    program = lab.start(lab.host("h3"), "metrics", DATABASE_URL="postgresql://lab:secret@127.0.0.1:1/lab")
    assert program.wait() == 0
    told = parsed("".join(line + "\n" for line in program.log.read_text().splitlines() if not line.startswith("{")))
    assert told["lab_audio_store_up"][frozenset({("store", "PostgreSQL")})] == 0
    assert list(told) == ["lab_audio_store_up"]


def test_a_directory_that_cannot_be_written_is_said(lab: Lab) -> None:
    program = lab.start(lab.host("h4"), "metrics", TEXTFILE_DIRECTORY="/nonexistent")
    assert program.wait() == 78
    assert "TEXTFILE_DIRECTORY: /nonexistent cannot be written" in program.tail()
