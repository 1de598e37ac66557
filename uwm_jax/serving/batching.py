"""Dynamic batching: requests of many clients wait for each other within a deadline, and run as one batch.

The model runs in one thread of its own. Batches are filled up to compiled sizes, each of which runs once before the
first client, so that nothing is compiled while a robot waits. A row's answer is a function of its own request: neither
the other rows of its batch nor the rows that fill it up change it by more than rounding.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from uwm_jax.actor import Actor
from uwm_jax.ending import leave_behind
from uwm_jax.errors import RunError
from uwm_jax.reading import cause_of
from uwm_jax.serving.contract import Arrays, Request

SIZES = (1, 2, 4, 8)


class Kind(NamedTuple):
    """Requests of one kind run as one batch: those of one use and of the same inputs, with or without promised rows."""

    mode: str
    inputs: frozenset[str]
    promised: bool


class Job(NamedTuple):
    """A request, and the source of its noise: its own seed, or the connection's count of requests."""

    request: Request
    seed: int
    decision: int

    @property
    def kind(self) -> Kind:
        return Kind(self.request.mode, frozenset(self.request.inputs), self.request.promised is not None)


class Answer(NamedTuple):
    """The outputs of one row, and how long the model took for its batch.

    Attributes:
      outputs: `actions` (horizon, Dr) float32 of the use that acts; OUT keys of `sample` files of the others.
      seconds: of the batch; waited: before it began. size: the requests in it.
    """

    outputs: Arrays
    seconds: float
    waited: float
    size: int


class Engine:
    """Runs batches of requests, padded to compiled sizes.

    Args:
      actor: its `sizes` are those of the batches of all uses.
      seed: of all noise.
    """

    def __init__(self, actor: Actor, *, seed: int = 0):
        assert actor.sizes
        self._actor, self._seed, self.sizes = actor, seed, tuple(actor.sizes)

    def warm(self, jobs: Sequence[Job], progress: str = "") -> None:
        """Compiles the programs of the kinds of these jobs, all sizes; `progress` is the title of a bar, "" for
        none."""
        batches = [(job, size) for job in jobs for size in self.sizes]
        with tqdm(total=len(batches), desc=progress, unit="batch", disable=not progress) as bar:
            for job, size in batches:
                promised = ", promised rows" if job.kind.promised else ""
                bar.set_postfix_str(f"{job.kind.mode}{promised}, batch of {size}")
                self.run(job.kind, [job] * size)
                bar.update()

    def run(self, kind: Kind, jobs: Sequence[Job]) -> list[Arrays | RunError]:
        """The outputs of each of 1 to `sizes[-1]` jobs of one kind; an error in place of those that are not finite."""
        backend = self._actor.backend
        acts = kind.mode == backend.acting
        size = next(size for size in self.sizes if size >= len(jobs))
        rows = list(jobs) if acts else [*jobs, *[jobs[0]] * (size - len(jobs))]  # the actor fills up itself
        requests = [job.request for job in rows]
        inputs = {key: np.stack([r.inputs[key] for r in requests]) for key in requests[0].inputs}
        seeds = np.array([job.seed for job in rows], np.uint32)
        decisions = np.array([job.decision for job in rows], np.uint32)
        noise = (
            self._actor.noise(self._seed, seeds, decisions)
            if acts
            else backend.noise(kind.mode, self._seed, seeds, decisions)
        )
        drawn = {name: np.array(x) for name, x in noise.items()}
        for row, request in enumerate(requests):
            for modality, x in request.noise.items():
                drawn[modality][row] = x
        if acts:
            promised = self._promised(requests) if kind.promised else None
            made = {"actions": np.asarray(self._actor.chunks(inputs, drawn, promised), np.float32)}
        else:
            made = {key: np.asarray(x) for key, x in backend.sample(kind.mode, inputs, drawn).items()}
        return [self._row(made, row) for row in range(len(jobs))]

    def _promised(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """(B, horizon, Dr) and how many rows of each are promised, (B,)."""
        counts = np.array([0 if r.promised is None else len(r.promised) for r in requests], np.int32)
        actions = np.zeros((len(requests), self._actor.horizon, self._actor.width), np.float32)
        for row, request in enumerate(requests):
            if request.promised is not None:
                actions[row, : counts[row]] = request.promised
        return actions, counts

    def _row(self, made: Arrays, row: int) -> Arrays | RunError:
        outputs = {key: x[row] for key, x in made.items()}
        if bad := [key for key, x in outputs.items() if x.dtype.kind == "f" and not np.isfinite(x).all()]:
            return RunError(
                f"the model's {', '.join(bad)} are not finite. Check the request for extreme values, and the "
                "checkpoint's parameters."
            )
        return outputs


@dataclasses.dataclass
class _Waiting:
    job: Job
    since: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Collects jobs, and runs those of one kind together.

    A batch runs when it is full, when its oldest job has waited for `deadline` seconds, or when no further job can
    come because `others()` is 0. The event loop only hands out work: the engine runs in a thread.

    Args:
      run: `Engine.run`.
      size: the most jobs of a batch.
      deadline: seconds that a job waits for others.
      others: how many clients might still send a request while those that wait here wait.
      tell: called after each batch with the seconds that it took, its jobs' waiting times, and whether it failed.
    """

    def __init__(
        self,
        run: Callable[[Kind, Sequence[Job]], list[Arrays | RunError]],
        size: int,
        *,
        deadline: float = 0.005,
        others: Callable[[], int] = lambda: 1,
        tell: Callable[[float, Sequence[float], bool], None] = lambda seconds, waited, failed: None,
    ):
        self._run, self._size, self._deadline, self._others, self._tell = run, size, deadline, others, tell
        self._waiting: dict[Kind, collections.deque[_Waiting]] = {}
        self._news = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "model")
        self.busy_since: float | None = None  # on the clock of `time.perf_counter`

    def submit(self, job: Job) -> asyncio.Future[Answer]:
        """The answer to a job, or RunError: the model failed, or its outputs are not finite. A job whose future is done
        before its batch begins, because its client is gone, is dropped."""
        waiting = _Waiting(job, time.perf_counter(), asyncio.get_running_loop().create_future())
        self._waiting.setdefault(job.kind, collections.deque()).append(waiting)
        self._news.set()
        return waiting.answer

    def look(self) -> None:
        """Called when `others()` may have become less."""
        self._news.set()

    async def serve(self) -> None:
        """Runs batches until it is cancelled."""
        try:
            while True:
                batch = await self._next()
                await self._answer(batch)
        finally:
            self._thread.shutdown(wait=False)
            if self.busy_since is not None:
                leave_behind("a batch of the model")

    async def _next(self) -> list[_Waiting]:
        """The jobs of the next batch, when it is time to run it."""
        while True:
            self._news.clear()
            kinds = [kind for kind in list(self._waiting) if self._living(kind)]
            if not kinds:
                await self._news.wait()
                continue
            kind = min(kinds, key=lambda kind: self._waiting[kind][0].since)
            queue = self._waiting[kind]
            left = queue[0].since + self._deadline - time.perf_counter()
            if len(queue) >= self._size or left <= 0 or self._others() <= 0:
                return [queue.popleft() for _ in range(min(self._size, len(queue)))]
            try:
                await asyncio.wait_for(self._news.wait(), left)
            except TimeoutError:
                pass

    def _living(self, kind: Kind) -> bool:
        """Whether jobs of a kind wait, after those are dropped whose client is gone."""
        queue = collections.deque(waiting for waiting in self._waiting[kind] if not waiting.answer.done())
        if queue:
            self._waiting[kind] = queue
        else:
            del self._waiting[kind]
        return bool(queue)

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        self.busy_since = began = time.perf_counter()
        made, failed = await loop.run_in_executor(self._thread, self._made, [waiting.job for waiting in batch])
        self.busy_since = None
        seconds = time.perf_counter() - began
        for waiting, outputs in zip(batch, made, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(outputs, RunError):
                waiting.answer.set_exception(outputs)
            else:
                waiting.answer.set_result(Answer(outputs, seconds, began - waiting.since, len(batch)))
        self._tell(seconds, [began - waiting.since for waiting in batch], failed)

    def _made(self, jobs: Sequence[Job]) -> tuple[list[Arrays | RunError], bool]:
        """The outputs of a batch, and whether the model failed; after a failure every job runs alone, so that one
        request does not fail the others."""
        try:
            return self._run(jobs[0].kind, jobs), False
        except Exception as e:
            if len(jobs) == 1 and isinstance(e, RunError):  # its outputs are not finite, which is the request's fault
                return [e], False
            if len(jobs) == 1:
                return [RunError(f"the model failed: {type(e).__name__}: {cause_of(e)}")], True
        alone = [self._made([job]) for job in jobs]
        return [outputs[0] for outputs, _ in alone], any(failed for _, failed in alone)
