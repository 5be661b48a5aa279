from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lab_audio.errors import ConfigError
from lab_audio.models.classifier import load_policies
from lab_audio.models.revision import revision

SAMPLES = Path(__file__).parents[3] / "inventories" / "single_node" / "policies"


def test_policies_come_by_name_with_the_hash_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("Über\r\nSpam\n".encode())
    (tmp_path / "a.txt").write_bytes(b"\n\nThreats\n")
    (tmp_path / "notes.md").write_text("not a policy")
    first, second = load_policies(tmp_path)
    assert (first.name, first.text) == ("a", "Threats")
    assert (second.name, second.text) == ("b", "Über\nSpam")
    assert first.sha256 == hashlib.sha256(b"\n\nThreats\n").hexdigest()


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00bad"])
def test_an_empty_or_binary_policy_is_a_wrong_setting(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "good.txt").write_text("Threats")
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"POLICIES_DIR: .*bad\.txt"):
        load_policies(tmp_path)


def test_no_policy_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="POLICIES_DIR"):
        load_policies(tmp_path)
    with pytest.raises(ConfigError, match="POLICIES_DIR"):
        load_policies(tmp_path / "absent")


def test_the_sample_policies_have_the_sections_of_cope() -> None:
    policies = load_policies(SAMPLES)
    assert [policy.name for policy in policies] == ["disclosure_of_personal_data", "threats_of_violence"]
    sections = ["Overview", "Definition of Terms", "Interpretation of Language", "Definition of Labels"]
    for policy in policies:
        places = [policy.text.index(f"{section}\n===") for section in sections]
        assert places == sorted(places)
        assert policy.text.index("Includes\n---") < policy.text.index("Excludes\n---")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.bin").write_bytes(bytes(5 << 20))
    return directory


def test_a_revision_is_of_content_and_names_not_of_place_or_time(weights: Path, tmp_path: Path) -> None:
    before = revision(weights)
    (weights / ".cache").mkdir()
    (weights / ".cache" / "download.metadata").write_text("1700000000")
    (weights / "model.bin").touch()
    moved = weights.rename(tmp_path / "moved")
    assert revision(moved) == before
    (moved / "config.json").rename(moved / "configuration.json")
    assert revision(moved) != before


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, (4 << 20) + 1, (5 << 20) - 1])
def test_a_byte_at_either_end_of_a_large_file_changes_the_revision(weights: Path, place: int) -> None:
    before = revision(weights)
    with (weights / "model.bin").open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    assert revision(weights) != before


def test_a_size_changes_the_revision(weights: Path) -> None:
    before = revision(weights)
    with (weights / "model.bin").open("ab") as file:
        file.write(bytes(1))
    assert revision(weights) != before


def test_a_manifest_names_the_revision(weights: Path) -> None:
    fingerprint = revision(weights)
    (weights / "manifest.json").write_text(json.dumps({"revision": "cope-a-9b 2025-06", "files": []}))
    assert revision(weights) == "cope-a-9b 2025-06"
    (weights / "manifest.json").write_text("{")
    assert revision(weights) not in ("cope-a-9b 2025-06", "")
    (weights / "manifest.json").unlink()
    assert revision(weights) == fingerprint
