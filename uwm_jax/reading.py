"""Reading files with retries after transient errors, and JSON and Python files with errors for users."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.files import AnyPath, as_place
from uwm_jax.storage.errors import is_passing

AGAIN_SECONDS = (1.0, 4.0, 16.0)  # waits before the second, third and fourth attempt
MOST_JSON = 256 << 20  # bytes; the manifest of a thousand hours of video has a hundredth of that

_Value = TypeVar("_Value")

# Transient errors of disks and network file systems: errno values, and their texts in messages of libraries.
_FLEETING: tuple[int, ...] = (errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
_FLEETING += (errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIGNS = tuple(os.strerror(number).lower() for number in _FLEETING)


def again(read: Callable[[], _Value], path: AnyPath) -> _Value:
    """`read()`, retried after 1, 4 and 16 s if it fails with a transient error.

    Args:
      path: the file that is read, for messages.

    Raises:
      RunError: every attempt failed with a transient error. Other exceptions of `read` are raised immediately.
    """
    for seconds in (*AGAIN_SECONDS, None):
        try:
            return read()
        except Exception as e:
            if not is_fleeting(e, path):
                raise
            reason = cause_of(e)
            if seconds is None:
                raise RunError(
                    f"{path}: cannot be read: {reason} ({len(AGAIN_SECONDS) + 1} attempts in "
                    f"{sum(AGAIN_SECONDS):g} s). Nothing was changed; fix this and rerun the same command."
                ) from e
        warn(f"{path}: cannot be read: {reason}; retrying in {seconds:g} s.")
        time.sleep(seconds)
    raise AssertionError


def is_fleeting(error: BaseException, path: AnyPath = "") -> bool:
    """Whether reading failed with a transient error, rather than because of the files' contents."""
    if isinstance(error, UserError | RunError):
        return False
    if is_passing(error):  # first: aiohttp's errors have an `errno` too, also one for a host that has no address
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FLEETING
    return any(sign in reason_of(error, path) for sign in _SIGNS)


def reason_of(error: BaseException, path: AnyPath = "") -> str:
    """`cause_of` in lower case without paths, whose words must not be taken for a reason."""
    return re.sub(r"\S*/\S*/\S*", "", cause_of(error).replace(str(path) or "\0", "")).lower()


def cause_of(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none; for `OSError` with the path."""
    lines = str(error).strip().splitlines()
    return lines[0][:600] if lines else type(error).__name__


def no_room(error: BaseException) -> str:
    """The system's message if an error, or one that it wraps, reports a full disk; else ""."""
    found: BaseException | None = error
    while found is not None:
        for number in _NO_ROOM:
            if getattr(found, "errno", None) == number or os.strerror(number) in str(found):
                return os.strerror(number)
        found = found.__cause__ or found.__context__
    return ""


def run_python(path: str | os.PathLike[str], where: str, expected: str, use: Callable[[Any], _Value]) -> _Value:
    """`use(module)` of a user's Python file.

    Args:
      where: flag or field and file, for messages.
      expected: description of a valid file, for messages.

    Raises:
      UserError: the file or `use` raises an exception or exits.
    """
    spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return use(module)
    except (Exception, SystemExit) as e:
        raise UserError(f"{where} does not load ({type(e).__name__}: {e}). Expected {expected}.") from e


def read_json(path: AnyPath, also: type | tuple[type, ...] = ()) -> Any:
    """The object in a JSON file, or a value of the types `also`.

    Raises:
      UserError: the file is not JSON in UTF-8, too large, nested too deeply, or holds another type.
      OSError: it cannot be opened.
    """
    path = as_place(path)

    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(MOST_JSON + 1)

    data = again(read, path)
    if len(data) > MOST_JSON:
        raise UserError(f"{path}: expected JSON of at most {MOST_JSON >> 20} MiB.")
    return parse_json(data, str(path), also)


def parse_json(text: str | bytes, where: str, also: type | tuple[type, ...] = ()) -> Any:
    """The object in a JSON text, as `read_json`; `where` names its origin in messages."""
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError as e:
        raise UserError(f"{where}: not valid JSON: nested too deeply.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not JSON: the text is not UTF-8.") from e
    except ValueError as e:
        raise UserError(f"{where}: not JSON ({e}).") from e
    if not isinstance(value, dict) and not isinstance(value, also):
        raise UserError(f"{where}: expected a JSON object {{...}}, found {str(value)[:60]!r}.")
    return value
