"""Plain HTTP on the server's port, and who may connect."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import InvalidMessage, InvalidStatus

from tests.serving.clients import Client, fetch, running, wait_until
from tests.serving.small_model import WIDTH, make_contract, make_server
from uwm_jax.errors import UserError
from uwm_jax.serving import access
from uwm_jax.serving.connections import Server
from uwm_jax.serving.front import Page


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, str]]:
    with running() as both:
        yield both


@pytest.fixture
def address(served: tuple[Server, str]) -> str:
    return served[1]


def test_the_token_is_required_and_said_nowhere(caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    caplog.set_level("DEBUG")
    with running(token="secret-of-tests") as (server, address):
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "secret-of-tests"}):
            with pytest.raises(InvalidStatus) as error:
                Client(address, additional_headers=headers)
            assert error.value.response.status_code == 401
            assert fetch(address, "/metrics", **headers)[0] == 401
        right = {"Authorization": "Api-Key secret-of-tests"}
        assert Client(address, additional_headers=right).ask()["actions"].shape == (16, WIDTH)
        assert fetch(address, "/metrics", **right)[0] == 200
        assert fetch(address, "/healthz") == (200, "ok\n")
        assert server.status.turned_away["401"] == 6
    printed = capsys.readouterr()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("uwm_jax")]
    assert "secret-of-tests" not in printed.out + printed.err + "".join(ours)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:1", "null", "https://localhost", "nonsense"]
)
def test_an_origin_of_another_host_is_refused(address: str, origin: str) -> None:
    with pytest.raises(InvalidStatus) as error:
        Client(address, origin=origin)
    assert error.value.response.status_code == 403
    assert fetch(address, "/metrics", Origin=origin)[0] == 403


def test_an_origin_of_this_server_and_none_are_fine(address: str) -> None:
    port = urlsplit(address).port
    assert Client(address, origin=f"http://127.0.0.1:{port}").ask()["actions"].shape == (16, WIDTH)
    assert fetch(address, "/metrics", Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


def test_a_name_that_was_made_to_point_here_is_refused(address: str) -> None:
    """DNS rebinding: Origin and Host agree, and are a stranger's."""
    port = urlsplit(address).port
    status, told = fetch(address, "/metrics", Host=f"evil.example:{port}", Origin=f"http://evil.example:{port}")
    assert status == 403 and "expected localhost or a loopback address" in told


def test_health_metrics_and_other_paths(served: tuple[Server, str]) -> None:
    server, address = served
    Client(address).ask()
    assert fetch(address, "/healthz") == (200, "ok\n")
    status, metrics = fetch(address, "/metrics")
    assert status == 200 and "uwm_serve_up 1\n" in metrics
    assert 'uwm_serve_requests_total{outcome="answered",mode="policy"} ' in metrics
    assert "uwm_serve_compilations_total 0\n" in metrics
    assert fetch(address, "/nothing")[0] == 404
    request = urllib.request.Request(address.replace("ws", "http") + "/metrics", method="POST")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == 405
    assert json.loads(json.dumps(server.status.to_json()))["latency"]["total_ms"]["p50"] > 0


def test_further_pages_are_asked_for_before_the_token() -> None:
    def pages(path: str, authorized: bool) -> Page | None:
        return Page(HTTPStatus.OK, "text/html", f"{path} {authorized}".encode()) if path == "/" else None

    with running(token="t", pages=pages) as (_, address):
        assert fetch(address, "/?x=1") == (200, "/ False")
        assert fetch(address, "/", Authorization="Api-Key t") == (200, "/ True")
        assert fetch(address, "/other")[0] == 401


def test_there_are_only_so_many_connections() -> None:
    with running(most=2) as (server, address):
        clients = [Client(address), Client(address)]
        with pytest.raises(InvalidStatus) as error:
            Client(address)
        assert error.value.response.status_code == 503
        clients[0].socket.close()
        wait_until(lambda: server.status.open == 1)
        assert Client(address).ask()["actions"].shape == (16, WIDTH)


def test_an_address_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        contract = make_contract()
        with pytest.raises(UserError, match="cannot listen here"):
            Server(contract, None, port=taken.getsockname()[1])  # type: ignore[arg-type]
    warming = make_server(contract)  # it holds its address before it listens
    with pytest.raises(UserError, match="cannot listen here"):
        Server(contract, None, port=urlsplit(warming.address).port or 0)  # type: ignore[arg-type]
    with running(warming) as (_, address):
        assert Client(address).ask()["actions"].shape == (16, WIDTH)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate: apt-get install openssl")
def test_tls(tmp_path: Any) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    with running(tls=access.tls(cert, key)) as (_, address):
        assert address.startswith("wss://")
        trust = ssl.create_default_context(cafile=cert)
        assert Client(address, ssl=trust).ask()["actions"].shape == (16, WIDTH)
        with pytest.raises((InvalidMessage, TimeoutError, OSError)):
            Client(address.replace("wss", "ws"), open_timeout=3)
