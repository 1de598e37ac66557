"""Batches of requests: when they run, in which sizes, and that a row's answer is its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from tests.serving.small_model import FRAME, HORIZON, WIDTH, make_contract, observation
from uwm_jax.actor import Actor
from uwm_jax.errors import RunError
from uwm_jax.serving.batching import Batcher, Engine, Job, Kind
from uwm_jax.serving.contract import Request
from uwm_jax.serving.messages import encode

CONTRACT = make_contract()


def job(state: float = 10.0, seed: int = 0, decision: int = 0, **fields: Any) -> Job:
    return Job(CONTRACT.read(encode(observation(state) | fields)), seed, decision)


def started(size: int = 8, **options: Any) -> tuple[Batcher, list[list[float]], asyncio.Task[None]]:
    """A batcher whose model notes the states of each batch, and answers with them."""
    seen: list[list[float]] = []

    def run(kind: Kind, jobs: Sequence[Job]) -> list[Any]:
        states = [float(job.request.inputs["obs/state"][0, 0]) for job in jobs]
        seen.append(states)
        if 13.0 in states:
            raise ValueError("unlucky")
        time.sleep(0.01)
        return [{"actions": np.array([state])} for state in states]

    batcher = Batcher(run, size, **options)
    return batcher, seen, asyncio.create_task(batcher.serve())


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_requests_within_the_deadline_share_a_batch() -> None:
    async def test() -> None:
        batcher, seen, task = started(deadline=0.2)
        answers = await asyncio.gather(*(batcher.submit(job(9.0 + i / 10)) for i in range(3)))
        assert len(seen) == 1 and [a.size for a in answers] == [3, 3, 3]
        assert [float(a.outputs["actions"][0]) for a in answers] == pytest.approx([9.0, 9.1, 9.2])
        assert all(a.waited > 0.15 and a.seconds >= 0.01 for a in answers)
        task.cancel()

    run(test)


def test_a_full_batch_and_a_lone_client_do_not_wait() -> None:
    async def test() -> None:
        batcher, seen, task = started(size=2, deadline=30.0)
        await asyncio.gather(*(batcher.submit(job()) for _ in range(4)))
        assert list(map(len, seen)) == [2, 2]
        task.cancel()
        batcher, seen, task = started(deadline=30.0, others=lambda: 0)
        await batcher.submit(job())
        assert list(map(len, seen)) == [1]
        task.cancel()

    run(test)


def test_kinds_run_apart_and_the_oldest_first() -> None:
    async def test() -> None:
        batcher, seen, task = started(deadline=0.05)
        promised = job(11.0, promised=np.zeros((1, WIDTH)))
        futures = [batcher.submit(job(9.0)), batcher.submit(promised), batcher.submit(job(9.5))]
        await asyncio.gather(*futures)
        assert seen == [[9.0, 9.5], [11.0]]
        task.cancel()

    run(test)


def test_requests_of_clients_that_are_gone_are_dropped() -> None:
    async def test() -> None:
        batcher, seen, task = started(deadline=0.05)
        gone = batcher.submit(job(9.0))
        gone.cancel()
        assert (await batcher.submit(job(9.5))).size == 1 and seen == [[9.5]]
        task.cancel()

    run(test)


def test_a_request_that_fails_does_not_fail_the_others() -> None:
    async def test() -> None:
        told: list[tuple[int, bool]] = []
        tell = lambda seconds, waited, failed: told.append((len(waited), failed))  # noqa: E731
        batcher, seen, task = started(deadline=0.05, tell=tell)
        futures = [batcher.submit(job(state)) for state in (9.0, 13.0, 9.5)]
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(answers[1], RunError) and "ValueError: unlucky" in str(answers[1])
        assert [float(answers[i].outputs["actions"][0]) for i in (0, 2)] == [9.0, 9.5]  # type: ignore[union-attr]
        assert (await batcher.submit(job(9.0))).size == 1
        assert told == [(3, True), (1, False)]
        task.cancel()

    run(test)


def test_the_event_loop_goes_on_while_the_model_runs() -> None:
    async def test() -> None:
        turned = threading.Event()

        def slow(kind: Kind, jobs: Sequence[Job]) -> list[Any]:
            assert turned.wait(10)
            return [{}]

        batcher = Batcher(slow, 8, deadline=0.0)
        task = asyncio.create_task(batcher.serve())
        answer, turns = batcher.submit(job()), 0
        while turns < 20 or not answer.done():
            await asyncio.sleep(0.001)
            turns += batcher.busy_since is not None
            if turns == 20:
                turned.set()
        assert answer.result().outputs == {}
        task.cancel()

    run(test)


def test_batches_are_padded_to_compiled_sizes_and_rows_are_independent() -> None:
    engine = Engine(CONTRACT.actor)
    ours = job(10.5, seed=3, decision=2)
    alone = engine.run(ours.kind, [ours])[0]
    CONTRACT.actor.backend.batches.clear()  # type: ignore[attr-defined]
    for count in range(1, 9):
        jobs = [job(9.0 + i / 10, seed=i) for i in range(count - 1)]
        found = engine.run(ours.kind, [*jobs, ours])
        assert len(found) == count
        np.testing.assert_array_equal(found[-1]["actions"], alone["actions"])  # type: ignore[index, call-overload]
    assert CONTRACT.actor.backend.batches == [1, 2, 4, 4, 8, 8, 8, 8]  # type: ignore[attr-defined]


def test_requests_of_different_inputs_are_different_kinds() -> None:
    frames = job(mode="inverse", **{"next_obs/front": np.zeros((2, *FRAME, 3), np.uint8)})
    latents = job(mode="inverse", next_obs_latent=np.zeros((1, 2, 1, 1, 3)))
    assert (
        len({job().kind, frames.kind, latents.kind, job(mode="forward", action=np.zeros((HORIZON, WIDTH))).kind}) == 4
    )
    engine = Engine(CONTRACT.actor)
    assert [float(engine.run(x.kind, [x])[0]["action"][0, 0]) for x in (frames, latents)] == [0, 1]  # type: ignore[index, call-overload]


def test_noise_follows_the_seed_and_the_decision_or_is_the_requests_own() -> None:
    engine = Engine(CONTRACT.actor, seed=5)

    def acted(*jobs: Job) -> list[np.ndarray]:
        return [made["actions"] for made in engine.run(jobs[0].kind, jobs)]  # type: ignore[index, call-overload]

    first, again, other, later = acted(job(seed=1), job(seed=1), job(seed=2), job(seed=1, decision=1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01 and np.abs(first - later).max() > 0.01
    own = job(**{"noise/action": np.array([0.25])})
    (given,) = acted(own)
    assert given[0, 2] == pytest.approx(7.25)
    assert given.shape == (HORIZON, WIDTH) and given.dtype == np.float32


def test_promised_rows_come_back() -> None:
    engine = Engine(CONTRACT.actor)
    rows = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    one, two = job(promised=rows), job(promised=rows[:1])
    first, second = (made["actions"] for made in engine.run(one.kind, [one, two]))  # type: ignore[index, call-overload]
    np.testing.assert_array_equal(first[:2], rows)
    np.testing.assert_array_equal(second[:1], rows[:1])
    np.testing.assert_array_equal(first[2:, :2], np.full((14, 2), 10.0, np.float32))


def test_outputs_that_are_not_finite_fail_their_own_row_alone() -> None:
    class Broken:
        backend, sizes = CONTRACT.actor.backend, CONTRACT.actor.sizes

        def noise(self, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> dict[str, np.ndarray]:
            return {}

        def chunks(self, inputs: dict[str, np.ndarray], noise: Any, promised: Any) -> np.ndarray:
            actions = np.zeros((len(inputs["obs/state"]), 2, WIDTH), np.float32)
            actions[inputs["obs/state"][:, 0, 0] == 9.0] = np.nan
            return actions

    good, bad = Engine(Broken()).run(job().kind, [job(10.0), job(9.0)])  # type: ignore[arg-type]
    assert isinstance(good, dict) and isinstance(bad, RunError) and "actions are not finite" in str(bad)


def test_warming_runs_every_size_and_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(Actor(CONTRACT.actor.backend, sizes=(1, 3)))
    jobs = [Job(Request("forward", job().request.inputs), 0, 0), job(promised=np.zeros((1, WIDTH)))]
    for title in ("", "warming up"):
        CONTRACT.actor.backend.batches.clear()  # type: ignore[attr-defined]
        engine.warm(jobs, title)
        assert CONTRACT.actor.backend.batches == [1, 3, 1, 3]  # type: ignore[attr-defined]
        shown = capsys.readouterr().err
        assert (
            (title in shown and "4/4" in shown and "policy, promised rows, batch of 3" in shown) if title else not shown
        )
