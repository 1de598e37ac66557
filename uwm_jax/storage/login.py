"""Credentials of this machine, and sessions that send them."""

from __future__ import annotations

import os
import threading
from typing import Any

from uwm_jax.storage import environment
from uwm_jax.storage.errors import LOGIN, StorageError

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_POOL = 64  # connections that one process keeps

_lock = threading.Lock()
_session: tuple[tuple[Any, ...], Any] | None = None  # what it was made for, and the session


def session(call: str, place: str) -> Any:
    """The session of this process, a `requests.Session` that sends credentials if there are any.

    An answer 401 is sent again once with a fresh token; a second one is returned.

    Args:
      call, place: what the session is needed for, for messages.

    Raises:
      StorageError: the credentials that the environment names cannot be used.
    """
    global _session
    # A forked process must not share connections with its parent; tests change the environment.
    made_for = (os.getpid(), environment.emulator(), os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"))
    with _lock:
        if _session is None or _session[0] != made_for:
            _session = made_for, _connect(call, place)
        return _session[1]


def account() -> str:
    """The login of the current session in words."""
    credentials = getattr(_session[1], "credentials", None) if _session else None
    if credentials is None:
        return "no login (none was found on this machine)"
    name = getattr(credentials, "service_account_email", "") or getattr(credentials, "_account", "")
    return f"the login {name}" if name and name != "default" else "this machine's login"


def _connect(call: str, place: str) -> Any:
    try:
        import requests
        from google.auth.transport.requests import AuthorizedSession
    except ImportError as e:
        missing = e.name or "google-auth"
        raise StorageError(call, place, f"{missing} is not installed", "Run `pip install 'uwm-jax[gcs]'`") from e
    credentials = _credentials(call, place)
    made = requests.Session() if credentials is None else AuthorizedSession(credentials, max_refresh_attempts=1)
    adapter = requests.adapters.HTTPAdapter(pool_connections=8, pool_maxsize=_POOL, max_retries=0)
    for scheme in ("http://", "https://"):
        made.mount(scheme, adapter)
    return made


def _credentials(call: str, place: str) -> Any:
    """Application default credentials; None where there are none: public buckets need none."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if environment.emulator() and not named:
        return None
    try:
        credentials, _ = google.auth.default(scopes=[_SCOPE])
    except DefaultCredentialsError as e:
        if not named:
            return None
        cause = f"GOOGLE_APPLICATION_CREDENTIALS={named} cannot be used: {str(e).splitlines()[0].rstrip('.')}"
        raise StorageError(call, place, cause, LOGIN) from e
    return credentials
