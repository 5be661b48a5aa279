"""The servers of the demo for tests, and an environment of a test's own on them."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings
from needed import needed

from stack import Stack

settings.register_profile("lab", deadline=None, print_blob=True)
settings.load_profile("lab")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """SeaweedFS, Valkey and PostgreSQL, for all tests of this process."""
    servers = Stack(tmp_path_factory.mktemp("stack"))
    with needed():
        servers.__enter__()
    try:
        yield servers
    finally:
        servers.stop()


@pytest.fixture
def env(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Settings of lab_audio with an empty bucket, Redis and database of this test; also in os.environ."""
    with stack.fresh() as fresh:
        for name, value in fresh.items():
            monkeypatch.setenv(name, value)
        yield fresh


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails says what the servers said last."""
    report = yield
    servers = item.funcargs.get("stack")
    if report.failed and servers and report.when != "teardown":  # when their logs may be gone
        report.sections += [(name, servers.last_words(name)) for name in ("seaweedfs", "valkey", "postgres")]
    return report
