"""The module utility that all four modules say their changes by."""

from __future__ import annotations

from ansible_collections.lab.audio.plugins.module_utils._changes import Changes


def test_nothing_noted_is_nothing_changed() -> None:
    assert Changes().result() == {"changed": False, "plan": [], "diff": {"before": {}, "after": {}}}


def test_the_diff_spans_from_the_first_before_to_the_last_after() -> None:
    changes = Changes()
    changes.note("format it", "filesystem", None, "ext4")
    changes.note("grow it", "size", 1, 2)
    changes.note("grow it more", "size", 2, 3)
    assert changes.result() == {
        "changed": True,
        "plan": ["format it", "grow it", "grow it more"],
        "diff": {"before": {"filesystem": None, "size": 1}, "after": {"filesystem": "ext4", "size": 3}},
    }
