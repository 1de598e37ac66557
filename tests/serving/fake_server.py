"""A websocket server that follows a script, in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from uwm_jax.serving.uwm_client import pack, unpack

METADATA = {
    "inputs": {
        "obs/front": {"shape": [2, 4, 4, 3], "dtype": "uint8"},
        "obs/state": {"shape": [2, 3], "dtype": "float32"},
        "obs/text": {"shape": [5], "dtype": "float32"},
    },
    "frames": 2,
    "history": [1, 0],
    "action_horizon": 8,
    "action_dim": 2,
    "execute": 4,
    "stepwise": False,
}

Script = Callable[[ServerConnection, dict[str, Any], int], None]  # connection, request, number of the request


class FakeServer:
    """Attributes: `url`; `requests` received, in order; `connections` made; `tokens` of their headers."""

    def __init__(self, script: Script, metadata: Any, process_request: Any = None):
        self.requests: list[dict[str, Any]] = []
        self.connections, self.tokens = 0, list[str | None]()
        self._script, self._metadata = script, metadata
        self._server = serve(self._serve, "127.0.0.1", 0, process_request=process_request, max_size=None)
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.connections += 1
        self.tokens.append(connection.request.headers.get("Authorization"))
        metadata = self._metadata(self.connections) if callable(self._metadata) else self._metadata
        with contextlib.suppress(ConnectionClosed):
            connection.send(metadata if isinstance(metadata, (bytes, str)) else pack(metadata))
            for frame in connection:
                assert isinstance(frame, bytes)
                request = unpack(frame)
                self.requests.append(request)
                self._script(connection, request, len(self.requests) - 1)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


@contextlib.contextmanager
def fake_server(script: Script, metadata: Any = METADATA, process_request: Any = None) -> Iterator[FakeServer]:
    server = FakeServer(script, metadata, process_request)
    try:
        yield server
    finally:
        server.close()


def reply(connection: ServerConnection, request: dict[str, Any], **fields: Any) -> None:
    connection.send(pack({"request_id": request["request_id"], **fields}))


def echo(connection: Any, request: dict[str, Any], number: int) -> None:
    reply(connection, request, number=number, **{k: v for k, v in request.items() if k != "request_id"})
