"""Each role's README says what its argument spec and its defaults say."""

from __future__ import annotations

from docs.make_roles import problems


def test_roles_agree_with_their_pages() -> None:
    assert not problems()
