"""Object stores, and a proxy before them."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from needed import needed

from lab_audio.config import S3Settings
from lab_audio.s3_utils import Bucket, ensure_bucket, open_bucket

from proxy import Proxy
from seaweedfs import SeaweedFS
from swift import Swift


@pytest.fixture(scope="session", params=[SeaweedFS, Swift], ids=["seaweedfs", "swift-tls"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running object store: endpoint, access_key, secret_key, ca_bundle."""
    with contextlib.ExitStack() as stack:
        with needed():
            server = stack.enter_context(request.param(tmp_path_factory.mktemp("store")))
        yield server


@pytest.fixture
def settings(store: Any) -> S3Settings:
    """Settings of a bucket of this test's own."""
    return S3Settings(
        s3_endpoint=store.endpoint,
        s3_access_key=store.access_key,
        s3_secret_key=store.secret_key,
        s3_ca_bundle=store.ca_bundle,
        s3_bucket=f"test-{uuid.uuid4().hex[:12]}",
    )


@pytest.fixture
def bucket(settings: S3Settings) -> Bucket:
    """An empty bucket; each request is tried twice."""
    opened = open_bucket(settings, attempts=2)
    ensure_bucket(opened)
    return opened


@pytest.fixture
def proxy(store: Any) -> Iterator[Proxy]:
    with Proxy(store) as running:
        yield running


@pytest.fixture
def through_proxy(bucket: Bucket, settings: S3Settings, proxy: Proxy) -> Bucket:
    """The same bucket, reached through the proxy."""
    changes = {"s3_endpoint": proxy.endpoint, "s3_ca_bundle": None}
    return open_bucket(settings.model_copy(update=changes), attempts=2)
