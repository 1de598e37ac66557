"""Before a robot moves: a recorded episode goes through the live server, and its answers are set next to what was done.

A model that is shown what it was trained on repeats recorded actions closely. Where it does not, the same requests are
sent again as they would be without each of the usual faults: cameras exchanged, blue and red exchanged, frames upside
down, mirrored or turned, no normaliser. A fault whose removal brings the answers much nearer to the recording is named.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from uwm_jax.data.cover import cover
from uwm_jax.errors import RunError, UserError
from uwm_jax.serving.recorded_episode import RecordedEpisode
from uwm_jax.serving.uwm_client import Client, ClientError, RequestError

MOST_DECISIONS = 32  # of an episode that are compared, evenly spread
MOST_STEPS = 256  # of an episode that a stepwise server is sent
MUCH_NEARER = 0.9  # the largest share of the error as sent that is left where a fault is named
SURE = 3.0  # standard errors over decisions by which the error must fall
NO_BETTER = 0.9  # share of the mean action's error above which the answers tell of nothing that is seen
MOST_FAULTS = 3
ALIKE = 1.1  # times the error as sent, up to which a model answers alike with a fault and without
PATIENCE = 120.0  # seconds for an answer, which may wait behind those to other threads
_THREADS = 8

Request = dict[str, Any]


class Suspect(NamedTuple):
    """A fault, and what undoes it.

    Attributes:
        fault: in words; "" for requests as they are.
        mended: a request without it.
        kind: faults of one kind are not tried together; "" for those of one camera among others, tried alone.
        answered: the answer (n, Dr) to such a request at a step, in the robot's units; None where it is already.
    """

    fault: str
    mended: Callable[[Request], Request]
    kind: str = ""
    answered: Callable[[np.ndarray, int], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Tried:
    """How near the answers were under one assumption.

    Attributes:
        fault: that was undone; "" for requests as they are.
        errors: (decisions,) mean squared differences, each column in units of its spread over the dataset; inf where
            the server refused.
        rows: {step of a decision: (n, Dr) answer}.
        refused: the server's words; "" where it answered.
    """

    fault: str
    errors: np.ndarray
    rows: Mapping[int, np.ndarray]
    refused: str = ""

    @property
    def error(self) -> float:
        """The root of the mean square."""
        return math.sqrt(float(self.errors.mean()))


@dataclasses.dataclass(frozen=True)
class Replay:
    """The outcome.

    Attributes:
        name: of the episode. metadata: of the server.
        steps: of the decisions. recorded: {step: (n, Dr)}.
        as_sent: the answers to requests as they are.
        tried: everything else that was tried in the first round, nearest first.
        faults: the named ones, each with the trial that shows it.
        mean_error: of always taking the mean action.
        spread: (Dr,).
        latency_ms: of the requests as they are, one after the other.
        warnings: of the server.
        frames: {camera: (H, W, 3)} of the first decision, as sent.
    """

    name: str
    metadata: Mapping[str, Any]
    steps: Sequence[int]
    recorded: Mapping[int, np.ndarray]
    as_sent: Tried
    tried: Sequence[Tried]
    faults: Sequence[Tried]
    mean_error: float
    spread: np.ndarray
    latency_ms: np.ndarray
    warnings: Sequence[str]
    frames: Mapping[str, np.ndarray]

    @property
    def looks_wrong(self) -> list[str]:
        """A line for each fault that is named, or for answers that no fault explains; [] where nothing looks wrong."""
        before = self.as_sent.error
        lines = []
        for fault in self.faults:
            lines.append(f"{fault.fault}: without that, the error falls from {before:.3f} to {fault.error:.3f}")
            before = fault.error
        if not lines and self.as_sent.error > NO_BETTER * self.mean_error:
            lines.append(
                f"the answers are no nearer to the recording than the mean action ({self.as_sent.error:.3f} against "
                f"{self.mean_error:.3f}), and none of the usual faults explains it: check checkpoint, prompt and units"
            )
        return lines

    @property
    def not_told_apart(self) -> list[str]:
        """The faults that would not show, for this model answers nearly the same with them: [] where one is named."""
        near = [t.fault for t in self.tried if t.error <= ALIKE * self.as_sent.error]
        return [] if self.looks_wrong else near

    def lines(self) -> list[str]:
        """The outcome for a terminal."""
        p50, p99 = np.percentile(self.latency_ms, (50, 99))
        found = [
            f"replay of {self.name}: {len(self.steps)} decisions, {sum(map(len, self.recorded.values()))} actions",
            f"  error {self.as_sent.error:.3f} (1 is the spread of recorded actions; the mean action has "
            f"{self.mean_error:.3f}); a request takes {p50:.1f} ms (p99 {p99:.1f})",
            *(f"  warning: {line}" for line in self.warnings),
        ]
        if wrong := self.looks_wrong:
            return found + [f"  LOOKS WRONG: {line}" for line in wrong]
        found.append(f"  nothing looks wrong: of {len(self.tried)} faults, undoing none brings the answers much nearer")
        return found + [f"  would not show, for the answers hardly change: {fault}" for fault in self.not_told_apart]


def run(address: str, episode: RecordedEpisode, *, token: str = "", tls: Any = None) -> Replay:
    """Sends an episode through a server, and looks for faults.

    Args:
        address: `ws://...`. token, tls: as `uwm_client.Client` takes them.
    Raises:
        UserError: the server refuses the requests as they are.
        RunError: it does not answer in time.
    """
    try:
        return _run(lambda: Client(address, token, tls=tls, deadline=PATIENCE), episode)
    except ClientError as e:
        raise RunError(f"--replay: {e}") from e


def _run(connect: Callable[[], Client], episode: RecordedEpisode) -> Replay:
    with connect() as client:
        about = client.metadata
        ask = _Asked(about, episode, connect)
        plain = Suspect("", lambda request: request)
        latency, warnings = ask.alone(client)
    as_sent = ask.all([plain])[0]
    if as_sent.refused:
        raise UserError(f"--replay: the server refuses what was recorded: {as_sent.refused}")
    suspects, mean_error = list(suspected(episode)), ask.mean_error(episode.mean)
    tried = _nearest_first(ask.all(suspects))
    faults, best, base = list[Tried](), tried, (as_sent, plain)
    if as_sent.error > NO_BETTER * mean_error and not (best and much_nearer(as_sent.errors, best[0].errors)):
        pairs = [pair for pair in itertools.combinations(suspects, 2) if all(s.kind for s in pair)]
        suspects = [together(*pair) for pair in pairs if pair[0].kind != pair[1].kind]
        best = _nearest_first(ask.all(suspects))
        tried = [*tried, *best]
    while best and len(faults) < MOST_FAULTS and much_nearer(base[0].errors, best[0].errors):
        faults.append(best[0])
        base = best[0], together(base[1], next(s for s in suspects if s.fault == best[0].fault))
        suspects = [s for s in suspects if s.fault != best[0].fault]
        named = ask.all([together(base[1], s) for s in suspects])
        best = _nearest_first([dataclasses.replace(t, fault=s.fault) for t, s in zip(named, suspects, strict=True)])
    first = ask.requests[0]
    return Replay(
        name=episode.name,
        metadata=about,
        steps=ask.steps,
        recorded=ask.recorded,
        as_sent=as_sent,
        tried=tried,
        faults=faults,
        mean_error=mean_error,
        spread=episode.spread,
        latency_ms=latency,
        warnings=warnings,
        frames={name: first[name] if first[name].ndim == 3 else first[name][-1] for name in episode.cameras},
    )


def suspected(episode: RecordedEpisode) -> Iterator[Suspect]:
    """The usual faults of an episode's requests."""
    cameras = episode.cameras
    groups = [tuple(cameras), *((name,) for name in cameras if len(cameras) > 1)] if cameras else []
    for names in groups:
        every = len(names) == len(cameras)
        whose = "of all cameras" if every and len(cameras) > 1 else f"of {names[0]}"
        for how, (kind, change) in _CHANGES.items():
            yield Suspect(f"the frames {whose} {how}", _changing(names, change), kind if every else "")
    for one, two in itertools.combinations(cameras, 2):
        exchange = _exchanging({one: two, two: one}, cameras)
        yield Suspect(f"the cameras {one} and {two} are exchanged", exchange, "exchanged")
    if len(cameras) == 3:
        a, b, c = cameras
        for turn in ({a: b, b: c, c: a}, {a: c, c: b, b: a}):
            words = ", ".join(f"{shown} is sent as {name}" for name, shown in turn.items())
            exchange = _exchanging({shown: name for name, shown in turn.items()}, cameras)
            yield Suspect(f"the cameras are exchanged: {words}", exchange, "exchanged")
    if (own := episode.own_normalizer()) is not None:
        yield Suspect(
            "the served model lacks its normaliser",
            lambda request: episode.normalized(request, own),
            "normaliser",
            lambda rows, step: episode.unnormalized(rows, step, own),
        )


def much_nearer(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether errors (decisions,) fall by so much that it is no accident."""
    if not np.isfinite(after).all() or after.mean() > MUCH_NEARER**2 * before.mean():
        return False
    fall = before - after
    spread = fall.std(ddof=1) / math.sqrt(len(fall)) if len(fall) > 1 else 0.0
    return bool(fall.mean() > SURE * spread)


def together(first: Suspect, second: Suspect) -> Suspect:
    """Both at once."""
    answers = [s.answered for s in (first, second) if s.answered]

    def answered(rows: np.ndarray, step: int) -> np.ndarray:
        for answer in answers:
            rows = answer(rows, step)
        return rows

    return Suspect(
        f"{first.fault}, and {second.fault}",
        lambda request: second.mended(first.mended(request)),
        answered=answered if answers else None,
    )


def _nearest_first(tried: Sequence[Tried]) -> list[Tried]:
    return sorted(tried, key=lambda t: t.error)


_CHANGES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "are BGR, blue first": ("colour", lambda x: x[..., ::-1]),
    "are upside down (rows flipped)": ("flipped", lambda x: x[..., ::-1, :, :]),
    "are mirrored (columns flipped)": ("flipped", lambda x: x[..., :, ::-1, :]),
    "are turned by 180 degrees": ("flipped", lambda x: x[..., ::-1, ::-1, :]),
}


def _changing(names: Sequence[str], change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Request], Request]:
    return lambda request: request | {name: np.ascontiguousarray(change(request[name])) for name in names}


def _exchanging(shown: Mapping[str, str], sizes: Mapping[str, tuple[int, int]]) -> Callable[[Request], Request]:
    """{camera: the one whose frames it gets}, resized where it has another size."""

    def fitting(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if frames.shape[-3:-1] == size:
            return frames
        each = frames.reshape(-1, *frames.shape[-3:])
        return np.stack([cover(frame, size) for frame in each]).reshape(*frames.shape[:-3], *size, 3)

    return lambda request: request | {name: fitting(request[other], sizes[name]) for name, other in shown.items()}


class _Asked:
    """Asks a server the same decisions again and again.

    Attributes:
        steps: of the decisions; recorded: {step: (n, Dr)}; requests: of the decisions, of a stepwise server of every
            step.
    """

    def __init__(self, about: Mapping[str, Any], episode: RecordedEpisode, connect: Callable[[], Client]):
        self._connect, self._episode = connect, episode
        self._stepwise, self._execute = bool(about["stepwise"]), int(about["execute"])
        if self._stepwise:
            count = min(episode.length, MOST_STEPS)
            self.steps = list(range(0, count, self._execute))
            asked = list(range(count))
        else:
            even = np.linspace(0, max(episode.length - self._execute, 0), MOST_DECISIONS)
            self.steps = sorted({int(step) for step in even.round()})
            count, asked = episode.length, self.steps
        self.requests = episode.requests(asked, () if self._stepwise else about["history"])
        self.recorded = {step: episode.actions(step, min(self._execute, count - step)) for step in self.steps}
        self._local = threading.local()

    def error(self, step: int, rows: np.ndarray) -> float:
        """The mean squared difference of an answer from what was recorded, in units of the spread."""
        recorded = self.recorded[step]
        return float((((rows[: len(recorded)] - recorded) / self._episode.spread) ** 2).mean())

    def mean_error(self, mean: np.ndarray) -> float:
        """The error of always taking one action (Dr,)."""
        each = [self.error(step, np.broadcast_to(mean, rows.shape)) for step, rows in self.recorded.items()]
        return math.sqrt(float(np.mean(each)))

    def alone(self, client: Client) -> tuple[np.ndarray, list[str]]:
        """The latencies (requests,) in ms of the requests as they are, one after the other, and the server's
        warnings."""
        seconds, warnings = [], []
        client.reset()
        for number, request in enumerate(self.requests):
            began = time.perf_counter()
            try:
                reply = client.infer(request | {"seed": number})
            except RequestError as e:
                raise UserError(f"--replay: the server refuses what was recorded: {e}") from e
            seconds.append(time.perf_counter() - began)
            warnings += reply.get("warnings", [])
        return np.array(seconds) * 1000, warnings

    def all(self, suspects: Sequence[Suspect]) -> list[Tried]:
        """The trials of these, many requests at a time."""
        jobs: list[tuple[int, int]] = [
            (s, d) for s in range(len(suspects)) for d in ([0] if self._stepwise else range(len(self.steps)))
        ]
        clients: list[Client] = []

        def one(job: tuple[int, int]) -> dict[int, np.ndarray] | RequestError:
            if not hasattr(self._local, "client"):
                self._local.client = self._connect()
                clients.append(self._local.client)
            suspect = suspects[job[0]]
            try:
                return self._episode_of(suspect) if self._stepwise else self._decision(suspect, job[1])
            except RequestError as e:
                return e

        with ThreadPoolExecutor(_THREADS) as pool:
            answers = list(pool.map(one, jobs))
        self._local = threading.local()
        for client in clients:
            client.close()
        found = []
        for number, suspect in enumerate(suspects):
            rows: dict[int, np.ndarray] = {}
            refused = ""
            for (of, _), answer in zip(jobs, answers, strict=True):
                if of != number:
                    continue
                if isinstance(answer, RequestError):
                    refused = str(answer)
                else:
                    rows |= answer
            errors = np.array([np.inf if refused else self.error(step, rows[step]) for step in self.steps])
            found.append(Tried(suspect.fault, errors, rows, refused))
        return found

    def _decision(self, suspect: Suspect, number: int) -> dict[int, np.ndarray]:
        step = self.steps[number]
        reply = self._local.client.infer(suspect.mended(self.requests[number]) | {"seed": number})
        return {step: self._answer(suspect, reply["actions"][: len(self.recorded[step])], step)}

    def _episode_of(self, suspect: Suspect) -> dict[int, np.ndarray]:
        client: Client = self._local.client
        client.reset()
        rows = [client.infer(suspect.mended(request) | {"seed": 0})["actions"][0] for request in self.requests]
        return {
            step: self._answer(suspect, np.stack(rows[step : step + len(self.recorded[step])]), step)
            for step in self.steps
        }

    @staticmethod
    def _answer(suspect: Suspect, rows: np.ndarray, step: int) -> np.ndarray:
        return suspect.answered(rows, step) if suspect.answered else rows
