"""Failures of calls to a bucket, and which failures of libraries that read buckets are passing ones."""

from __future__ import annotations

import re
from collections.abc import Iterator

from uwm_jax.errors import RunError

# HTTP statuses after which the same request may succeed, as
# https://cloud.google.com/storage/docs/retry-strategy lists them.
PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

LOGIN = (
    "Log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the key file of a "
    "service account"
)

# Exceptions of libraries by the name of their type: importing those libraries to compare would cost seconds.
_PASSING_NAMES = frozenset(
    (
        # requests, urllib3, http.client and google.auth
        "ConnectionError ChunkedEncodingError Timeout ConnectTimeout ReadTimeout ProtocolError IncompleteRead "
        "IncompleteReadError RemoteDisconnected BadStatusLine NewConnectionError TransportError "
        # aiohttp and asyncio, which gcsfs raises
        "ClientConnectionError ClientConnectorError ClientOSError ClientPayloadError ServerConnectionError "
        "ServerDisconnectedError ServerTimeoutError SocketTimeoutError ConnectionTimeoutError TimeoutError "
        # google.api_core
        "TooManyRequests InternalServerError BadGateway ServiceUnavailable GatewayTimeout DeadlineExceeded RetryError "
        # a body that does not match its checksum or length
        "ChecksumError DataCorruption"
    ).split()
)
# Words of tensorstore, whose errors are ValueError with the status of absl first: "UNAVAILABLE: Error reading ...".
_PASSING_WORDS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)\b"
    r"|HTTP (?:response code|status|error)?:? ?(?:408|429|500|502|503|504)\b"
    r"|CURL error|Connection reset|timed? ?out",
    re.IGNORECASE,
)


class StorageError(RunError):
    """A call to a bucket failed for good: at once, or in every attempt within the time limit.

    The message names the call, the object, the cause and what to do.

    Attributes:
      call: what was tried: `reading`, `writing`, `listing`, ...
      place: the object or folder, `gs://bucket/key`.
      status: the HTTP status of the last answer; None if there was none.
    """

    def __init__(self, call: str, place: str, cause: str, advice: str = "", status: int | None = None):
        super().__init__(f"{place}: {call} failed: {cause}." + (f" {advice}." if advice else ""))
        self.call, self.place, self.status = call, place, status


def is_passing(error: BaseException) -> bool:
    """Whether a library's failure to reach a bucket may go away: 429, 5xx, resets, time limits, cut bodies.

    A `StorageError` is not: its call was repeated already.
    """
    if isinstance(error, RunError):
        return False
    for found in _chain(error):
        status = getattr(found, "code", None) or getattr(found, "status", None)
        if isinstance(status, int) and status in PASSING_STATUSES:
            return True
        if isinstance(found, ConnectionError | TimeoutError):
            return True
        names = {kind.__name__ for kind in type(found).__mro__} - {"OSError"}
        if names & _PASSING_NAMES:
            return True
        if isinstance(found, ValueError) and _PASSING_WORDS.search(str(found)[:2000]):
            return True
    return False


_OF_GCSFS = re.compile(r"(gcsfs|fsspec|aiohttp|google\.auth)\b")  # modules; nothing else here uses them
_OF_TENSORSTORE = re.compile(r"gs://|http_response_code|storage\.googleapis\.com|GCS")
_REFUSED = re.compile(r"\b(401|403)\b|PERMISSION_DENIED|UNAUTHENTICATED|Forbidden|credentials", re.IGNORECASE)


def told(error: BaseException) -> str:
    """A message about a failed call to a bucket that a library made itself; "" for any other error.

    Our own calls raise `StorageError`; this is for what orbax, tensorstore and gcsfs raise from the middle of theirs.
    """
    for found in _chain(error):
        of_gcsfs = _OF_GCSFS.match(type(found).__module__) or str(found).startswith("Forbidden: https://")
        of_tensorstore = isinstance(found, ValueError) and _OF_TENSORSTORE.search(str(found))
        if of_gcsfs or of_tensorstore:
            cause = " ".join(str(found).split())[:400].rstrip(".") or type(found).__name__
            refused = _REFUSED.search(cause) or getattr(found, "code", None) in (401, 403)
            advice = LOGIN if refused else "Check the network and the quota of the bucket, and rerun the same command"
            return f"a call to a bucket failed: {cause}. {advice}."
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__
