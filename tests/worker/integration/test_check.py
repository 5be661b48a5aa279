"""`lab-audio check`: what is wrong is said before a worker is started, by the name of the setting to correct."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner, Result

from lab_audio.cli import app


def check(*worker: str, **settings: str) -> Result:
    return CliRunner().invoke(app, ["check", *worker], env=settings)


def other_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.replace(str(parts.password), "not-the-password")).geturl()


def test_all_is_well(env: dict[str, str], tmp_path: Path) -> None:
    result = check("transfer-worker", SOURCE=str(tmp_path))
    assert result.exit_code == 0, result.output
    asked = ["settings", "PostgreSQL", "Redis", "object store", f"source {tmp_path}"]
    assert result.stdout.splitlines() == [f"{what}: good" for what in asked]
    assert check().exit_code == 0


def test_a_source_that_is_not_there(env: dict[str, str], tmp_path: Path) -> None:
    result = check("transfer-worker", SOURCE=f"{tmp_path}/gone")
    assert result.exit_code == 78
    assert f"SOURCE: directory {tmp_path}/gone cannot be entered" in result.stderr


@pytest.mark.parametrize("name", ["HOST_GRACE_SECONDS", "RETENTION_DAYS"])
def test_a_wrong_setting_of_a_job(env: dict[str, str], name: str) -> None:
    result = check(**{name: "-1"})
    assert result.exit_code == 78
    assert f"{name}: " in result.stderr


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL"])
def test_a_wrong_password(env: dict[str, str], name: str) -> None:
    result = check(**{name: other_password(env[name])})
    assert result.exit_code == 78
    assert f"{name}: " in result.stderr
    assert "refused" in result.stderr
    assert "not-the-password" not in result.output


def test_a_wrong_secret_key(env: dict[str, str]) -> None:
    result = check(S3_SECRET_KEY="not-the-secret")
    assert result.exit_code == 70
    assert "S3_SECRET_KEY" in result.stderr
    assert "not-the-secret" not in result.output


def test_a_store_that_does_not_answer(env: dict[str, str]) -> None:
    result = check(REDIS_URL="redis://default:secret@127.0.0.1:1/0")
    assert result.exit_code == 1
    assert "Redis at 127.0.0.1:1" in result.stderr


def test_a_bucket_that_is_missing_is_created_once(env: dict[str, str]) -> None:
    other = f"{env['S3_BUCKET']}-other"
    assert "create the bucket" in check(S3_BUCKET=other).stderr
    said = [CliRunner().invoke(app, ["ensure-bucket"], env={"S3_BUCKET": other}).stdout for _ in range(2)]
    assert said == [f"bucket {other} created\n", f"bucket {other} is there\n"]
    assert check(S3_BUCKET=other).exit_code == 0
