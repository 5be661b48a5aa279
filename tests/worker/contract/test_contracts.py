"""What other programs rely on, to the letter: payloads, keys, columns, functions, settings, exit codes."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from pydantic_settings import BaseSettings

from lab_audio import config, contracts, ledger, queues, s3_utils
from lab_audio.errors import ConfigError, Permanent
from lab_audio.jobs import TranscribeJob, UnpackJob, new_unpack_job, parse_transcribe_job, parse_unpack_job
from lab_audio.workers.unpack_worker import transcribe_jobs

BATCH = "20250622-143052-a1b2c3"
UNPACK_JOB = (
    '{"batch_id": "20250622-143052-a1b2c3", "s3_key": "archives/20250622-143052-a1b2c3.tar",'
    ' "file_count": 847, "transferred_at": "2025-06-22T14:30:52Z"}'
)
ITEM = "2f1d6c0b9a8e7f35"
TRANSCRIBE_JOB = (
    '{"batch_id": "20250622-143052-a1b2c3", "opus_path": "/data/scratch/20250622-143052-a1b2c3/2f1d6c0b9a8e7f35.opus",'
    ' "original_filename": "Caf\\u00e9.MP3"}'
)
PROGRAM = Path(sys.executable).with_name("lab-audio")
WORKERS = ("transfer-worker", "unpack-worker", "gpu-worker")
SETTINGS = [
    kind
    for _, kind in inspect.getmembers(config, inspect.isclass)
    if issubclass(kind, BaseSettings) and kind.__module__ == config.__name__
]


def test_the_unpack_job_is_the_references_to_the_byte() -> None:
    job = UnpackJob(
        batch_id=BATCH, s3_key=f"archives/{BATCH}.tar", file_count=847, transferred_at="2025-06-22T14:30:52Z"
    )
    assert job.payload() == UNPACK_JOB
    assert parse_unpack_job(UNPACK_JOB) == job


def test_the_transfer_worker_pushes_that_job_with_the_time_in_utc() -> None:
    made = new_unpack_job(BATCH, 847)
    time = json.loads(made)["transferred_at"]
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", time)
    assert made == UNPACK_JOB.replace("2025-06-22T14:30:52Z", time)


def test_the_transcribe_job_is_the_references_to_the_byte() -> None:
    (made,) = transcribe_jobs(Path("/data/scratch"), BATCH, [(ITEM, "Café.MP3")])
    assert made == TRANSCRIBE_JOB
    path = f"/data/scratch/{BATCH}/{ITEM}.opus"
    assert parse_transcribe_job(TRANSCRIBE_JOB) == TranscribeJob(
        batch_id=BATCH, opus_path=path, original_filename="Café.MP3"
    )


def test_jobs_may_be_written_by_hand() -> None:
    """Other spaces, another order, more keys."""
    job = json.loads(UNPACK_JOB)
    by_hand = json.dumps({"note": "again", **dict(reversed(job.items()))}, indent=4)
    assert parse_unpack_job(by_hand) == parse_unpack_job(UNPACK_JOB)


def test_an_item_is_named_by_the_sha1_of_its_member() -> None:
    # printf 'calls/monday/call.mp3' | sha1sum
    assert contracts.item_of("calls/monday/call.mp3") == "ea68a2c1515b7b60"
    assert str(contracts.opus_path(Path("/data/scratch"), BATCH, ITEM)) == json.loads(TRANSCRIBE_JOB)["opus_path"]


def test_keys_and_lists() -> None:
    assert contracts.archive_key(BATCH) == f"archives/{BATCH}.tar"
    assert contracts.processed_key("2025-06-22", 42) == "processed/2025-06-22/42.opus"
    assert [contracts.batch_key(BATCH, field) for field in ("total", "processed", "s3_key")] == [
        f"batch:{BATCH}:total",
        f"batch:{BATCH}:processed",
        f"batch:{BATCH}:s3_key",
    ]
    assert (contracts.UNPACK, contracts.TRANSCRIBE, contracts.DEAD) == ("unpack", "transcribe", "dead")
    assert contracts.transcribe_list("gpu-1") == "transcribe:gpu-1"
    assert contracts.processing_list("gpu-1", "unpack", 0) == "processing:gpu-1:unpack:0"


@pytest.mark.parametrize(
    "batch_id", ["", "20250622", f"{BATCH}\n", f" {BATCH}", BATCH.upper(), f"../{BATCH}", f"{BATCH}/.."]
)
def test_no_key_is_made_of_what_is_no_batch_id(batch_id: str) -> None:
    for make in (contracts.archive_key, lambda b: contracts.batch_key(b, "total")):
        with pytest.raises(Permanent, match="batch_id"):
            make(batch_id)
    with pytest.raises(Permanent, match="batch_id"):
        contracts.opus_path(Path("/data/scratch"), batch_id, ITEM)


def test_redis_is_told_of_a_batch_by_the_references_three_keys(env: dict[str, str]) -> None:
    client = queues.open_queues(config.load(config.QueueSettings))
    queues.publish(client, "gpu-1", BATCH, 847, 0, [TRANSCRIBE_JOB])
    values = {key: client.get(key) for key in client.scan_iter("batch:*")}
    assert values == {
        f"batch:{BATCH}:total": "847",
        f"batch:{BATCH}:processed": "0",
        f"batch:{BATCH}:s3_key": f"archives/{BATCH}.tar",
    }
    assert client.lrange("transcribe:gpu-1", 0, -1) == [TRANSCRIBE_JOB]


COLUMNS = {
    "audio_files": {
        "audio_id": "bigint",
        "batch_id": "text",
        "member": "text",
        "item": "text",
        "original_filename": "text",
        "state": "text",
        "attempts": "integer",
        "reason": "text",
        "date": "date",
        "s3_opus_path": "text",
        "seconds": "double precision",
    },
    "transcripts": {
        "audio_id": "bigint",
        "text": "text",
        "language": "text",
        "segments": "jsonb",
        "speech": "boolean",
        "model": "text",
        "created_at": "timestamp with time zone",
    },
    "classifications": {
        "audio_id": "bigint",
        "policy": "text",
        "policy_sha256": "text",
        "label": "text",
        "score": "double precision",
        "model": "text",
        "adapter": "text",
        "created_at": "timestamp with time zone",
    },
    "batches": {
        "batch_id": "text",
        "state": "text",
        "reason": "text",
        "flags": "ARRAY",
        "host": "text",
        "job": "text",
        "sha256": "text",
        "size": "bigint",
        "file_count": "integer",
        **dict.fromkeys(
            [f"{state}_at" for state in ("minted", "uploaded", "unpacking", "ready", "complete", "failed")],
            "timestamp with time zone",
        ),
    },
    "hosts": {
        "host": "text",
        "seen_at": "timestamp with time zone",
        "paused": "boolean",
        "scratch_id": "text",
    },
}


def test_tables_have_the_columns_that_queries_of_others_name(env: dict[str, str]) -> None:
    ledger.migrate(ledger.open_ledger(config.load(config.LedgerSettings)))
    connection = psycopg2.connect(env["DATABASE_URL"])
    try:
        cursor = connection.cursor()
        cursor.execute(
            "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'"
        )
        found = {(table, column): kind for table, column, kind in cursor}
    finally:
        connection.close()
    promised = {(table, column): kind for table, columns in COLUMNS.items() for column, kind in columns.items()}
    assert {name: found.get(name) for name in promised} == promised


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("get_s3_client", []),
        ("upload_archive", ["local_path", "batch_id"]),
        ("download_archive", ["s3_key", "batch_id"]),
        ("upload_opus", ["local_path", "audio_id", "date"]),
        ("delete_archive", ["s3_key"]),
        ("cleanup_scratch", ["batch_id"]),
    ],
)
def test_s3_utils_takes_what_the_reference_gives(name: str, parameters: list[str]) -> None:
    """By position, in that order; whatever else it takes may be left out."""
    signature = inspect.signature(getattr(s3_utils, name))
    assert [p.name for p in signature.parameters.values() if p.default is p.empty] == parameters
    signature.bind(*parameters)
    assert list(signature.parameters)[: len(parameters)] == parameters


def test_get_s3_client_is_configured_by_the_environment_for_swift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT", "https://swift.example.edu:8080")
    monkeypatch.setenv("S3_ACCESS_KEY", "access")
    monkeypatch.setenv("S3_SECRET_KEY", "secret")
    client = s3_utils.get_s3_client()
    assert client.meta.endpoint_url == "https://swift.example.edu:8080"
    assert client.meta.config.signature_version == "s3v4"


def test_cleanup_scratch_obeys_scratch_root_and_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_ROOT", str(tmp_path))
    for folder in (BATCH, "20250622-143052-000000"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{ITEM}.opus").write_bytes(b"OggS")
    for _ in range(2):
        s3_utils.cleanup_scratch(BATCH)
        assert [path.name for path in tmp_path.iterdir()] == ["20250622-143052-000000"]
    with pytest.raises(Permanent):
        s3_utils.cleanup_scratch("..")
    assert tmp_path.exists()


def test_cleanup_scratch_ends_though_others_remove_files_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unlink = tmp_path / BATCH, os.unlink
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.opus").write_bytes(b"OggS")

    def too_late(name: Any, *arguments: Any, **named: Any) -> None:
        unlink(name, *arguments, **named)
        monkeypatch.undo()
        raise FileNotFoundError(errno.ENOENT, "removed by another", name)

    monkeypatch.setattr(os, "unlink", too_late)
    s3_utils.cleanup_scratch(BATCH, root=tmp_path)
    assert not folder.exists()


def test_cleanup_scratch_ends_though_a_result_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unlink = tmp_path / BATCH, os.unlink
    folder.mkdir()
    (folder / f"{ITEM}.opus").write_bytes(b"OggS")

    def beside_a_writer(name: Any, *arguments: Any, **named: Any) -> None:
        unlink(name, *arguments, **named)
        monkeypatch.undo()
        (folder / f"{ITEM}.json").write_bytes(b"{}")

    monkeypatch.setattr(os, "unlink", beside_a_writer)
    s3_utils.cleanup_scratch(BATCH, root=tmp_path)
    assert not folder.exists()


def test_settings_have_the_references_names_and_defaults() -> None:
    rows = {name: default for name, default, _ in config.described(SETTINGS)}
    promised = {
        "S3_ENDPOINT": "required",
        "S3_ACCESS_KEY": "required",
        "S3_SECRET_KEY": "required",
        "S3_BUCKET": "audio-pipeline",
        "SCRATCH_ROOT": "/data/scratch",
        "MODELS_ROOT": "/data/models",
    }
    assert {name: rows.get(name) for name in promised} == promised


def test_every_setting_says_what_it_means() -> None:
    assert len(SETTINGS) > 5
    for kind in SETTINGS:
        for name, field in kind.model_fields.items():
            assert len(field.description or "") > 5, f"{kind.__name__}.{name}"
    said = run("settings", COLUMNS="200").stdout
    for name, _, meaning in config.described(SETTINGS):
        assert name in said and meaning in said


@pytest.mark.parametrize("text, devices", [("cpu", ("cpu",)), ("cuda:0, cuda:1", ("cuda:0", "cuda:1")), ("", ())])
def test_devices_are_separated_by_commas(text: str, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DEVICES", text)
    assert config.load(config.GpuSettings).devices == devices


GOOD = {
    "DATABASE_URL": "postgresql://lab:hunter2@127.0.0.1:1/lab",
    "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
    "S3_ENDPOINT": "https://swift.example.edu:8080",
    "S3_ACCESS_KEY": "hunter2",
    "S3_SECRET_KEY": "hunter2",
    "SOURCE": "/srv/sounds",
    "LAB_HOST": "gpu-1",
}
REQUIRED = {
    "transfer-worker": {"DATABASE_URL", "REDIS_URL", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY", "SOURCE"},
    "unpack-worker": {"DATABASE_URL", "REDIS_URL", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY"},
    "gpu-worker": {"DATABASE_URL", "REDIS_URL", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY"},
}
WRONG = {
    "DATABASE_URL": "mysql://lab:hunter2@db/lab",
    "REDIS_URL": "http://:hunter2@redis:6379",
    "S3_ENDPOINT": "ftp://user:hunter2@store",
    "S3_BUCKET": "Hunter2 Bucket",
    "LAB_HOST": "../hunter2",
    "SCRATCH_ROOT": "hunter2/scratch",
    "LOG_LEVEL": "hunter2",
}
WRONG_OF = {
    "transfer-worker": {
        **{k: v for k, v in WRONG.items() if k not in ("LAB_HOST", "SCRATCH_ROOT")},
        "SOURCE": "ftp://hunter2",
        "SOURCE_FATE": "hunter2",
        "BATCH_FILES": "0",
    },
    "unpack-worker": {**WRONG, "OPUS_BITRATE": "hunter2"},
    "gpu-worker": {**WRONG, "MODELS_ROOT": "hunter2", "CLASSIFY_BATCH": "-1", "ALIGN": "hunter2"},
}


def run(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command with no other settings than these."""
    return subprocess.run(
        [str(PROGRAM), *argv],
        env={"PATH": os.environ["PATH"], **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def complaints(ended: subprocess.CompletedProcess[str], *, events: bool = False) -> list[str]:
    """The keys complained of, one a line; checks that nothing else and no secret is said. Workers do it by events."""
    assert ended.returncode == 78, ended.stderr
    assert ended.stdout == ""
    assert "hunter2" not in ended.stderr.casefold()
    assert "pattern" not in ended.stderr
    lines = ended.stderr.splitlines()
    if events:
        told = [json.loads(line) for line in lines]
        assert {event["level"] for event in told} == {"critical"}
        lines = [f"lab-audio: {event['reason']}" for event in told]
    named = [re.match(r"lab-audio: ([A-Z0-9_]+): \S", line) for line in lines]
    assert all(named), lines
    return [match[1] for match in named if match]


@pytest.mark.parametrize("worker", WORKERS)
def test_each_missing_setting_is_one_line_and_the_exit_code_78(worker: str) -> None:
    named = complaints(run(worker), events=True)
    assert sorted(named) == sorted(REQUIRED[worker])


@pytest.mark.parametrize("worker", WORKERS)
def test_each_wrong_setting_is_one_line_without_its_value(worker: str) -> None:
    wrong = WRONG_OF[worker]
    assert sorted(complaints(run(worker, **{**GOOD, **wrong}), events=True)) == sorted(wrong)


@pytest.mark.parametrize("command", ["migrate", "status", "pause --all", "resume h1", f"fetch-archive {BATCH}"])
def test_other_commands_complain_alike(command: str) -> None:
    assert set(complaints(run(*command.split()))) <= REQUIRED["gpu-worker"]


def test_an_empty_setting_is_a_missing_one() -> None:
    assert complaints(run("migrate", DATABASE_URL="")) == ["DATABASE_URL"]


def test_the_ledger_is_found_under_both_names_of_its_scheme(env: dict[str, str]) -> None:
    for scheme in ("postgres", "postgresql"):
        at = re.sub(r"^\w+://", f"{scheme}://", env["DATABASE_URL"])
        assert run("migrate", DATABASE_URL=at).returncode == 0


def test_secrets_come_from_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        if name in ("DATABASE_URL", "S3_SECRET_KEY"):
            (tmp_path / name.lower()).write_text(value + "\n")
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    settings = config.load(config.UnpackSettings)
    assert settings.database_url.get_secret_value() == GOOD["DATABASE_URL"]
    assert settings.s3_secret_key.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings) + str(settings.model_dump())


def test_a_directory_of_secrets_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/nowhere")
    with pytest.raises(ConfigError, match=r"^CREDENTIALS_DIRECTORY: /nowhere"):
        config.load(config.LedgerSettings)


@pytest.mark.parametrize(
    "command",
    [
        "",
        *WORKERS,
        "migrate",
        "status",
        "pause",
        "resume",
        "hosts",
        "reconcile",
        "retention",
        "dead",
        "fetch-archive",
        "settings",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    helped = run(*command.split(), "--help", COLUMNS="100")
    assert helped.returncode == 0
    assert "Usage: lab-audio" in helped.stdout
    assert len([line for line in helped.stdout.splitlines() if line.strip()]) > 3


def test_the_version_is_told() -> None:
    said = run("--version")
    assert (said.returncode, said.stdout) == (0, f"{metadata.version('lab-audio')}\n")


def test_a_ledger_that_refuses_is_a_matter_of_configuration(env: dict[str, str]) -> None:
    wrong = re.sub(r"//lab:[^@]+@", "//lab:hunter2@", env["DATABASE_URL"])
    assert complaints(run("migrate", DATABASE_URL=wrong)) == ["DATABASE_URL"]
