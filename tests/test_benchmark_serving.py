"""The benchmark of the server: its flags, and how it judges what hostile messages changed."""

from __future__ import annotations

from typing import Any

import pytest

from uwm_jax import benchmark_serving, cli
from uwm_jax.benchmarking import hostile, serving_load
from uwm_jax.benchmarking.serving_load import Harm, Latency, ServeProcess
from uwm_jax.errors import RunError

METADATA = {
    "inputs": {
        "obs/front": {"shape": [2, 4, 5, 3], "dtype": "uint8"},
        "obs/state": {"shape": [2, 3], "dtype": "float32"},
    }
}


def run(*argv: str) -> int:
    return cli.call(benchmark_serving.main, ["benchmark_serving", *argv], benchmark_serving.define_flags)


class Fake:
    """A server whose memory and p99 after the attack are those before times `larger` and `slower`."""

    address = "ws://fake"
    larger, slower = 1.0, 1.0
    attacked = 0

    def __init__(self, flags: Any):
        assert flags == ("--workdir=x",)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def memory(self) -> int:
        return int(2**20 * (self.larger if Fake.attacked > 1 else 1))

    def end(self) -> tuple[int, str]:
        return 0, "7 requests received"

    def attack(self, address: str, count: int, seed: int = 0) -> Harm:
        Fake.attacked += 1
        return Harm(count - 1, 1, 2.0)

    def measure(self, address: str, clients: int, requests: int) -> Latency:
        return Latency(clients, 1.0, 3.0 * (self.slower if Fake.attacked > 1 else 1), 100.0)


@pytest.mark.parametrize(
    ("larger", "slower", "status"), [(1.0, 1.0, 0), (1.04, 1.19, 0), (1.06, 1.0, 1), (1.0, 1.21, 1)]
)
def test_what_hostile_messages_may_change(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, larger: float, slower: float, status: int
) -> None:
    monkeypatch.setattr(Fake, "attacked", 0)
    monkeypatch.setattr(Fake, "larger", larger)
    monkeypatch.setattr(Fake, "slower", slower)
    fake = Fake(("--workdir=x",))
    monkeypatch.setattr(serving_load, "ServeProcess", Fake)
    monkeypatch.setattr(serving_load, "attack", fake.attack)
    monkeypatch.setattr(serving_load, "measure", fake.measure)
    assert run("--clients=1,8", "--hostile=50", "--", "--workdir=x") == status
    printed = capsys.readouterr()
    assert "50 hostile messages: 49 refused, 1 answered, in 2 s" in printed.out and "7 requests received" in printed.out
    assert f"p99 3.00 -> {3 * slower:.2f} ms ({slower:.3f}, at most 1.2)" in printed.out
    assert ("hostile messages changed the server" in printed.err) == bool(status)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--clients=a", "--", "--workdir=x"], "--clients=a: expected numbers from 1 to 64"),
        (["--clients=65", "--", "--workdir=x"], "--clients=65"),
        ([], "expected the server's flags after --"),
    ],
)
def test_flags_that_do_not_fit(capsys: Any, argv: list[str], words: str) -> None:
    assert run(*argv) == cli.USAGE_STATUS
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_does_not_start() -> None:
    with pytest.raises(RunError, match="ended with status 2: error: --workdir or --export is required"):
        ServeProcess([])


def test_hostile_messages_are_the_same_every_time_and_of_every_kind() -> None:
    first, again = (list(hostile.messages(METADATA, 90, seed=3)) for _ in range(2))
    assert first == again and len(set(first)) == 90 and first != list(hostile.messages(METADATA, 90, seed=4))
    assert sum(isinstance(message, str) for message in first) == 5
    # Numpy's dtype of objects, with bytes that it would take for addresses.
    objects = [
        m
        for m in first
        if isinstance(m, bytes)
        and any(b"\xa5dtype" + o in m or b"\xc4\x05dtype" + o in m for o in (b"\xa1O", b"\xa2|O", b"\xa2<O", b"\xa2O8"))
    ]
    assert len(objects) >= 5
