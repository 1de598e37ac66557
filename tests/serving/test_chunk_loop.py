"""`ChunkLoop` of `uwm_client.py`: rows, promises, late answers and stops, against a server that follows a script."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from tests.serving.fake_server import METADATA, echo, fake_server, reply
from tests.serving.small_model import make_server, observation
from uwm_jax.serving.connections import in_thread
from uwm_jax.serving.uwm_client import (
    ChunkLoop,
    Client,
    Late,
    RequestError,
    Stopped,
)


class Chunks:
    """Answers with rows (number of the chunk, step that the row is for), as a server that knows the robot's step, which
    travels as `obs/state`. The answer to a request of `held` waits for `let_go`."""

    def __init__(self, *held: int):
        self.held, self.let_go = held, threading.Event()
        self.stacked: list[list[float]] = []

    def __call__(self, connection: Any, request: dict[str, Any], number: int) -> None:
        self.stacked.append(request["obs/state"][:, 0].tolist())
        if number in self.held:
            self.let_go.wait(60)
        step = request["obs/state"][-1, 0]
        rows = np.array([[number, step + k] for k in range(8)], np.float32)
        if "promised" in request:
            rows[: len(request["promised"])] = request["promised"]
        reply(connection, request, actions=rows)


def act(loop: ChunkLoop, step: int, wait: bool = True) -> list[float]:
    """The row of a step; an answer that is under way is there before, unless `wait` is False."""
    while wait and loop._asked is not None and not loop._asked.done():
        time.sleep(0.002)
    return loop.act({"obs/state": np.full(3, step, np.float32), "obs/text": np.zeros(5)}).tolist()


def act_and_give_up(loop: ChunkLoop, step: int) -> list[float]:
    """The row of a step at which a chunk is asked for in vain."""
    before, loop._deadline = loop._deadline, 0.3
    row, loop._deadline = act(loop, step), before
    assert isinstance(loop._asked, Future) and isinstance(loop._asked.exception(30), Late)
    return row


@pytest.mark.parametrize(("execute", "delay"), [(4, 0), (4, 2), (1, 0), (5, 3), (3, 1), (4, 4)])
def test_rows_are_those_of_their_steps_and_what_was_executed_is_promised(execute: int, delay: int) -> None:
    script = Chunks()
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, execute, delay) as loop:
            rows = [act(loop, step) for step in range(24)]
    assert [row[1] for row in rows] == list(range(24))
    asked = [int(r["obs/state"][-1, 0]) for r in server.requests]
    assert asked == list(range(0, 24, execute))
    for number, (step, request) in enumerate(zip(asked, server.requests, strict=True)):
        assert script.stacked[number] == [max(step - 1, 0), step] and request["obs/text"].shape == (5,)
        executed = rows[step : step + delay] if number else []
        assert request.get("promised", np.zeros((0, 2))).tolist()[: len(executed)] == executed
        # From step + delay on it is this chunk's rows that are executed.
        own = rows[step + delay if number else 0 : step + delay + execute]
        assert {row[0] for row in own} <= {number}
    assert loop.late_steps == loop.stops == 0


def test_a_server_that_cannot_hold_promised_rows_gets_none() -> None:
    with fake_server(Chunks(), {**METADATA, "promised": False}) as server, Client(server.url, wait=5) as client:
        with pytest.warns(UserWarning, match="switches naively"):
            loop = ChunkLoop(client, 4, 2)
        with loop:
            rows = [act(loop, step) for step in range(12)]
    assert [row[0] for row in rows] == [0] * 6 + [1] * 4 + [2] * 2 and [row[1] for row in rows] == list(range(12))
    assert not any("promised" in request for request in server.requests)


def test_a_frame_may_be_overwritten_by_the_next() -> None:
    script, state = Chunks(), np.zeros(3, np.float32)
    with fake_server(script) as server, Client(server.url, wait=5) as client, ChunkLoop(client, 1, 0) as loop:
        for step in range(3):
            state[:] = step
            loop.act({"obs/state": state})
    assert script.stacked == [[0, 0], [0, 1], [1, 2]]


@pytest.mark.parametrize("delay", [0, 3])
def test_a_loop_with_the_server_itself(delay: int) -> None:
    """Whose rows tell the oldest and the newest state that they were sampled from; promised ones come back as sent."""
    with in_thread(make_server()) as address, Client(address, wait=10) as client:
        with ChunkLoop(client, 5, delay) as loop:
            rows = []
            for step in range(20):
                while loop._asked is not None and not loop._asked.done():
                    time.sleep(0.002)
                rows.append(loop.act(observation(10.0 + step)))
    asked = [0] * (5 + delay) + [5] * 5 + [10] * 5 + [15] * 5
    np.testing.assert_allclose([row[1] for row in rows], [10 + step for step in asked[:20]])
    np.testing.assert_allclose([row[0] for row in rows], [10 + max(step - 1, 0) for step in asked[:20]])
    assert loop.late_steps == loop.stops == 0


def test_a_late_answer_goes_on_in_the_old_chunk() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 4, 1) as loop:
            rows = [act(loop, step, wait=False) for step in range(7)]
            script.let_go.set()
            rows += [act(loop, step) for step in range(7, 16)]
    assert [row[1] for row in rows] == list(range(16))
    # The second chunk was asked for at step 4 and due at 5; it came between steps 6 and 7.
    assert [row[0] for row in rows] == [0] * 7 + [1] * 2 + [2] * 4 + [3] * 3
    assert loop.late_steps == 2 and loop.stops == 0


def test_no_answer_stops_by_name_and_then_starts_anew() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 4, 2) as loop:
            for step in range(8):
                act(loop, step, wait=False)
            with pytest.raises(Stopped, match="step 8: no answer in time"):
                act(loop, 8, wait=False)
            assert loop.stops == 1 and loop.late_steps == 3  # steps 6, 7 and 8
            script.let_go.set()
            assert act(loop, 8) == [2, 8] and "promised" not in server.requests[2]


def test_an_answer_past_its_deadline_is_asked_for_again() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 2, 2, deadline=30.0) as loop:
            rows = [act(loop, step) for step in range(2)]
            rows.append(act_and_give_up(loop, 2))
            rows += [act(loop, step) for step in range(3, 5)]
            script.let_go.set()
            rows += [act(loop, step) for step in range(5, 12)]
    assert [row[1] for row in rows] == list(range(12)) and loop.late_steps == 1 and loop.stops == 0
    assert client.dropped == 1


def test_an_answer_is_used_as_soon_as_the_old_chunk_ends() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 4, 3, deadline=30.0) as loop:
            rows = [act(loop, step) for step in range(4)]
            rows.append(act_and_give_up(loop, 4))
            rows += [act(loop, step) for step in range(5, 8)]  # at step 7 it is asked for again
            script.let_go.set()
            rows += [act(loop, step) for step in range(8, 14)]  # the old chunk's last row was that of step 7
    assert [row[1] for row in rows] == list(range(14)) and loop.stops == 0
    assert len(server.requests[2]["promised"]) == 1 and [row[0] for row in rows[6:10]] == [0, 0, 2, 2]


def test_a_refused_request_ends_the_loop() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        Chunks()(connection, request, number) if number == 0 else connection.send("promised: expected (d, 2)")

    with fake_server(script) as server, Client(server.url, wait=5) as client, ChunkLoop(client, 4, 2) as loop:
        with pytest.raises(RequestError, match="promised: expected"):
            for step in range(12):
                act(loop, step)


@pytest.mark.parametrize(("execute", "delay"), [(8, 1), (0, 0), (4, -1), (9, 0)])
def test_what_does_not_fit_a_chunk_is_refused_at_the_start(execute: int, delay: int) -> None:
    with fake_server(echo) as server, Client(server.url, wait=5) as client:
        with pytest.raises(ValueError, match="8 together at most"):
            ChunkLoop(client, execute, delay)


def test_a_delay_beyond_what_is_executed_is_refused_at_the_start() -> None:
    with fake_server(echo) as server, Client(server.url, wait=5) as client:
        with pytest.raises(ValueError, match="delay=3: expected at most execute=2"):
            ChunkLoop(client, 2, 3)


def test_a_stepwise_server_is_refused() -> None:
    with fake_server(echo, {**METADATA, "stepwise": True}) as server, Client(server.url, wait=5) as client:
        with pytest.raises(ValueError, match="stepwise"):
            ChunkLoop(client, 4)
