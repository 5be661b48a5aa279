"""Alerts say what they have to, are tested, and they and the dashboard ask only for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab_audio import metrics

CHECKOUT = Path(__file__).parents[3]
FILES = CHECKOUT / "roles" / "monitoring" / "files"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FILES / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
TESTS: list[dict[str, Any]] = yaml.safe_load((FILES / "rules_test.yml").read_text())["tests"]
PANELS: list[dict[str, Any]] = json.loads((FILES / "dashboard.json").read_text())["panels"]
# Prometheus' own, and node_exporter's
OTHERS = {"up", "ALERTS"}
SCRAPED = {"instance", "job", "device", "exported_job"}


def expressions() -> dict[str, str]:
    found = {rule["alert"]: rule["expr"] for rule in RULES}
    for panel in PANELS:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_has_what_it_needs(rule: dict[str, Any]) -> None:
    assert "for" in rule
    severities = set(re.sub(r"\{\{.*?\}\}", " ", rule["labels"]["severity"]).split())
    assert severities <= {"critical", "warning", "none"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["runbook"] == f"docs/runbooks/{rule['alert']}.md"
    page = (CHECKOUT / rule["annotations"]["runbook"]).read_text()
    parts = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    assert parts == [rule["alert"], "What it means", "How to look", "How to mend", "How to know that it is over"]


def test_each_runbook_is_of_an_alert() -> None:
    pages = {page.stem for page in (CHECKOUT / "docs" / "runbooks").glob("*.md")}
    assert pages == {rule["alert"] for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_is_tested_both_ways(rule: dict[str, Any]) -> None:
    cases = [case for one in TESTS for case in one["alert_rule_test"] if case["alertname"] == rule["alert"]]
    assert any(case.get("exp_alerts") for case in cases)
    # There is nothing by which Watchdog would not fire.
    assert rule["alert"] == "Watchdog" or any(not case.get("exp_alerts") for case in cases)


@pytest.mark.parametrize("expression", expressions().values(), ids=list(expressions()))
def test_metrics_and_their_labels_are_there(expression: str) -> None:
    known = {one.name: {*one.labels, *SCRAPED} for one in metrics.ALL}
    for one in metrics.ALL:
        if one.kind == "histogram":
            known |= {f"{one.name}{part}": known[one.name] | {"le"} for part in ("_bucket", "_count", "_sum")}
    for name, labels in re.findall(r"(?<!/)\b(lab_audio_\w+)(\{[^}]*\})?", expression):
        assert name in known, f"{name} is no metric of lab_audio.metrics"
        used = set(re.findall(r"(\w+)\s*(?:!~|=~|!=|=)", labels))
        assert used <= known[name], f"{name} has no label {used - known[name]}"
        if "exported_job" in used:
            assert "job" in {label for one in metrics.ALL if one.name == name for label in one.labels}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_outlives_a_minute_without_figures(rule: dict[str, Any]) -> None:
    """Where a store is away, what `lab-audio metrics` tells of it is stale at once."""
    passing = {one.name for one in metrics.ALL if one.registry in (metrics.LEDGER, metrics.LISTS)}
    bare = re.sub(r"last_over_time\([^()]*\[10m\]\)", "", rule["expr"])
    assert not passing & set(re.findall(r"lab_audio_\w+", bare))


def test_only_metrics_are_asked_for() -> None:
    """What is asked for is ours, node_exporter's or Prometheus' own."""
    names = {
        name for expression in expressions().values() for name in re.findall(r"\b(\w+)(?=\{|\[)", expression)
    } - OTHERS
    assert all(name.startswith(("lab_audio_", "node_")) for name in names), names


def test_figures_that_are_missing_look_like_no_zero() -> None:
    """Of alerts alone none is none."""
    zeros = {one["title"] for one in PANELS if "noValue" in one.get("fieldConfig", {}).get("defaults", {})}
    assert zeros == {"Alerts"}
