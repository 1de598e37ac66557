"""Calls to Google Cloud Storage's JSON API: each has a time limit, is repeated after passing failures, or is told.

https://cloud.google.com/storage/docs/json_api/v1. What is read is compared with the length and the CRC32C that the
service states, and what is written is sent with its CRC32C, so a cut or damaged body is never taken for a whole one.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import google_crc32c

from uwm_jax.storage import environment, login, retries
from uwm_jax.storage.errors import LOGIN, PASSING_STATUSES, StorageError
from uwm_jax.storage.retries import Passing

ONE_REQUEST = 8 << 20  # bytes that are written by one request; more go in parts
PART = 32 << 20  # bytes of a part, a multiple of 256 KiB
UPLOADS = 3  # attempts at an upload in parts that the service drops or stores wrongly
_TAG = "uwm_write"  # metadata of an object: which call wrote it

Generation = str


class Entry(NamedTuple):
    """An object's key, size in bytes, generation and CRC32C (None if the service does not state it)."""

    key: str
    size: int
    generation: Generation
    crc32c: int | None


def url_of(place: tuple[str, str]) -> str:
    bucket, key = place
    return f"gs://{bucket}/{key}" if key else f"gs://{bucket}"


def read(bucket: str, key: str) -> tuple[bytes, Generation]:
    """An object's bytes and their generation.

    Raises:
      FileNotFoundError: there is no such object.
      StorageError: anything else.
    """
    place = (bucket, key)

    def attempt() -> tuple[bytes, Generation]:
        answer = _send("reading", place, "GET", _object(place) + "?alt=media")
        _check_whole(answer, answer.content)
        return answer.content, answer.headers.get("X-Goog-Generation", "")

    return _repeat(attempt, "reading", place)


def read_range(bucket: str, key: str, first: int, past: int) -> bytes:
    """The bytes `first` to `past` - 1 of an object.

    Raises:
      FileNotFoundError: there is no such object.
      StorageError: anything else, also if the object ends before `past`.
    """
    place = (bucket, key)

    def attempt() -> bytes:
        headers = {"Range": f"bytes={first}-{past - 1}"}
        answer = _send("reading", place, "GET", _object(place) + "?alt=media", headers=headers)
        if len(answer.content) != past - first:
            raise Passing(f"{len(answer.content)} of {past - first} bytes came")
        return answer.content

    return _repeat(attempt, "reading", place)


def download(bucket: str, key: str, file: Path) -> Generation:
    """Writes an object to a local file; returns its generation. Raises as `read` does."""
    place = (bucket, key)

    def attempt() -> Generation:
        answer = _send("reading", place, "GET", _object(place) + "?alt=media", stream=True)
        with contextlib.closing(answer), file.open("wb") as out:
            checksum, size = google_crc32c.Checksum(), 0
            with _network_errors():
                for part in answer.iter_content(1 << 20):
                    out.write(part)
                    checksum.update(part)
                    size += len(part)
        _check_sums(answer, size, checksum)
        return answer.headers.get("X-Goog-Generation", "")

    return _repeat(attempt, "reading", place)


def stat(bucket: str, key: str) -> Entry | None:
    """What the service knows of an object; None if there is none."""
    place = (bucket, key)

    def attempt() -> Entry:
        answer = _send("looking up", place, "GET", _object(place) + "?fields=name,size,generation,crc32c")
        return _entry(_json(answer))

    try:
        return _repeat(attempt, "looking up", place)
    except FileNotFoundError:
        return None


class Listing(NamedTuple):
    """The objects below a prefix, and the prefixes below which there are more (with a delimiter)."""

    objects: list[Entry]
    prefixes: list[str]


def listing(bucket: str, prefix: str, delimiter: str = "", most: int | None = None) -> Listing:
    """The objects whose key begins with `prefix`, in order.

    Args:
      delimiter: "/" lists one level: keys with another "/" behind the prefix are shortened to it.
      most: stops after about this many.
    """
    place = (bucket, prefix)
    found, token = Listing([], []), ""
    while True:
        query = f"?prefix={quote(prefix, safe='')}&fields=items(name,size,generation,crc32c),prefixes,nextPageToken"
        query += f"&delimiter={quote(delimiter, safe='')}" if delimiter else ""
        query += f"&maxResults={most}" if most else ""
        query += f"&pageToken={quote(token, safe='')}" if token else ""

        def attempt(url: str = f"/b/{quote(bucket, safe='')}/o{query}") -> dict[str, Any]:
            return _json(_send("listing", place, "GET", _base() + "/storage/v1" + url))

        page = _repeat(attempt, "listing", place)
        found.objects.extend(map(_entry, page.get("items", ())))
        found.prefixes.extend(page.get("prefixes", ()))
        token = page.get("nextPageToken", "")
        if not token or (most and len(found.objects) + len(found.prefixes) >= most):
            return found


def write(bucket: str, key: str, data: bytes, generation: Generation | None = None) -> Generation | None:
    """Writes an object by one request.

    Args:
      generation: the object is written only if this is its generation now; "0": only if there is none.

    Returns:
      The new generation; None if the object had another generation than asked for.
    """
    place, tag, unsure = (bucket, key), secrets.token_hex(8), False
    described: dict[str, Any] = {"name": key, "crc32c": _base64(google_crc32c.value(data)), "metadata": {_TAG: tag}}
    headers, body = _multipart(described, data)
    query = "?uploadType=multipart&fields=name,size,generation,crc32c"
    query += f"&ifGenerationMatch={quote(generation, safe='')}" if generation is not None else ""

    def attempt() -> Generation | None:
        nonlocal unsure
        try:
            answer = _send("writing", place, "POST", _upload(bucket) + query, headers=headers, data=body)
            return _check_stored(answer, len(data), described["crc32c"]).generation
        except Passing as e:
            unsure = unsure or e.may_have_worked
            raise
        except _Refused:  # the precondition
            return _written_by(place, tag) if unsure else None

    return _repeat(attempt, "writing", place)


def upload(bucket: str, key: str, file: Path) -> None:
    """Writes a local file as an object, read in parts of 32 MiB; readers see the object once it is whole."""
    size = file.stat().st_size
    if size <= ONE_REQUEST:
        write(bucket, key, file.read_bytes())
        return
    place = (bucket, key)
    described = {"name": key, "crc32c": _base64(_checksum_of(file))}
    headers = {"Content-Type": "application/json", "X-Upload-Content-Length": str(size)}

    def begin() -> str:
        body = json.dumps(described).encode()
        answer = _send("writing", place, "POST", _upload(bucket) + "?uploadType=resumable", headers=headers, data=body)
        return answer.headers["Location"]

    with file.open("rb") as source:
        for _ in range(UPLOADS):
            where, first = _repeat(begin, "writing", place), 0
            try:
                while first < size:
                    part = _Part(where, source, first, size)
                    first, answer = _repeat(lambda part=part: _send_part(place, part), "writing", place)
                _check_stored(answer, size, described["crc32c"])
                return
            except FileNotFoundError:
                cause = "the service dropped what was sent"
            except Passing as e:
                cause = str(e)
    raise StorageError("writing", url_of(place), f"{cause} ({UPLOADS} uploads)", "Rerun the same command")


def check_writable(bucket: str, key: str) -> None:
    """Raises StorageError unless the login may create objects in the bucket, or where there is no such bucket.

    Creates nothing. An emulator that does not know of permissions passes if it has the bucket.
    """
    place = (bucket, key)
    url = f"{_base()}/storage/v1/b/{quote(bucket, safe='')}/iam/testPermissions?permissions=storage.objects.create"
    if environment.emulator():
        listing(bucket, key, most=1)
        return
    answer = _repeat(lambda: _json(_send("asking for permissions", place, "GET", url)), "asking for permissions", place)
    if "storage.objects.create" not in answer.get("permissions", ()):
        raise _forbidden("writing", place, "403 storage.objects.create is not granted")


def delete(bucket: str, key: str) -> bool:
    """Deletes an object; False if there was none."""
    place, unsure = (bucket, key), False

    def attempt() -> None:
        nonlocal unsure
        try:
            _send("deleting", place, "DELETE", _object(place))
        except Passing as e:
            unsure = unsure or e.may_have_worked
            raise

    try:
        _repeat(attempt, "deleting", place)
    except FileNotFoundError:
        return unsure  # an attempt whose answer was lost deleted it
    return True


def copy(source: tuple[str, str], target: tuple[str, str]) -> None:
    """Copies an object inside of the service. Raises as `read` does."""
    url = f"{_object(source)}/rewriteTo/b/{quote(target[0], safe='')}/o/{quote(target[1], safe='')}"
    token = ""
    while True:

        def attempt(token: str = token) -> dict[str, Any]:
            query = f"?rewriteToken={quote(token, safe='')}" if token else ""
            return _json(_send("copying", source, "POST", url + query))

        try:
            answer = _repeat(attempt, "copying", source)
        except FileNotFoundError:
            listing(target[0], "", most=1)  # raises where it is the other bucket that does not exist
            raise
        if answer.get("done", True):
            return
        token = answer["rewriteToken"]


# --- requests --------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """A precondition did not hold."""


def _base() -> str:
    return environment.emulator() or "https://storage.googleapis.com"


def _object(place: tuple[str, str]) -> str:
    if not place[1]:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url_of(place))
    return f"{_base()}/storage/v1/b/{quote(place[0], safe='')}/o/{quote(place[1], safe='')}"


def _upload(bucket: str) -> str:
    return f"{_base()}/upload/storage/v1/b/{quote(bucket, safe='')}/o"


def _repeat(attempt: Any, call: str, place: tuple[str, str]) -> Any:
    try:
        return retries.repeat(attempt, f"{url_of(place)}: {call}")
    except Passing as e:
        advice = "Check the network and the quota of the bucket, and rerun the same command"
        raise StorageError(call, url_of(place), str(e), advice, e.status) from e


def _send(call: str, place: tuple[str, str], method: str, url: str, **arguments: Any) -> Any:
    """One request; its answer, if the status is 2xx or 308.

    Raises:
      Passing, _Refused, FileNotFoundError, StorageError.
    """
    session = login.session(call, url_of(place))
    timeout = retries.left(environment.CONNECT_SECONDS), retries.left(environment.SILENCE_SECONDS)
    with _network_errors(call, place):
        answer = session.request(method, url, timeout=timeout, **arguments)
    if answer.status_code < 300 or answer.status_code == 308:
        return answer
    with contextlib.closing(answer):
        raise _failure(call, place, answer)


@contextlib.contextmanager
def _network_errors(call: str = "reading", place: tuple[str, str] = ("", "")) -> Iterator[None]:
    """Turns failures without an answer into `Passing`, and a refused login into `StorageError`."""
    import requests
    from google.auth.exceptions import GoogleAuthError, TransportError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (TransportError, requests.RequestException, HTTPError, ConnectionError, TimeoutError) as e:
        raise Passing(_cause(e)) from e
    except GoogleAuthError as e:
        if getattr(e, "retryable", False):
            raise Passing(_cause(e), may_have_worked=False) from e
        cause = f"the login could not be refreshed: {_cause(e)}"
        raise StorageError(call, url_of(place), cause, LOGIN) from e


def _cause(error: BaseException) -> str:
    """The innermost reason of an error of requests, which wraps those of the layers below."""
    words = {"ReadTimeout": "no answer in time", "ConnectTimeout": "no connection in time"}
    if (name := type(error).__name__) in words:
        return words[name]
    inner = error
    while inner.args and isinstance(inner.args[0], BaseException):
        inner = inner.args[0]
    reason = getattr(inner, "reason", None) or inner
    return str(reason).strip().splitlines()[0][:300].rstrip(".") if str(reason).strip() else type(error).__name__


def _failure(call: str, place: tuple[str, str], answer: Any) -> BaseException:
    status, said = answer.status_code, _said(answer)
    cause = f"{status} {said}" if said else str(status)
    if status in PASSING_STATUSES:
        return Passing(cause, status, may_have_worked=status != 429)
    if status == 412:
        return _Refused()
    if status == 404 or (status == 410 and call == "writing"):
        return _missing(call, place, said)
    if status == 401:
        return StorageError(call, url_of(place), f"{cause}; tried with {login.account()}", LOGIN, status)
    if status == 403:
        return _forbidden(call, place, cause)
    return StorageError(call, url_of(place), cause, "", status)


def _forbidden(call: str, place: tuple[str, str], cause: str) -> StorageError:
    advice = f"Ask for the role roles/storage.objectAdmin on gs://{place[0]} (objectViewer to read), or log in as "
    advice += "somebody who has it: `gcloud auth application-default login`"
    return StorageError(call, url_of(place), f"{cause}; tried with {login.account()}", advice, 403)


def _missing(call: str, place: tuple[str, str], said: str) -> BaseException:
    """The error for 404: an object that does not exist is a missing file, a bucket that does not is told."""
    missing = StorageError(
        call,
        url_of(place),
        f"the bucket gs://{place[0]} does not exist",
        f"Check its name, or create it: `gcloud storage buckets create gs://{place[0]}`",
        404,
    )
    if call in ("listing", "asking for permissions") or "bucket does not exist" in said:
        return missing
    if "no such object" not in said.lower():
        try:
            listing(place[0], "", most=1)
        except StorageError as e:
            return missing if e.status == 404 else e
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url_of(place))


def _said(answer: Any) -> str:
    """The service's own words for a failure, in one line."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = answer.text if "html" not in answer.headers.get("Content-Type", "") else answer.reason
    return " ".join(str(said or "").split())[:300].rstrip(".")


def _json(answer: Any) -> dict[str, Any]:
    try:
        return answer.json()
    except ValueError as e:
        raise Passing("the answer was cut short") from e


def _entry(item: Mapping[str, Any]) -> Entry:
    stated = item.get("crc32c")
    checksum = int.from_bytes(base64.b64decode(stated), "big") if stated else None
    return Entry(item["name"], int(item.get("size", 0)), str(item.get("generation", "")), checksum)


def _check_whole(answer: Any, data: bytes) -> None:
    _check_sums(answer, len(data), google_crc32c.Checksum(data))


def _check_sums(answer: Any, size: int, checksum: google_crc32c.Checksum) -> None:
    """Raises Passing unless the body is as long as the headers say and has their CRC32C."""
    if answer.headers.get("Content-Encoding"):  # decoded by requests: neither refers to what was received
        return
    expected = answer.headers.get("Content-Length")
    if expected is not None and int(expected) != size:
        raise Passing(f"{size} of {expected} bytes came")
    for part in answer.headers.get("X-Goog-Hash", "").split(","):
        name, _, value = part.strip().partition("=")
        if name == "crc32c" and value != base64.b64encode(checksum.digest()).decode():
            raise Passing("the bytes that came do not match their CRC32C")


def _base64(crc32c: int) -> str:
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def _checksum_of(file: Path) -> int:
    checksum = google_crc32c.Checksum()
    with file.open("rb") as source:
        while part := source.read(1 << 20):
            checksum.update(part)
    return int.from_bytes(checksum.digest(), "big")


def _multipart(described: Mapping[str, Any], data: bytes) -> tuple[dict[str, str], bytes]:
    """Headers and body of an upload of metadata and bytes together."""
    boundary = f"=={secrets.token_hex(16)}=="
    head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(described)}\r\n"
    head += f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
    body = head.encode() + data + f"\r\n--{boundary}--".encode()
    return {"Content-Type": f'multipart/related; boundary="{boundary}"'}, body


def _written_by(place: tuple[str, str], tag: str) -> Generation | None:
    """The generation of an object if the call with this tag wrote it: its answer was lost, so it was sent again."""
    try:
        answer = _send("looking up", place, "GET", _object(place) + "?fields=generation,metadata")
    except FileNotFoundError:  # it has been deleted since
        return None
    described = _json(answer)
    return str(described["generation"]) if described.get("metadata", {}).get(_TAG) == tag else None


class _Part(NamedTuple):
    """The next part of an upload: its URL, the open file, the first byte, and the size of the whole."""

    where: str
    source: Any
    first: int
    size: int


def _send_part(place: tuple[str, str], part: _Part) -> tuple[int, Any]:
    """Sends a part of an upload; returns how many bytes the service has, and its answer.

    A part may be sent again: "Cloud Storage ignores any bytes you send at an offset that Cloud Storage has already
    persisted" (https://cloud.google.com/storage/docs/performing-resumable-uploads).
    """
    part.source.seek(part.first)
    data = part.source.read(PART)
    span = f"bytes {part.first}-{part.first + len(data) - 1}/{part.size}"
    answer = _send("writing", place, "PUT", part.where, headers={"Content-Range": span}, data=data)
    return (_received(answer) if answer.status_code == 308 else part.size), answer


def _check_stored(answer: Any, size: int, crc32c: str) -> Entry:
    """What an upload's last answer says was stored; raises Passing if that is not what was sent."""
    stored = _entry(_json(answer))
    if stored.size != size or (stored.crc32c is not None and _base64(stored.crc32c) != crc32c):
        raise Passing(f"{stored.size} bytes with CRC32C {stored.crc32c} were stored, {size} with {crc32c} were sent")
    return stored


def _received(answer: Any) -> int:
    """How many bytes of an upload the service has, from an answer 308: `Range: bytes=0-524287`."""
    last = answer.headers.get("Range", "").rpartition("-")[2]
    return int(last) + 1 if last.isdigit() else 0
