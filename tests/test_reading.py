"""Reads that fail for a moment are tried again, damage is not; JSON is read whatever it turns out to be."""

from __future__ import annotations

import errno
import os

import pytest

from uwm_jax import reading
from uwm_jax.errors import RunError, UserError
from uwm_jax.reading import again, read_json


class Disk:
    """Fails so many times with an error; counts the tries."""

    def __init__(self, error: Exception, times: int):
        self.error, self.times, self.tries = error, times, 0

    def read(self) -> str:
        self.tries += 1
        if self.tries <= self.times:
            raise self.error
        return "content"


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited for, of a clock that does not run."""
    waited: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", waited.append)
    return waited


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/x")


class ClientConnectorError(OSError):
    """aiohttp's, by its name: what gcsfs raises where nobody answers at the bucket's address."""


FLEETING = [
    ClientConnectorError(errno.ECONNREFUSED, "Cannot connect to host storage.googleapis.com:443"),
    ClientConnectorError(-3, "Temporary failure in name resolution"),
    *(system_error(n) for n in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTDOWN)),
    RuntimeError("pread() failed: Input/output error; reading /data/x; at byte 200270; Could not read"),
    RuntimeError("read() failed: Stale file handle; reading data/x; at byte 0"),
    ValueError('INTERNAL: Error reading "/runs/x/d/0": [OS error 110: ETIMEDOUT Connection timed out]'),
]


@pytest.mark.parametrize("error", FLEETING, ids=lambda e: str(getattr(e, "errno", None) or e)[:20])
def test_three_more_tries_after_1_4_and_16_seconds(waits, capsys, error):
    disk = Disk(error, times=3)
    assert again(disk.read, "/data/x") == "content"
    assert waits == [1.0, 4.0, 16.0]
    assert capsys.readouterr().err.count("warning: /data/x: cannot be read") == 3
    disk = Disk(error, times=4)
    with pytest.raises(RunError, match=r"/data/x: cannot be read.*4 attempts in 21 s"):
        again(disk.read, "/data/x")
    assert disk.tries == 4


@pytest.mark.parametrize(
    "error",
    [
        UserError("/data/x: its checksum is not that of manifest.json: Input/output error"),
        ValueError("wrong checksum"),
        RuntimeError("Invalid ArrayRecord: header hash differs"),
        RuntimeError("no such record in /mnt/input/output error/x"),
        system_error(errno.ENOENT),
        system_error(errno.EACCES),
        MemoryError(),
    ],
    ids=lambda e: str(e)[:20],
)
def test_damage_and_what_a_user_can_mend_is_not_tried_again(waits, error):
    disk = Disk(error, times=1)
    with pytest.raises(type(error)):
        again(disk.read, "/data/x")
    assert disk.tries == 1 and waits == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "not JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"a": "\xe9"}', "UTF-8"),
        (b'{"a":' * 200_000, "too deeply"),
        (b"[" * 200_000, "too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not JSON"),
    ],
    ids=["cut", "utf16", "latin1", "deep", "deep-list", "huge-integer", "list", "empty", "pointer"],
)
def test_what_is_no_json_object_is_one_message(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        read_json(file)
    assert str(file) in str(e.value) and len(str(e.value)) < len(str(file)) + 200


def test_too_large_a_file_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_JSON", 100)
    (tmp_path / "a.json").write_text("{" + " " * 98 + "}")
    assert read_json(tmp_path / "a.json") == {}
    (tmp_path / "a.json").write_text("{" + " " * 99 + "}")
    with pytest.raises(UserError, match="at most"):
        read_json(tmp_path / "a.json")
