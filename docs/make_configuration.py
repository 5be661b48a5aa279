"""Write docs/configuration.md from the settings that the commands know: python docs/make_configuration.py"""

from __future__ import annotations

from pathlib import Path

from lab_audio.cli.workers import SETTINGS
from lab_audio.config import described

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Settings

This page is written by `python docs/make_configuration.py`; a test fails when it is stale.
`lab-audio settings` prints the same on a host, `lab-audio settings gpu-worker` those of one command.

- A setting comes from the environment variable of its name. An empty variable counts as not set.
- If `CREDENTIALS_DIRECTORY` is set, a setting that is not in the environment is read from the file of its
  name there (`s3_secret_key` or `S3_SECRET_KEY`). See [operations.md](operations.md#credentials).
- *required* has no default. An empty default is explained under "meaning", or means "not set".
- A wrong or missing setting is one line on stderr that names it, never its value, and exit code 78.
- `ALIGN` is `true` or `false`. `LOG_LEVEL` is `DEBUG`, `INFO`, `WARNING` or `ERROR`.
  `SOURCE_FATE` is `keep`, `move` or `delete`.

`migrate`, `pause`, `resume` and `batch` need `DATABASE_URL`; `status` needs `DATABASE_URL` and `REDIS_URL`;
`fetch-archive` needs the `S3_` settings; `dead` and `hosts forget` need all three.
"""


def page() -> str:
    """The whole page: a table for each group of commands that share settings, each setting once."""
    known: dict[tuple[str, str, str], list[str]] = {}
    for command, kind in SETTINGS.items():
        for row in described([kind]):
            known.setdefault(row, []).append(command)
    tables: dict[tuple[str, ...], list[str]] = {}
    for (name, default, meaning), commands in known.items():
        cells = f"`{name}`", default if default in ("", "required") else f"`{default}`", meaning
        line = " | ".join(cell.replace("|", "\\|") for cell in cells)
        tables.setdefault(tuple(commands), []).append(f"| {line} |")
    parts = [HEAD]
    for group in sorted(tables, key=len, reverse=True):
        title = "All" if len(group) == len(SETTINGS) else ", ".join(group)
        parts.append("\n".join([f"\n## {title}\n", "| setting | default | meaning |", "|---|---|---|"]))
        parts.append("\n" + "\n".join(tables[group]) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
