"""Many episodes of one environment, simulated in a few processes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from uwm_jax.envs import Controller, Env, EnvSpec, Observation, get
from uwm_jax.errors import RunError, UserError

HOLD = 8  # steps for which `random_held` keeps its target


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """One episode of T steps.

    Attributes:
        seed: of the start.
        scores: (T + 1,) float64, the environment's score at the start and after each step (PushT: coverage, 0 to 1).
        actions: (T, Da) float64, raw units, as the policy or controller gave them.
        success: whether the environment called it solved, which ends it.
        seam: of a policy, how far its action jumps where one chunk follows another, as `Policy.seams`; NaN where none
            does.
        first_chunk: of a policy, (horizon, Da) float32, its first chunk as the model has it, normalised; None of
            others.
    """

    seed: int
    scores: np.ndarray
    actions: np.ndarray
    success: bool
    seam: float = math.nan
    first_chunk: np.ndarray | None = None

    @property
    def max_score(self) -> float:
        """The episode's best score, that of its start included."""
        return float(self.scores.max())


@dataclasses.dataclass(frozen=True)
class Steps:
    """Results of a step (or a reset) of n environments: {key: (n, ...)}, scores (n,), success (n,), done (n,)."""

    observation: Observation
    score: np.ndarray
    success: np.ndarray
    done: np.ndarray


class Random:
    """Uniform actions from the whole action space, each held for `hold` steps."""

    def __init__(self, hold: int):
        self._hold = hold

    def reset(self, seed: int) -> None:
        # Salted: the environment draws its start from the bare seed.
        self._rng, self._steps = np.random.default_rng((seed, 1)), 0

    def act(self, env: Env) -> np.ndarray:
        if self._steps % self._hold == 0:
            low, high = (np.asarray(x, np.float64) for x in (env.action_space.low, env.action_space.high))
            self._action = self._rng.uniform(low, high)
        self._steps += 1
        return self._action


def cores() -> int:
    """How many this process may use; macOS does not tell, and has all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def controllers(spec: EnvSpec) -> tuple[str, ...]:
    """Names of what `ParallelEnvs.play` knows in this environment."""
    return ("random_uniform", "random_held", *(["expert"] if spec.expert else []))


def make_controller(spec: EnvSpec, name: str) -> Controller:
    """One of `controllers(spec)`."""
    if name == "expert" and spec.expert:
        return spec.expert()
    return Random({"random_uniform": 1, "random_held": HOLD}[name])


def play_episode(env: Env, controller: Controller, seed: int) -> EpisodeResult:
    """One episode of `controller`, to its end."""
    _, info = env.reset(seed=seed)
    controller.reset(seed)
    scores, actions, done = [info["score"]], [], False
    while not done:
        actions.append(np.asarray(controller.act(env), np.float64))
        _, _, terminated, truncated, info = env.step(actions[-1])
        scores.append(info["score"])
        done = terminated or truncated
    return EpisodeResult(seed, np.array(scores), np.array(actions), bool(info["success"]))


def replay(env: Env, episode: EpisodeResult) -> Observation:
    """The observations of an episode, {key: (T + 1, ...)}: its actions are taken again, from the same start."""
    seen = [env.reset(seed=episode.seed)[0], *(env.step(action)[0] for action in episode.actions)]
    return {key: np.stack([observation[key] for observation in seen]) for key in seen[0]}


class ParallelEnvs:
    """Environments of one kind in worker processes; use it as a context manager.

    Row i lives in process i mod workers, so a row's future depends on its seed and actions alone.

    Args:
        name: of the environment.
        cameras: {camera: (height, width)} of the frames to draw.
        workers: processes, at least 1.
    Raises:
        UserError: an unknown environment, a missing package, or frames that it cannot draw.
    """

    def __init__(self, name: str, cameras: Mapping[str, tuple[int, int]], workers: int):
        self.spec = get(name)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, name, dict(cameras)), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> ParallelEnvs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()  # a worker that waits for a command ends
        deadline = time.monotonic() + 2  # for all of them, which may be in the middle of an episode
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def reset(self, seeds: Sequence[int]) -> Steps:
        """Starts len(seeds) episodes, one a row."""
        return self._together("reset", np.arange(len(seeds)), [int(seed) for seed in seeds])

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Steps:
        """One step of some rows (n,) with actions (n, Da)."""
        return self._together("step", rows, actions)

    def play(self, controller: str, seeds: Sequence[int]) -> Iterator[tuple[int, EpisodeResult]]:
        """Complete episodes of a controller as they end: (place in `seeds`, episode). No pictures."""
        places = np.arange(len(seeds))
        waiting = {}
        for i, pipe in enumerate(self._pipes):
            share = places[places % len(self._pipes) == i]
            if len(share):
                self._send(pipe, ("play", share, (controller, [int(seeds[place]) for place in share])))
                waiting[pipe] = len(share)
        while waiting:
            for pipe in multiprocessing.connection.wait(list(waiting)):
                yield self._checked(*self._receive(pipe))
                waiting[pipe] -= 1
                if not waiting[pipe]:
                    del waiting[pipe]

    def _together(self, command: str, rows: np.ndarray, arguments: Any) -> Steps:
        share = rows % len(self._pipes)
        busy = []
        for i, pipe in enumerate(self._pipes):
            at = np.flatnonzero(share == i)
            if len(at):
                self._send(pipe, (command, rows[at], [arguments[j] for j in at]))
                busy.append((pipe, at))
        order = np.argsort(np.concatenate([at for _, at in busy]))
        answers = [self._receive(pipe) for pipe, _ in busy]  # of all, before one is found to be an error
        parts = [self._checked(*answer) for answer in answers]
        return Steps(
            {key: np.concatenate([p.observation[key] for p in parts])[order] for key in parts[0].observation},
            *(np.concatenate([getattr(p, name) for p in parts])[order] for name in ("score", "success", "done")),
        )

    def _send(self, pipe: Any, message: tuple[Any, ...]) -> None:
        with self._alive():
            pipe.send(message)

    def _receive(self, pipe: Any) -> tuple[str, Any]:
        with self._alive():
            kind, answer = pipe.recv()
        return kind, answer

    def _checked(self, kind: str, answer: Any) -> Any:
        if kind == "user error":
            raise UserError(answer)
        if kind == "error":
            raise RunError(f"a process that simulates {self.spec.name} failed:\n{answer}")
        return answer

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as e:
            raise RunError(
                f"a process that simulates {self.spec.name} died. If memory is short, give fewer --workers or "
                "--episodes."
            ) from e


def _work(pipe: Any, name: str, cameras: dict[str, tuple[int, int]]) -> None:
    """A worker process: answers commands until the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to the whole group; the parent ends us
        signal.signal(number, signal.SIG_IGN)
    envs: dict[int, Env] = {}
    spec: EnvSpec | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            command, rows, arguments = pipe.recv()
            try:
                spec = spec or get(name)
                if command == "play":
                    controller, seeds = make_controller(spec, arguments[0]), arguments[1]
                    bare = spec.make({})
                    for place, seed in zip(rows, seeds, strict=True):
                        pipe.send(("episode", (int(place), play_episode(bare, controller, seed))))
                    continue
                shown = []
                for row, argument in zip(rows.tolist(), arguments, strict=True):
                    if command == "reset":
                        if row not in envs:
                            envs[row] = spec.make(cameras)
                        observation, info = envs[row].reset(seed=argument)
                        shown.append((observation, info, False))
                    else:
                        observation, _, terminated, truncated, info = envs[row].step(argument)
                        shown.append((observation, info, terminated or truncated))
                steps = Steps(
                    {key: np.stack([o[key] for o, _, _ in shown]) for key in shown[0][0]},
                    np.array([info["score"] for _, info, _ in shown], np.float64),
                    np.array([info["success"] for _, info, _ in shown], bool),
                    np.array([done for _, _, done in shown], bool),
                )
                pipe.send(("steps", steps))
            except UserError as e:
                pipe.send(("user error", str(e)))
            except Exception:
                pipe.send(("error", traceback.format_exc()))
