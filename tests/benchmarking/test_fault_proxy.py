"""The proxy delays, injects what it is told, counts by kind, and lets a thread of waiting requests through at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from uwm_jax import files
from uwm_jax.benchmarking.fault_proxy import fault_proxy, kind_of
from uwm_jax.files import place


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/storage/v1/b/bkt/o/a%2Fb?alt=media", "read"),
        ("GET", "/download/storage/v1/b/bkt/o/a?alt=media", "read"),
        ("GET", "/bkt/a/b", "read"),
        ("GET", "/storage/v1/b/bkt/o/a?fields=name", "stat"),
        ("GET", "/storage/v1/b/bkt/o?prefix=a", "list"),
        ("GET", "/storage/v1/b/bkt", "bucket"),
        ("POST", "/upload/storage/v1/b/bkt/o?uploadType=multipart", "write"),
        ("PUT", "/upload/resumable/1234", "write"),
        ("POST", "/storage/v1/b/bkt/o/a/rewriteTo/b/bkt/o/c", "copy"),
        ("POST", "/storage/v1/b?project=p", "bucket"),
        ("DELETE", "/storage/v1/b/bkt/o/a", "delete"),
    ],
)
def test_requests_are_counted_by_kind(method, path, kind):
    assert kind_of(method, path) == kind


def test_requests_wait_together(storage_emulator, bucket, monkeypatch):
    folder = place(bucket, "--workdir")
    files.write_bytes(folder / "a", bytes(100_000))
    with fault_proxy(storage_emulator.url, delay=0.2) as proxy, ThreadPoolExecutor(16) as pool:
        for name, value in proxy.environ.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        found = list(pool.map(lambda _: (folder / "a").read_bytes(), range(16)))
        seconds = time.monotonic() - began
        assert found == [bytes(100_000)] * 16 and proxy.requests == {"GET read": 16}
        assert proxy.pid not in (0, storage_emulator.pid)
    assert 0.2 <= seconds < 16 * 0.2
