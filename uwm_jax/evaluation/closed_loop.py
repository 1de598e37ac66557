"""Closed loop: a policy, random policies and an expert act in a simulator on the same starts, and are compared.

The rollout command, comparisons of samplers and evaluation in training share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from uwm_jax.backend import Backend, answering
from uwm_jax.data.choices import keys_of
from uwm_jax.data.records import short_key
from uwm_jax.data.spec import DataSpec
from uwm_jax.envs import EnvSpec, get
from uwm_jax.envs.parallel import EpisodeResult, ParallelEnvs, cores
from uwm_jax.errors import UserError, warn
from uwm_jax.evaluation.metrics import Metrics, difference_bounds, interval, proportion, proportion_difference
from uwm_jax.files import Place, write_text
from uwm_jax.parallel import distributed
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.sharding import Rules
from uwm_jax.policy import Policy
from uwm_jax.systems.base import System
from uwm_jax.training.step import compile_for

POLICY = "policy"
NO_ACTION = "no_action"
FIRST_SEED = 100_000  # as published PushT evaluations begin; far from the seeds of demonstrations
BATCH = 32  # rows of one call of the network; constant, so that the number of episodes changes none of them

Rounds = Callable[[Iterator[int]], Iterator[int]]


class Described(Protocol):
    """A model as far as environments are concerned: a `System`, its `Backend`, or what one will be made of."""

    @property
    def config(self) -> ConfigDict: ...
    @property
    def spec(self) -> DataSpec: ...


class Sampling(Protocol):
    """A `System` or its `Backend`."""

    def describe_sampling(self) -> dict[str, Any]: ...


class Inputs(NamedTuple):
    """A model before it is made."""

    config: ConfigDict
    spec: DataSpec


class MeshSampler:
    """The program of the acting use's actions for parameters as they lie on a mesh, for the `JaxBackend` of process 0;
    the other processes `follow`. `compile` comes first.

    Args:
        system: whose acting use is sampled.
        mesh, rules: where rows lie, and the parameters that will be given.

    Attributes:
        rows: of one call: `BATCH`, or as few more as the mesh divides.
    """

    def __init__(self, system: System, mesh: Mesh, rules: Rules):
        self._system, self._mesh, self._rules = system, mesh, rules
        shares = math.prod(mesh.shape[axis] for axis in mesh_lib.BATCH_AXES)
        self.rows = shares * -(-BATCH // shares)
        batch = {key: like for key, like in system.spec.batch_like(self.rows).items() if key.startswith("obs/")}
        noise = jax.eval_shape(lambda: system.noise(jax.random.key(0), jnp.arange(self.rows), system.acting))
        self._like = batch, {system.acting: noise}
        self._shardings = jax.tree.map(lambda _: mesh_lib.batch_sharding(mesh), self._like)

    def compile(self, params: Any, frozen: Any) -> list[Any]:
        """Compiles the program and returns it; `params`, `frozen` are arrays, or shapes with shardings."""
        inputs = mesh_lib.with_sharding(self._like, self._shardings)
        function = answering(self._system, (self._system.acting,), actions_only=True)
        self._program = compile_for(self._mesh, self._rules, function, params, frozen, *inputs, updates_state=False)
        return [self._program]

    def __call__(self, params: Any, frozen: Any, batch: Any, noise: Any, promised: None = None) -> dict[str, Any]:
        """As the function that `backend.answering` makes; with several processes all take part, by `follow`."""
        inputs = jax.device_get((dict(batch), noise))
        if jax.process_count() > 1:
            inputs = multihost_utils.broadcast_one_to_all(inputs)
        made: dict[str, Any] = self._program(params, frozen, *mesh_lib.place(inputs, self._shardings))
        return made

    def follow(self, params: Any, frozen: Any) -> None:
        """Takes part in a call of process 0."""
        self(params, frozen, *jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), self._like))


def closed_loop(
    backend: Backend,
    env: str | ParallelEnvs,
    seeds: Sequence[int],
    *,
    execute: int = 8,
    latency: int = 0,
    switch: str = "wait",
    history: str = "kept",
    seed: int = 0,
    workers: int = 0,
    progress: str = "",
    rows_of_a_call: int = BATCH,
    each: Rounds = iter,
) -> list[EpisodeResult]:
    """Lets the acting use of a model act in an environment, one episode from each of `seeds`.

    An episode is a function of (backend, env, its seed, execute, latency, switch, history, seed) alone: neither the
    other episodes nor the number of workers changes it. The backend's config decides the sampler, so a number of steps
    or a rule is tried by giving another one.

    Args:
        env: name of the environment (`uwm_jax.envs`), e.g. "pusht"; or what `open_envs` opened, which saves the start
            of processes.
        seeds: of the episodes' starts; PushT's evaluation starts at 100000.
        execute: steps of each sampled chunk that are taken before the next chunk is sampled.
        latency, switch: control steps until a chunk is there, and what the robot does meanwhile, as `Policy` has
            `delay` and `switch`. Needs a backend of one process where it is more than 0.
        history: as `Policy` has it.
        seed: of the sampler's noise, together with the episode's seed and the number of the decision.
        workers: processes that simulate; 0 = all cores, at most one per episode.
        progress: the progress bar's description; "" shows none.
        rows_of_a_call: of the network; `MeshSampler.rows` of one on a mesh. Where that has several processes, process 0
            calls this, and the others `follow`.
        each: gives the numbers of the rounds on, one by one; a round is a chunk of each episode that is not over. What
            it raises ends the episodes.

    Returns:
        The episodes in the order of `seeds`.

    Raises:
        UserError: an unknown environment, a missing package, a model that was trained on other inputs or actions
            than the environment has, or an `execute` and `latency` that its chunks do not have.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(env, str):
            env = stack.enter_context(open_envs(env, backend, seeds, workers))
        check_fits(env.spec, backend)
        policy = Policy(
            backend,
            execute=execute,
            delay=latency,
            switch=switch,
            history=history,
            seed=seed,
            batch_size=rows_of_a_call,
            source=acting_source(backend),
            limits=env.spec.action_limits,
        )
        bar = stack.enter_context(_bar(progress, env.spec.max_steps, "step"))
        policy.reset(seeds)
        views, seen = views_of(env.spec, backend), env.reset(seeds)
        scores, actions = [[score] for score in seen.score], [[] for _ in seeds]  # type: ignore[var-annotated]
        success = np.zeros(len(seeds), bool)
        rows, observation = np.arange(len(seeds)), seen.observation
        first: np.ndarray | None = None
        for _ in each(_rounds(env.spec, execute)):
            if not distributed.agree(len(rows)):
                break
            for _ in range(execute):
                action = policy.act(under_views(observation, views), rows).astype(np.float64)
                if first is None:
                    states = {key: observation[key] for key in policy.actor.states}
                    first = policy.actor.normalized(policy.chunks(), states)
                seen = env.step(rows, action)
                for i, row in enumerate(rows):
                    scores[row].append(seen.score[i])
                    actions[row].append(action[i])
                success[rows] = seen.success
                rows, observation = rows[~seen.done], {key: x[~seen.done] for key, x in seen.observation.items()}
                bar.update()
                bar.set_postfix(solved=f"{success.sum()}/{len(seeds)}", refresh=False)
                if not len(rows):
                    break
    if policy.actor.cut:
        warn(f"{policy.actor.cut} numbers of sampled actions were beyond the limits of {env.spec.name}, and were cut.")
    jumps = policy.seams()
    return [
        EpisodeResult(
            int(s),
            np.array(scores[i]),
            np.array(actions[i]),
            bool(success[i]),
            float(jumps[i]),
            None if first is None else first[i],
        )
        for i, s in enumerate(seeds)
    ]


def follow(sampler: MeshSampler, params: Any, frozen: Any, spec: EnvSpec, *, execute: int, each: Rounds = iter) -> None:
    """The part that the other processes have in the `closed_loop` of process 0, whose arguments these are."""
    for _ in each(_rounds(spec, execute)):
        if not (left := distributed.agree(0)):  # process 0's number of episodes
            break
        for _ in range(-(-left // sampler.rows)):
            sampler.follow(params, frozen)


def _rounds(spec: EnvSpec, execute: int) -> Iterator[int]:
    """The numbers of the chunks of an episode that takes as long as it may."""
    return iter(range(-(-spec.max_steps // execute)))


def open_envs(name: str, model: Described, seeds: Sequence[int], workers: int = 0) -> ParallelEnvs:
    """The processes that simulate what a model sees, for episodes from `seeds`; a context manager.

    Args and errors: as `closed_loop`.
    """
    check_fits(get(name), model)
    return ParallelEnvs(name, env_cameras(get(name), model), min(workers or cores(), len(seeds)))


def play(envs: ParallelEnvs, controller: str, seeds: Sequence[int]) -> list[EpisodeResult]:
    """Episodes of one of `controllers`, in the order of `seeds`, with a progress bar."""
    found: dict[int, EpisodeResult] = {}
    with _bar(controller, len(seeds), "episode") as bar:
        for place, episode in envs.play(controller, seeds):
            found[place] = episode
            bar.update()
    return [found[place] for place in range(len(seeds))]


def views_of(spec: EnvSpec, model: Described) -> dict[str, str]:
    """{camera of the model: the environment's camera that it shows}: what the run's first source with actions has
    there, which may be one camera for several views, and of a choice the first that the environment has; or the
    environment's camera of the same name."""
    data = model.config.data
    keys, choices = data.cameras, [data.choices]
    if robots := [source for _, source in sorted(data.sources.items()) if source.use_actions]:
        keys, choices = robots[0].cameras or data.cameras, [*choices, robots[0].choices]
    recorded = {
        view: [short_key(key) for key in keys_of(name, *choices)] for view, name in zip(data.cameras, keys, strict=True)
    }
    shown = {
        view: next((c for c in (*recorded.get(view, ()), view) if c in spec.cameras), None)
        for view in model.spec.cameras
    }
    return {view: camera for view, camera in shown.items() if camera}


def acting_source(model: Described) -> str:
    """The source whose robot acts: the run's first one with actions, as its cameras are those that are shown; "" where
    the model does not tell."""
    robots = [name for name, source in sorted(model.config.data.sources.items()) if source.use_actions]
    return next((name for name in robots if name in model.spec.robots), "")


def env_cameras(spec: EnvSpec, model: Described) -> dict[str, tuple[int, int]]:
    """{the environment's camera: (height, width)} of the frames to draw."""
    return {camera: model.spec.cameras[view] for view, camera in views_of(spec, model).items()}


def under_views(observation: Mapping[str, np.ndarray], views: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The observation with what each of the model's views shows."""
    return {**observation, **{view: observation[camera] for view, camera in views.items()}}


def with_views(spec: EnvSpec, model: Described) -> EnvSpec:
    """The environment whose actions are drawn on the model's first view of that camera."""
    if spec.action_plane is None:
        return spec
    camera, x_low, x_high, y_low, y_high = spec.action_plane
    views = [view for view, shown in sorted(views_of(spec, model).items()) if shown == camera]
    plane = (views[0] if views else camera, x_low, x_high, y_low, y_high)
    return dataclasses.replace(spec, action_plane=plane)


def check_fits(spec: EnvSpec, model: Described, asked: str = "--env") -> None:
    """Raises UserError where the model reads what the environment does not show, or acts in another space.

    Args:
        asked: the flag or field that named the environment.
    """
    data, views = model.spec, views_of(spec, model)
    robot = data.robot(acting_source(model))
    action_dim = robot.width if robot else data.action_dim
    low_dim = {**data.low_dim, **(robot.states if robot else {})}
    problems = [
        *(
            f"camera {c!r}: {spec.name} has {', '.join(spec.cameras)}"
            for c in sorted(data.cameras.keys() - views.keys())
        ),
        *(
            f"{key} ({dim} numbers): {spec.name} has {dict(spec.low_dim)}"
            for key, dim in low_dim.items()
            if spec.low_dim.get(key) != dim
        ),
        *([f"text ({data.text_dim} numbers): {spec.name} has none"] if data.text_dim else []),
    ]
    if action_dim != spec.action_dim:
        problems.append(f"{action_dim} numbers of action: {spec.name} takes {spec.action_dim}")
    if problems:
        raise UserError(
            f"{asked}={spec.name} is not what the model was trained on. The model has\n  " + "\n  ".join(problems)
        )


def measure(results: Mapping[str, Sequence[EpisodeResult]], spec: EnvSpec) -> Metrics:
    """`<who>/max_<score>` and `<who>/success`, each `{mean, lo, hi, n, episodes}` with a 95 % interval over episodes,
    and `<who>/seam` of policies over their episodes in which chunks followed each other.

    `no_action` is the start's score, what doing nothing gives. `paired/policy_vs_<who>/...` is the difference on the
    same starts, positive where the policy is better: scores higher, seams smaller.
    """
    best = {who: np.array([e.max_score for e in episodes]) for who, episodes in results.items()}
    best[NO_ACTION] = np.array([e.scores[0] for e in results[POLICY]])
    success = {who: np.array([e.success for e in episodes], np.bool_) for who, episodes in results.items()}
    seams = {who: np.array([e.seam for e in episodes]) for who, episodes in results.items()}
    every, bounds = np.arange(len(results[POLICY])), spec.score_range
    metrics = {f"{who}/max_{spec.score}": interval(x, every, bounds) for who, x in best.items()}
    metrics |= {f"{who}/success": proportion(x) for who, x in success.items()}
    for who, x in seams.items():
        if (there := np.isfinite(x)).any():
            metrics[f"{who}/seam"] = interval(x[there], every[there], (0.0, math.inf))
    for who in results.keys() - {POLICY}:
        pair, difference = f"paired/{POLICY}_vs_{who}", best[POLICY] - best[who]
        metrics[f"{pair}/max_{spec.score}"] = interval(difference, every, difference_bounds(*bounds))
        metrics[f"{pair}/success"] = proportion_difference(success[POLICY], success[who])
        smoother = seams[who] - seams[POLICY]
        if (there := np.isfinite(smoother)).any():
            metrics[f"{pair}/seam"] = interval(smoother[there], every[there])
    return dict(sorted(metrics.items()))


def names_of(spec: EnvSpec) -> frozenset[str]:
    """The metrics that `measure` gives of the policy alone."""
    return frozenset(
        {f"{POLICY}/max_{spec.score}", f"{POLICY}/success", f"{POLICY}/seam", f"{NO_ACTION}/max_{spec.score}"}
    )


def _bar(description: str, total: int, unit: str) -> tqdm:
    pause = 0.5 if sys.stderr.isatty() else 10.0  # seconds between lines of a log file
    return tqdm(total=total, desc=description, unit=unit, mininterval=pause, disable=not description)


def describe_episodes(
    spec: EnvSpec,
    model: Sampling,
    results: Mapping[str, Sequence[EpisodeResult]],
    execute: int,
    seed: int,
    latency: int = 0,
    switch: str = "wait",
    history: str = "kept",
) -> dict[str, Any]:
    """Contents of `episodes.json`: how it was run; each episode's seed, best and last score, steps, success, and of the
    policy its seam and first chunk."""
    return {
        "env": spec.name,
        "execute": execute,
        **_unusual(latency, switch, history),
        "sampler_seed": seed,
        **model.describe_sampling(),
        "max_steps": spec.max_steps,
        "score_range": [end if math.isfinite(end) else None for end in spec.score_range],
        "episodes": {who: [_entry(e, spec) for e in episodes] for who, episodes in results.items()},
    }


def _entry(episode: EpisodeResult, spec: EnvSpec) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "seed": episode.seed,
        f"max_{spec.score}": episode.max_score,
        f"last_{spec.score}": float(episode.scores[-1]),
        "steps": len(episode.actions),
        "success": episode.success,
    }
    if episode.first_chunk is not None:
        entry["seam"] = episode.seam if math.isfinite(episode.seam) else None
        entry["first_chunk"] = [[float(str(x)) for x in row] for row in episode.first_chunk]
    return entry


def settings_of(
    env: str,
    first_seed: int,
    episodes: int,
    execute: int,
    seed: int,
    latency: int = 0,
    switch: str = "wait",
    history: str = "kept",
) -> dict[str, Any]:
    """Settings that tell closed loops of one checkpoint under its own config apart, as `places.choose` takes it."""
    settings = {"env": env, "first_seed": first_seed, "episodes": episodes, "execute": execute, "seed": seed}
    return settings | _unusual(latency, switch, history)


def _unusual(latency: int, switch: str, history: str) -> dict[str, Any]:
    """What is recorded of choices that are not the usual ones, so that usual results keep their place."""
    late = {"latency": latency, "switch": switch} if latency else {}
    return late | ({} if history == "kept" else {"history": history})


def write_episodes(folder: Place, metrics: Metrics, how: Mapping[str, Any]) -> None:
    """Writes what `measure` returned to `metrics.json` of a folder, and `describe_episodes` with its provenance to
    `episodes.json`; a film of other episodes is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "episodes.gif").unlink(missing_ok=True)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(folder / "episodes.json", json.dumps(how, indent=1) + "\n")
