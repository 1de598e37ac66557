"""Access control: the token, the Origin and the Host of a request, and the address and certificate of the server."""

from __future__ import annotations

import hmac
import ipaddress
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from uwm_jax.errors import UserError

TOKEN_VARIABLE = "UWM_SERVE_TOKEN"
_SCHEME = "Api-Key "
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def read_token(file: Path | None) -> str:
    """The token of clients: the text of a file, or else of the environment variable; "" for none.

    Raises:
      UserError: the file is empty, or the token has characters that a header cannot carry.
    """
    where = f"--token_file={file}" if file else TOKEN_VARIABLE
    token = file.read_text(encoding="utf-8", errors="replace").strip() if file else os.environ.get(TOKEN_VARIABLE, "")
    if file and not token or token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(f"{where}: expected a token of printable ASCII characters without spaces.")
    return token


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_address(host: str, token: str, encrypted: bool) -> list[str]:
    """Remarks about an address to listen on.

    Raises:
      UserError: others can reach it, and there is no token.
    """
    if is_loopback(host):
        return []
    if not token:
        raise UserError(
            f"--host={host}: other machines reach this address, so clients need a token: set {TOKEN_VARIABLE}, or "
            "--token_file=FILE. Or leave --host out and let clients come through ssh -L."
        )
    if not encrypted:
        return [f"--host={host}: the token and the frames travel unencrypted; --tls_cert and --tls_key encrypt them."]
    return []


def tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The server's certificate; None without one.

    Raises:
      UserError: one of the two files is missing or does not fit the other.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UserError("--tls_cert and --tls_key go together: expected both, or none.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        reason = getattr(e, "reason", None) or e
        raise UserError(f"--tls_cert={cert}, --tls_key={key}: no usable certificate and key in PEM ({reason}).") from e
    return context


def authorized(token: str, headers: Mapping[str, str]) -> bool:
    """Whether the headers carry the token; True where there is none."""
    given = _one(headers, "Authorization")
    fits = hmac.compare_digest(given.encode("utf-8", "replace"), (_SCHEME + token).encode())
    return fits or not token


def foreign(headers: Mapping[str, str], loopback: bool, encrypted: bool) -> str:
    """Why a request looks like one that a browser sends for a page of another host; "" where it does not.

    Args:
      loopback: whether the server listens on loopback alone. There the Host must be this machine too: a page whose
        name was made to point here has the same Origin and Host.
    """
    host, origin = _one(headers, "Host"), _one(headers, "Origin")
    own = _place(f"{'https' if encrypted else 'http'}://{host}")
    if loopback and host and not (own and is_loopback(own[0])):
        return f"Host {host[:80]!r}: expected localhost or a loopback address, on which this server listens"
    if origin and _place(origin) != own:
        return f"Origin {origin[:80]!r}: expected none, or that of this server"
    return ""


def _one(headers: Mapping[str, str], name: str) -> str:
    """A header's value; "" where it is absent. One that is sent twice is nobody's."""
    try:
        return headers.get(name) or ""
    except LookupError:
        return "\0"


def _place(url: str) -> tuple[str, int] | None:
    """(host, port) of an address."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname else None
