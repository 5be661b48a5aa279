"""Settings, each documented once: from the environment, and from files in $CREDENTIALS_DIRECTORY for secrets.

A worker names the settings class it needs; `load` turns anything wrong into one line per key.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from lab_audio.errors import ConfigError


def _url(*schemes: str) -> AfterValidator:
    def check(value: SecretStr | str) -> SecretStr | str:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        try:
            parts = urlsplit(text)
            ok = parts.scheme in schemes and bool(parts.hostname or parts.path) and parts.port != 0
        except ValueError:
            ok = False
        if not ok:
            raise ValueError(f"must be a URL {' or '.join(s + '://…' for s in schemes)}")
        return value

    return AfterValidator(check)


def _like(pattern: str, says: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {says}")
        return value

    return AfterValidator(check)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _comma_separated(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(extra="ignore", frozen=True, env_ignore_empty=True)

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe event that is logged"
    )


class LedgerSettings(_Settings):
    """Where the truth is."""

    database_url: Annotated[SecretStr, _url("postgresql", "postgres")] = Field(
        description="PostgreSQL, e.g. postgresql://lab_audio:PASSWORD@db.example.edu/lab_audio"
    )


class QueueSettings(_Settings):
    """Where jobs are delivered."""

    redis_url: Annotated[SecretStr, _url("redis", "rediss", "unix")] = Field(
        description="Redis or Valkey, e.g. redis://default:PASSWORD@redis.example.edu:6379/0"
    )


class S3Settings(_Settings):
    """Where archives and processed recordings are kept."""

    s3_endpoint: Annotated[str, _url("http", "https")] = Field(
        description="Object store, e.g. https://swift.example.edu:8080"
    )
    s3_access_key: SecretStr = Field(min_length=1, description="Access key of the object store")
    s3_secret_key: SecretStr = Field(min_length=1, description="Secret key of the object store")
    s3_bucket: Annotated[
        str, _like("[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "3 to 63 small letters, digits, dots and hyphens")
    ] = Field("audio-pipeline", description="Bucket")
    s3_region: str = Field("us-east-1", description="Region that requests are signed for")
    s3_ca_bundle: Path | None = Field(None, description="File of CA certificates, where the system's do not do")


class StoreSettings(LedgerSettings, QueueSettings, S3Settings):
    """All three stores."""


HOST_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"


class NamedSettings(_Settings):
    """Which host this is."""

    lab_host: Annotated[str, _like(HOST_NAME, "letters, digits, '.', '_' and '-', at most 63")] = Field(
        default_factory=lambda: socket.gethostname().split(".")[0],
        description="Name of this host in the ledger, in Redis lists and in logs (default: the host's name)",
    )


class WorkerSettings(NamedSettings):
    """What every worker has."""

    metrics_address: str = Field(
        "127.0.0.1", description="Address at which workers serve Prometheus metrics; see docs/metrics.md for the ports"
    )


class HostSettings(NamedSettings):
    """Where this host's scratch lies."""

    archive_after_batch: Literal["keep", "delete"] = Field(
        "keep", description="What happens to an archive once its batch is complete; one with a dead recording is kept"
    )
    scratch_root: AbsolutePath = Field(
        Path("/data/scratch"), description="Directory for work in progress, on a local disk"
    )


class MediaSettings(HostSettings):
    """How strangers' recordings are read."""

    allow_unsandboxed: bool = Field(
        False, description="Run ffmpeg without a sandbox where none works: only where every recording is trusted"
    )


class TransferSettings(StoreSettings, WorkerSettings):
    """The transfer worker."""

    source: Annotated[
        str, _like(r"ssh://[A-Za-z0-9_.-]+@[A-Za-z0-9_.:\[\]-]+/.+|/.+", "ssh://user@host[:port]/dir or /dir")
    ] = Field(description="Where recordings arrive: ssh://user@host[:port]/dir or /dir")
    source_fate: Literal["keep", "move", "delete"] = Field(
        "keep",
        description="What happens to a source file once its archive is verified; move puts it into .transferred/",
    )
    ssh_key: Path | None = Field(None, description="File of the private key for an ssh source")
    ssh_known_hosts: Path | None = Field(None, description="File of the source's pinned host keys")
    batch_files: int = Field(1000, ge=1, le=100_000, description="Most recordings in one archive")
    batch_bytes: int = Field(2_000_000_000, ge=1, description="Bytes of recordings after which an archive is closed")
    settle_seconds: int = Field(60, ge=0, description="A file is taken when it has not changed for this long")
    scan_seconds: int = Field(60, ge=1, description="Pause between two looks at the source")
    transfer_tmp: AbsolutePath = Field(
        Path("/var/tmp/lab-audio"), description="Directory for the one archive being built"
    )


class UnpackSettings(StoreSettings, MediaSettings, WorkerSettings):
    """The unpack worker."""

    transcode_threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        description="Recordings encoded at once (default: one a core)",
    )
    compressed_archives: bool = Field(
        False,
        description="Take archives packed with gzip, bzip2 or xz, up to 100 times their size; else they are refused",
    )
    opus_bitrate: int = Field(24_000, ge=6_000, le=256_000, description="Bits per second of the kept Opus")


class ModelSettings(MediaSettings):
    """Which models there are, and what they run on."""

    models_root: AbsolutePath = Field(Path("/data/models"), description="Directory of models: whisperx/ and gemma/")
    policies_dir: AbsolutePath = Field(
        Path("/etc/lab-audio/policies"), description="Directory of policy texts, one .txt each"
    )
    devices: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_separated)] = Field(
        (),
        description="Comma-separated devices, one process each: cuda:0,cuda:1 or cpu (default: all GPUs, else cpu)",
    )


class GpuSettings(StoreSettings, ModelSettings, WorkerSettings):
    """The GPU worker."""

    whisper_language: Annotated[str, _like("[a-z]{2,3}", "two or three small letters, as en")] | None = Field(
        None, description="Language of all recordings (default: detected)"
    )
    whisper_batch: int = Field(16, ge=1, description="Windows of speech in one WhisperX batch")
    align: bool = Field(
        False, description="Align words in time, for languages with a model in whisperx/align/{language}"
    )
    classify_batch: int = Field(8, ge=1, description="Recordings that are classified together")
    decode_threads: int = Field(2, ge=1, description="Recordings decoded ahead of the models")
    upload_threads: int = Field(4, ge=1, description="Recordings uploaded behind the models")
    max_attempts: int = Field(5, ge=2, description="Tries of one recording before it is set aside")


class TextfileSettings(NamedSettings):
    """Where what runs by a timer leaves its metrics."""

    textfile_directory: AbsolutePath | None = Field(
        None, description="Directory from which node_exporter reads *.prom files; not set: none are written"
    )


class ReconcileSettings(StoreSettings, TextfileSettings):
    """`lab-audio reconcile`."""

    host_grace_seconds: int = Field(
        600, ge=60, description="A host that has been silent for so long is lost: other hosts do its batches anew"
    )


class KeepingSettings(_Settings):
    """For how long archives are kept."""

    retention_days: int = Field(
        7, ge=1, le=36_500, description="Days that an archive is kept once its batch is complete"
    )


class RetentionSettings(StoreSettings, HostSettings, TextfileSettings, KeepingSettings):
    """`lab-audio retention`."""


class StuckSettings(_Settings):
    """When something takes too long."""

    stuck_seconds: int = Field(
        7200,
        ge=1,
        description="A batch that is open for so long is a warning, one without any progress for so long is failing",
    )


class MetricsSettings(StoreSettings, TextfileSettings, StuckSettings, KeepingSettings):
    """`lab-audio metrics`."""


class HealthSettings(StoreSettings, ModelSettings, StuckSettings, KeepingSettings):
    """`lab-audio check-health`."""


SettingsT = TypeVar("SettingsT", bound=BaseSettings)


def load(kind: type[SettingsT], **overrides: Any) -> SettingsT:
    """Read settings of one kind. Raises ConfigError with one line per key that is missing or wrong, never its value."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory and not Path(directory).is_dir():
        raise ConfigError(f"CREDENTIALS_DIRECTORY: {directory} is not a directory")
    try:
        return kind(_secrets_dir=directory, **overrides)
    except (SettingsError, UnicodeDecodeError) as error:
        raise ConfigError(f"CREDENTIALS_DIRECTORY: {directory}: {error}") from None
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_input=False):
            name = str(problem["loc"][0]) if problem["loc"] else "settings"
            field = kind.model_fields.get(name)
            about = f" ({field.description})" if field and field.description else ""
            what = (
                "is missing"
                if problem["type"] == "missing"
                else problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
            )
            lines.append(f"{name.upper()}: {what}{about}")
        raise ConfigError("\n".join(lines)) from None


def described(kinds: Sequence[type[BaseSettings]]) -> list[tuple[str, str, str]]:
    """Name, default and meaning of every setting of these kinds, each once."""
    rows: dict[str, tuple[str, str, str]] = {}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            if field.is_required():
                default = "required"
            elif field.default_factory is not None or field.default in (None, ()):
                default = ""
            else:
                default = str(field.default)
            rows[name] = (name.upper(), default, field.description or "")
    return list(rows.values())
