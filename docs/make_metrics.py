"""Write docs/metrics.md from the metrics that there are: python docs/make_metrics.py"""

from __future__ import annotations

from pathlib import Path

from lab_audio.metrics import ALL, PLACES, PORTS

PAGE = Path(__file__).with_name("metrics.md")

HEAD = """# Metrics

This page is written by `python docs/make_metrics.py`; a test fails when it is stale.

- Each worker serves its own metrics by HTTP at METRICS_ADDRESS (127.0.0.1):
{ports}.
  The GPU worker's parent serves what its processes report every five seconds, each with the label `device`.
- What is true of the whole comes from one place: `lab-audio metrics`, run each minute on one host.
  It, `lab-audio reconcile` and `lab-audio retention` write files for node_exporter into TEXTFILE_DIRECTORY, each whole
  or not at all; where that is not set they write none, and `lab-audio metrics` prints. The roles set it for timers
  only: a run by hand leaves no file that nobody writes anew.
  How old a file is says `node_textfile_mtime_seconds`.
- No label is a batch, a recording or a path: `lab-audio check-health` and `lab-audio batch ID` name these.
- Hosts, Redis, PostgreSQL and GPUs have exporters of their own.
"""


def page() -> str:
    """The whole page: a table for each place that metrics come from."""
    parts = [HEAD.format(ports=";\n".join(f"  `{worker}` at port {port}" for worker, port in PORTS.items()))]
    for place, registry in PLACES.items():
        parts.append(f"\n## {place}\n\n| metric | type | labels | unit | meaning |\n|---|---|---|---|---|\n")
        for one in ALL:
            if one.registry is registry:
                labels = ", ".join(f"`{label}`" for label in one.labels)
                parts.append(f"| `{one.name}` | {one.kind} | {labels} | {one.unit} | {one.meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
