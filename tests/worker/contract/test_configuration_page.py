"""docs/configuration.md says what the program knows."""

from __future__ import annotations

from docs.make_configuration import PAGE, page
from lab_audio.cli.workers import SETTINGS


def test_page_is_what_its_script_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "docs/configuration.md is stale: python docs/make_configuration.py"
    )


def test_every_setting_of_every_worker_has_one_row() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for kind in SETTINGS.values():
        for name in kind.model_fields:
            assert sum(line.startswith(f"| `{name.upper()}` |") for line in lines) == 1, name
