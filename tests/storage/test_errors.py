"""Failures of the libraries that reach buckets themselves, told apart as they are raised."""

from __future__ import annotations

import errno

import pytest

from uwm_jax import cli
from uwm_jax.errors import RunError
from uwm_jax.storage.errors import StorageError, is_passing, told


def of_library(module: str, name: str, *args: object) -> BaseException:
    return getattr(pytest.importorskip(module), name)(*args)


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_library("gcsfs.retry", "HttpError", {"code": 503, "message": "busy"}),
        lambda: of_library("gcsfs.retry", "HttpError", {"code": 429, "message": "slow down"}),
        lambda: of_library("gcsfs.retry", "ChecksumError", "differs"),
        lambda: of_library("aiohttp", "ServerDisconnectedError"),
        lambda: of_library("aiohttp", "ClientPayloadError", "cut"),
        lambda: of_library("requests.exceptions", "ReadTimeout"),
        lambda: of_library("urllib3.exceptions", "IncompleteRead", 1, 2),
        lambda: of_library("google.auth.exceptions", "TransportError", "no network"),
        lambda: TimeoutError(),
        lambda: ConnectionResetError(errno.ECONNRESET, "reset"),
        lambda: ValueError("UNAVAILABLE: Error reading gs://b/k: HTTP response code: 503 [source locations=...]"),
        lambda: ValueError("DEADLINE_EXCEEDED: CURL error Timeout was reached: Operation too slow."),
    ],
)
def test_these_may_go_away(make):
    error = make()
    assert is_passing(error)
    wrapped = KeyError("in a library of ours")
    wrapped.__cause__ = error
    assert is_passing(wrapped)


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_library("gcsfs.retry", "HttpError", {"code": 403, "message": "forbidden"}),
        lambda: of_library("google.auth.exceptions", "RefreshError", "invalid_grant"),
        lambda: ValueError("NOT_FOUND: Error reading gs://b/k: HTTP response code: 404"),
        lambda: ValueError("DATA_LOSS: checksum of 503 bytes differs"),
        lambda: FileNotFoundError(errno.ENOENT, "no such file", "gs://b/k"),
        lambda: StorageError("reading", "gs://b/k", "503 busy (9 attempts in 170 s)", status=503),
        lambda: RunError("timed out"),
        lambda: IndexError(503),
    ],
)
def test_these_stay(make):
    assert not is_passing(make())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: of_library("gcsfs.retry", "HttpError", {"code": 401, "message": "Unauthorized"}), "gcloud auth"),
        (lambda: OSError("Forbidden: https://storage.googleapis.com/b\nno access"), "gcloud auth"),
        (lambda: ValueError("PERMISSION_DENIED: Error reading gs://b/k [http_response_code='403']"), "gcloud auth"),
        (lambda: ValueError("UNAVAILABLE: Error reading gs://b/k: all 32 retries failed"), "Check the network"),
        (lambda: of_library("aiohttp", "ServerDisconnectedError"), "Check the network"),
        (lambda: of_library("google.auth.exceptions", "RefreshError", "invalid_grant: bad credentials"), "gcloud auth"),
        (lambda: ValueError("UNAVAILABLE: Error reading file /tmp/x"), ""),
        (lambda: OSError(errno.EIO, "Input/output error", "/tmp/x"), ""),
        (lambda: KeyError("gs://b"), ""),
    ],
)
def test_what_a_library_raises_about_a_bucket_is_told(make, said, capsys):
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = make()
    assert said in told(wrapped) and bool(told(wrapped)) == bool(said)

    def main(call: cli.Call) -> None:
        raise wrapped

    assert cli.call(main, ["command"]) == 1
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == (not said) and (not said or shown.count("\n") == 1)


def test_a_message_says_what_failed_and_what_to_do():
    error = StorageError("listing", "gs://b/k", "403 no access", "Log in with x", 403)
    assert str(error) == "gs://b/k: listing failed: 403 no access. Log in with x."
    assert (error.call, error.place, error.status) == ("listing", "gs://b/k", 403)
