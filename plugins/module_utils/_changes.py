# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a module changes, said once: for `changed`, for the diff, and for the plan. Private: it may change any time."""

from __future__ import annotations

import typing as t


class Changes:
    """Collects what is not as wanted. Each change is noted before it is made, in check mode as in a run."""

    def __init__(self) -> None:
        self.plan: list[str] = []
        self._before: dict[str, t.Any] = {}
        self._after: dict[str, t.Any] = {}

    def note(self, step: str, name: str, before: t.Any, after: t.Any) -> None:
        """`step`: the sentence for people. `name`, `before`, `after`: the line of the diff. Never pass a secret."""
        self.plan.append(step)
        self._before.setdefault(name, before)
        self._after[name] = after

    def result(self) -> dict[str, t.Any]:
        """What every module returns of its changes: `changed`, `plan` and `diff`."""
        return {
            "changed": bool(self.plan),
            "plan": self.plan,
            "diff": {"before": self._before, "after": self._after},
        }
