"""docs/metrics.md says which metrics there are, and there are no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from docs.make_metrics import PAGE, page
from lab_audio import metrics

SOURCE = Path(metrics.__file__).parent


def test_page_is_what_its_script_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/metrics.md is stale: python docs/make_metrics.py"


def test_metrics_are_made_in_one_module_only() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.name == "metrics.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prometheus_client"):
                assert [name.name for name in node.names] == ["CollectorRegistry"], path
            elif isinstance(node, ast.Import):
                assert not [name for name in node.names if name.name.startswith("prometheus_client")], path


def test_each_metric_is_registered_with_a_name_a_unit_and_a_meaning() -> None:
    names = [one.name for one in metrics.ALL]
    assert len(set(names)) == len(names) > 20
    registered = {family.name for place in metrics.PLACES.values() for family in place.collect()}
    assert registered == {name.removesuffix("_total") for name in names}
    for one in metrics.ALL:
        assert re.fullmatch(r"lab_audio_[a-z0-9_]+", one.name)
        assert one.unit and one.meaning
        assert one.name.removesuffix("_total").endswith("_" + one.unit) or one.unit not in ("seconds", "bytes")
        assert one.name.endswith("_total") == (one.kind == "counter")
        assert not {"batch_id", "item", "audio_id", "member", "path"} & set(one.labels)
