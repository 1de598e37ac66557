"""Plain HTTP on the server's port, and who may open a websocket: health, metrics, further pages, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from uwm_jax.serving import access
from uwm_jax.serving.status import Status


class Page(NamedTuple):
    """An HTTP response."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}


# (path without query, whether the request carries the token) -> a page; None where there is none.
Pages = Callable[[str, bool], Page | None]


class Front:
    """Answers HTTP requests.

    Args:
      status: of the server.
      pages: further pages, which are asked for before the token is.
      token, loopback, encrypted: as `access` has them.
      most: connections at once.
      busy_since: `Batcher.busy_since`; cut: `Actor.cut`.
    """

    def __init__(
        self,
        status: Status,
        pages: Pages,
        *,
        token: str,
        loopback: bool,
        encrypted: bool,
        most: int,
        busy_since: Callable[[], float | None],
        cut: Callable[[], int],
    ):
        self._status, self._pages, self._token, self._most = status, pages, token, most
        self._loopback, self._encrypted, self._busy_since, self._cut = loopback, encrypted, busy_since, cut

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response to a plain HTTP request, or to a websocket that is not wanted; None opens the websocket."""
        page = self._page(request)
        if page is None:
            return None
        if page.status >= 400:
            self._status.turned_away[str(int(page.status))] += 1
        headers = Headers(page.headers)
        headers["Content-Type"], headers["Content-Length"] = page.content_type, str(len(page.body))
        headers["Connection"], headers["X-Content-Type-Options"] = "close", "nosniff"
        return Response(int(page.status), page.status.phrase, headers, page.body)

    def _page(self, request: Request) -> Page | None:
        headers, path = request.headers, request.path.partition("?")[0]
        if getattr(request, "method", "GET") != "GET":
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET")
        if reason := access.foreign(headers, self._loopback, self._encrypted):
            return _text(HTTPStatus.FORBIDDEN, reason)
        authorized = access.authorized(self._token, headers)
        if any("websocket" in value.lower() for value in headers.get_all("Upgrade")):
            return self._unwanted(authorized)
        unhealthy = self._status.unhealthy(self._busy_since())
        if path == "/healthz":
            return _text(HTTPStatus.SERVICE_UNAVAILABLE if unhealthy else HTTPStatus.OK, unhealthy or "ok")
        if page := self._pages(path, authorized):
            return page
        if not authorized:
            return _unauthorized()
        if path == "/metrics":
            body = self._status.prometheus(not unhealthy, self._cut()).encode()
            return Page(HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", body)
        return _text(HTTPStatus.NOT_FOUND, "expected /healthz, /metrics, or a websocket")

    def _unwanted(self, authorized: bool) -> Page | None:
        """The refusal of a websocket; None for one that may open."""
        if not authorized:
            return _unauthorized()
        if self._status.draining:
            return _text(HTTPStatus.SERVICE_UNAVAILABLE, "draining")
        if self._status.open >= self._most:
            return _text(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._most} connections are open already")
        return None


def _unauthorized() -> Page:
    page = _text(HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key TOKEN with this server's token")
    return page._replace(headers={"WWW-Authenticate": "Api-Key"})


def _text(status: HTTPStatus, text: str) -> Page:
    return Page(status, "text/plain; charset=utf-8", f"{text}\n".encode())
