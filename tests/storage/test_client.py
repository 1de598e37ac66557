"""Injected faults of single requests: repeated with limits or told, and nothing cut is taken for whole."""

from __future__ import annotations

import base64
import functools
import json
import os
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c
import pytest
from absl import flags

from uwm_jax import cli, files
from uwm_jax.benchmarking.fault_proxy import fault_proxy
from uwm_jax.files import RemotePath, place
from uwm_jax.storage import client, environment, login, retries, transfers
from uwm_jax.storage.errors import StorageError

ONCE = ["429", "503", "reset", "lost", "truncate"]


@pytest.fixture
def faulty(storage_emulator, monkeypatch):
    """A function that puts a proxy with these faults in front of the emulator; pauses take no time."""
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: 0.001)
    stack = []

    def put(faults):
        proxy = fault_proxy(storage_emulator.url, faults=faults)
        running = proxy.__enter__()
        stack.append(proxy)
        for name, value in running.environ.items():
            monkeypatch.setenv(name, value)
        return running

    yield put
    for proxy in stack:
        proxy.__exit__(None, None, None)


def first_of(fault: str, method: str | None = None):
    """The first request (of this method) fails so."""
    left = [fault]
    return lambda called, path, number: left.pop() if left and method in (None, called) else None


@pytest.mark.parametrize("fault", ONCE)
def test_one_fault_is_survived_by_every_call(fault, faulty, bucket, tmp_path):
    folder = place(bucket, "--workdir")
    files.write_bytes(folder / "a", b"old")
    calls = {
        "write": lambda: files.write_bytes(folder / "a", b"x" * 1000),
        "read": lambda: (folder / "a").read_bytes(),
        "range": lambda: client.read_range(folder.bucket, (folder / "a").key, 10, 20),
        "stat": lambda: (folder / "a").stat().st_size,
        "list": lambda: [p.name for p in folder.iterdir()],
        "copy": lambda: client.copy((folder.bucket, (folder / "a").key), (folder.bucket, (folder / "c").key)),
        "download": lambda: (files.local_copy(folder / "c")).read_bytes(),
        "create": lambda: files.create(folder / "lock", b"1") is not None,
        "delete": lambda: (folder / "lock").unlink(),
    }
    answers = {}
    for name, call in calls.items():
        running = faulty(first_of(fault))
        answers[name] = call()
        assert running.requests[f"fault {fault}"] == 1, name
    whole = b"x" * 1000
    assert answers == {
        "write": None,
        "read": whole,
        "range": b"x" * 10,
        "stat": 1000,
        "list": ["a"],
        "copy": None,
        "download": whole,
        "create": True,
        "delete": None,
    }
    assert not (folder / "lock").exists()


@pytest.mark.parametrize("fault", ["503", "reset", "lost", "truncate"])  # the emulator stores a part twice after "lost"
def test_an_upload_in_parts_continues(fault, faulty, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "PART", 1 << 18)
    monkeypatch.setattr(client, "ONE_REQUEST", 1 << 16)
    data = os.urandom(3 * (1 << 18) + 5)
    (tmp_path / "a").write_bytes(data)
    at = iter(range(100))
    running = faulty(lambda method, path, number: fault if method == "PUT" and next(at) in (1, 4) else None)
    target = place(bucket, "--workdir") / "a"
    transfers.upload(tmp_path / "a", target)
    assert target.read_bytes() == data and target.stat().crc32c == google_crc32c.value(data)
    assert running.requests["PUT write"] == 6 or fault in ("lost", "truncate")  # four, and two again


def test_a_conditional_write_whose_answer_was_lost_is_ours(faulty, bucket):
    lock = place(bucket, "--workdir") / "lock"
    faulty(first_of("lost", "POST"))
    first = files.create(lock, b"mine")
    assert first == files.read_with_generation(lock)[1]
    faulty(first_of("lost", "POST"))
    second = files.replace_if(lock, b"mine", first)
    assert second not in (None, first) and second == files.read_with_generation(lock)[1]
    faulty(first_of("503", "POST"))
    assert files.create(lock, b"mine") is None  # of the same contents, but another's


def test_a_conditional_write_whose_answer_was_lost_and_that_is_deleted_since_is_no_longer_ours(
    faulty, storage_emulator, bucket
):
    lock = place(bucket, "--workdir") / "lock"
    first = files.create(lock, b"mine")

    fails = first_of("lost", "POST")

    def lose_then_delete(method, path, number):
        fault = fails(method, path, number)
        if method == "POST" and not fault:
            url = f"{storage_emulator.url}/storage/v1/b/{lock.bucket}/o/{urllib.parse.quote(lock.key, safe='')}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=10).close()
        return fault

    faulty(lose_then_delete)
    assert files.replace_if(lock, b"again", first) is None


def test_faults_without_end_are_told(faulty, bucket, monkeypatch):
    monkeypatch.setattr(retries, "TOTAL_SECONDS", 0.3)
    path = place(bucket, "--workdir") / "a"
    for fault, told in {
        "503": "503 Service Unavailable",
        "429": "429 Too Many Requests",
        "reset": "reset|aborted",
        "truncate": "of 4 bytes|IncompleteRead",
    }.items():
        files.write_bytes(path, b"four") if not path.exists() else None
        running = faulty(lambda method, called, number, fault=fault: fault)
        with pytest.raises(StorageError, match=rf"{path}: reading failed: .*({told}).* attempts in") as e:
            path.read_bytes()
        assert e.value.status == (int(fault) if fault.isdigit() else None)
        assert running.requests["GET read"] > 2
        monkeypatch.undo()
        monkeypatch.setattr(retries, "TOTAL_SECONDS", 0.3)
        monkeypatch.setattr(retries.random, "uniform", lambda low, high: 0.001)


def test_a_hung_request_is_given_up(faulty, bucket, monkeypatch):
    path = place(bucket, "--workdir") / "a"
    files.write_bytes(path, b"1")
    monkeypatch.setattr(environment, "SILENCE_SECONDS", 0.2)
    faulty(first_of("hang"))
    assert path.read_bytes() == b"1"
    faulty(lambda method, called, number: "hang")
    began = time.monotonic()
    with files.within(1.0), pytest.raises(StorageError, match="no answer in time"):
        path.read_bytes()
    assert time.monotonic() - began < 3


def test_what_does_not_match_its_checksum_is_not_taken(bucket, monkeypatch):
    monkeypatch.setattr(retries, "TOTAL_SECONDS", 0.1)
    path = place(bucket, "--workdir") / "a"
    files.write_bytes(path, b"right")
    real = client._send

    def damaged(*args, **kwargs):
        answer = real(*args, **kwargs)
        answer._content = b"wrong"
        return answer

    monkeypatch.setattr(client, "_send", damaged)
    with pytest.raises(StorageError, match="do not match their CRC32C"):
        path.read_bytes()


def test_a_folder_whose_upload_fails_has_no_marker(faulty, bucket, monkeypatch):
    monkeypatch.setattr(retries, "TOTAL_SECONDS", 0.2)
    target = place(bucket, "--workdir") / "new"
    faulty(lambda method, path, number: "503" if method == "POST" and number > 8 else None)
    with pytest.raises(StorageError, match="writing failed"), files.new_folder(target, last="done") as made:
        for i in range(40):
            (made / str(i)).write_text("x")
        (made / "done").write_text("")
    assert not (target / "done").exists() and len(list(target.iterdir())) < 40


def test_a_bucket_that_vanishes_is_told(storage_emulator):
    storage_emulator.make_bucket("soon-gone")
    path = RemotePath("gs://soon-gone/run/a")
    files.write_text(path, "1")
    storage_emulator.delete_bucket("soon-gone")
    for call in (
        path.read_bytes,
        path.exists,
        lambda: files.write_text(path, "2"),
        lambda: list(path.parent.iterdir()),
    ):
        with pytest.raises(StorageError, match="gs://soon-gone does not exist.*gcloud storage buckets create"):
            call()
    there = RemotePath("gs://bkt/soon-gone")
    files.write_text(there, "3")
    with pytest.raises(StorageError, match="gs://soon-gone does not exist"):
        files.copy_file(there, path)


def test_a_bucket_is_no_object():
    with pytest.raises(IsADirectoryError, match="gs://bkt"):
        RemotePath("gs://bkt").read_bytes()


# --- logins ----------------------------------------------------------------------------------------------------------


class Tokens(ThreadingHTTPServer):
    """An endpoint of short-lived tokens, and a service that wants the newest.

    Attributes:
      given: how many tokens it has given.
      refuses: how many requests with a good token are answered 401.
      dead: whether logins are refused.
    """

    def __init__(self, target: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.given, self.refuses, self.dead, self.seen = target, 0, 0, False, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Tokens

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = urllib.parse.parse_qs(body.decode())
        assert asked["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
        if self.server.dead:
            return self._answer(400, {"error": "invalid_grant", "error_description": "Account was deleted"})
        self.server.given += 1
        self._answer(200, {"access_token": f"token-{self.server.given}", "expires_in": 3600, "token_type": "Bearer"})

    def do_GET(self) -> None:
        found = self.headers.get("Authorization", "none")
        self.server.seen.append(found)
        if self.server.refuses:
            self.server.refuses -= 1
            return self._answer(401, {"error": {"message": "Invalid Credentials"}})
        if "forbidden" in self.path:
            return self._answer(403, {"error": {"message": "no storage.objects.get access"}})
        self._answer(200, {"name": "a", "size": "1", "generation": "1", "crc32c": ""})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def tokens(storage_emulator, monkeypatch, tmp_path):
    """A token endpoint, with the key file of a service account that names it."""
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives import serialization

    running = Tokens(storage_emulator.url)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "robot@lab.example", "token_uri": f"{running.url}/token"}
    (tmp_path / "key.json").write_text(json.dumps(account | {"private_key": key.decode(), "private_key_id": "1"}))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    yield running
    running.shutdown()
    running.server_close()


def test_one_401_is_refreshed_and_two_are_told(tokens):
    path = RemotePath("gs://bkt/a")
    assert path.stat().st_size == 1 and tokens.seen == ["Bearer token-1"]
    assert path.stat().st_size == 1 and tokens.given == 1  # a token is kept while it lives
    tokens.refuses = 1
    assert path.stat().st_size == 1 and tokens.seen[-2:] == ["Bearer token-1", "Bearer token-2"]
    tokens.refuses = 2
    with pytest.raises(StorageError, match="gs://bkt/a: looking up failed: 401 Invalid Credentials") as e:
        path.stat()
    assert tokens.seen[-2:] == ["Bearer token-2", "Bearer token-3"] and e.value.status == 401
    assert "robot@lab.example" in str(e.value) and "gcloud auth application-default login" in str(e.value)


def test_a_token_that_has_expired_is_replaced_before_it_is_sent(tokens):
    path = RemotePath("gs://bkt/a")
    path.stat()
    login._session[1].credentials.expiry = login._session[1].credentials.expiry.replace(year=2020)
    path.stat()
    assert tokens.seen == ["Bearer token-1", "Bearer token-2"]


def test_a_login_that_is_gone_is_told(tokens):
    tokens.dead = True
    with pytest.raises(StorageError, match="gs://bkt/a: looking up failed: the login could not be refreshed.*gcloud"):
        RemotePath("gs://bkt/a").stat()


def test_a_command_ends_with_one_message(tokens, capsys):
    def main(call: cli.Call) -> None:
        cli.required_path("workdir")

    tokens.dead = True
    define = functools.partial(flags.DEFINE_string, "workdir", None, "of the run")
    assert cli.call(main, ["command", "--workdir=gs://bkt/run"], define) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: gs://bkt/run: looking up failed") and "gcloud auth" in told and told.count("\n") == 1


def test_a_missing_permission_names_the_role_and_the_login(tokens):
    with pytest.raises(StorageError, match="403 no storage.objects.get access.*robot@lab.*objectAdmin on gs://bkt"):
        RemotePath("gs://bkt/forbidden").stat()


def test_credentials_that_cannot_be_used_are_told(storage_emulator, monkeypatch, tmp_path):
    (tmp_path / "key.json").write_text("{}")
    for file in ("key.json", "none.json"):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / file))
        with pytest.raises(StorageError, match=f"reading failed: GOOGLE_APPLICATION_CREDENTIALS=.*{file}.*gcloud auth"):
            RemotePath("gs://bkt/a").read_bytes()


def test_without_a_login_public_buckets_are_read_and_others_are_told(tokens, monkeypatch, tmp_path):
    """As on a machine outside of the cloud: no key file, no gcloud, no metadata server."""
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(client, "_base", lambda: tokens.url)
    path = RemotePath("gs://bkt/a")
    assert path.stat().st_size == 1 and tokens.seen == ["none"]
    tokens.refuses = 1
    with pytest.raises(StorageError, match="401 .*no login .*gcloud auth application-default login") as e:
        path.stat()
    assert tokens.seen == ["none"] * 2 and e.value.status == 401


def test_the_checksum_is_the_services():
    assert base64.b64decode(client._base64(google_crc32c.value(b"123456789"))).hex() == "e3069283"  # RFC 3720
