"""Closed loop: the policy of a run acts in a simulator, beside random policies and an expert on the same starts.

    python -m uwm_jax.rollout --workdir=runs/quickstart --env=pusht --episodes=50 [--first_seed=100000 --execute=8]

Writes to `rollout/<step>` of the workdir: `metrics.json`, each `{mean, lo, hi, n, episodes}` with a 95 % interval over
episodes; `episodes.json`, every episode by its seed; `episodes.gif`, three episodes beside what the model imagined.
And `report.html` again.

An episode is a function of the parameters, its seed and the flags alone, whatever runs beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from uwm_jax import cli, report
from uwm_jax.data.records import short_key
from uwm_jax.envs import EnvSpec, get
from uwm_jax.envs.parallel import EpisodeResult, ParallelEnvs, controllers, cores, replay
from uwm_jax.errors import UserError
from uwm_jax.evaluation.metrics import Metrics, difference_bounds, interval, proportion, proportion_difference, text
from uwm_jax.files import write_text
from uwm_jax.policy import Policy
from uwm_jax.reporting import film
from uwm_jax.system import System
from uwm_jax.training import inference
from uwm_jax.training.record import describe_use

FLAGS = flags.FLAGS

POLICY = "policy"
FIRST_SEED = 100_000  # as published PushT evaluations begin; far from the seeds of demonstrations
BATCH = 32  # rows of one call of the network; constant, so that the number of episodes changes none of them


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run whose policy acts")
    flags.DEFINE_string("env", None, "the environment: pusht")
    flags.DEFINE_integer("episodes", 50, "how many, each from a seed of its own", lower_bound=1)
    flags.DEFINE_integer("first_seed", FIRST_SEED, "of the first episode's start", lower_bound=0, upper_bound=2**31)
    flags.DEFINE_integer("execute", 8, "steps of each chunk of actions that are taken", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the sampler's noise", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    flags.DEFINE_integer("workers", 0, "processes that simulate; 0 = all cores, at most one per episode", lower_bound=0)
    inference.define_flags()
    cli.accept_config_overrides()


def main(argv: list[str]) -> None:
    workdir, env = cli.required_path("workdir"), cli.required("env")
    spec = get(env)
    system, params, frozen, step = inference.load_for_inference(
        workdir, FLAGS.step, cli.config_overrides(), FLAGS.parameters
    )
    check_fits(spec, system)
    seeds = range(FLAGS.first_seed, FLAGS.first_seed + FLAGS.episodes)
    if seeds[0] < FIRST_SEED:
        say = "episodes may start as demonstrations did, which data_prep.demo numbers from 0 on."
        print(f"warning: --first_seed={seeds[0]}: {say}", file=sys.stderr)

    start = time.perf_counter()
    with open_envs(env, system, seeds, FLAGS.workers) as envs:
        results = {
            POLICY: closed_loop(
                system, params, frozen, envs, seeds, execute=FLAGS.execute, seed=FLAGS.seed, progress=POLICY
            )
        }
        for name in controllers(spec):
            results[name] = play(envs, name, seeds)
    seconds = time.perf_counter() - start

    metrics = measure(results, spec)
    folder = workdir / "rollout" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "episodes.gif").unlink(missing_ok=True)  # an older closed loop's, until this one's is drawn
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    how = describe_use(cli.command_line(), system.config, cli.changed_fields())
    how |= record(spec, system, results, FLAGS.execute, FLAGS.seed)
    how |= inference.parameters_used(workdir, step, FLAGS.parameters)
    write_text(folder / "episodes.json", json.dumps(how, indent=1) + "\n")
    clips = []
    for label, i in telling(results[POLICY]):
        episode = results[POLICY][i]
        seen = under_views(replay(spec.make(env_cameras(spec, system)), episode), views_of(spec, system))
        clips.append(film.imagine(system, params, frozen, episode, seen, execute=FLAGS.execute, label=label))
    files = ["metrics.json", "episodes.json"]
    if film.draw(clips, with_views(spec, system), system, folder / "episodes.gif"):
        files.append("episodes.gif")
    print(f"{env}, {len(seeds)} episodes from seed {seeds[0]} on, {FLAGS.execute} steps of a chunk: {seconds:.0f} s")
    print(text_table(metrics, spec.score))
    print(f"wrote {', '.join(str(folder / file) for file in files)}", flush=True)
    print(f"wrote {report.write(workdir)}")


def closed_loop(
    system: System,
    params: Any,
    frozen: Any,
    env: str | ParallelEnvs,
    seeds: Sequence[int],
    *,
    execute: int = 8,
    seed: int = 0,
    workers: int = 0,
    progress: str = "",
) -> list[EpisodeResult]:
    """Lets the policy mode of a model act in an environment, one episode from each of `seeds`.

    An episode is a function of (parameters, system, env, its seed, execute, seed) alone: neither the other episodes
    nor the number of workers changes it. `system` decides the sampler, so a number of steps or a rule is tried by
    giving another system.

    Args:
        env: name of the environment (`uwm_jax.envs`), e.g. "pusht"; or what `open_envs` opened, which saves the start
            of processes.
        seeds: of the episodes' starts; PushT's evaluation starts at 100000.
        execute: steps of each sampled chunk that are taken before the next chunk is sampled.
        seed: of the sampler's noise, together with the episode's seed and the number of the decision.
        workers: processes that simulate; 0 = all cores, at most one per episode.
        progress: the progress bar's description; "" shows none.

    Returns:
        The episodes in the order of `seeds`.

    Raises:
        UserError: an unknown environment, a missing package, a model that was trained on other inputs or actions
            than the environment has, or an `execute` that its chunks do not have.
    """
    policy = Policy(system, params, frozen, execute=execute, seed=seed, batch_size=BATCH)
    with contextlib.ExitStack() as stack:
        if isinstance(env, str):
            env = stack.enter_context(open_envs(env, system, seeds, workers))
        check_fits(env.spec, system)
        bar = stack.enter_context(_bar(progress, env.spec.max_steps, "step"))
        policy.reset(seeds)
        views, seen = views_of(env.spec, system), env.reset(seeds)
        scores, actions = [[score] for score in seen.score], [[] for _ in seeds]  # type: ignore[var-annotated]
        success = np.zeros(len(seeds), bool)
        rows, observation = np.arange(len(seeds)), seen.observation
        while len(rows):
            action = policy.act(under_views(observation, views), rows).astype(np.float64)
            seen = env.step(rows, action)
            for i, row in enumerate(rows):
                scores[row].append(seen.score[i])
                actions[row].append(action[i])
            success[rows] = seen.success
            rows, observation = rows[~seen.done], {key: x[~seen.done] for key, x in seen.observation.items()}
            bar.update()
            bar.set_postfix(solved=f"{success.sum()}/{len(seeds)}", refresh=False)
    return [
        EpisodeResult(int(s), np.array(scores[i]), np.array(actions[i]), bool(success[i])) for i, s in enumerate(seeds)
    ]


def open_envs(name: str, system: System, seeds: Sequence[int], workers: int = 0) -> ParallelEnvs:
    """The processes that simulate what a model sees, for episodes from `seeds`; a context manager.

    Args and errors: as `closed_loop`.
    """
    check_fits(get(name), system)
    return ParallelEnvs(name, env_cameras(get(name), system), min(workers or cores(), len(seeds)))


def play(envs: ParallelEnvs, controller: str, seeds: Sequence[int]) -> list[EpisodeResult]:
    """Episodes of one of `controllers`, in the order of `seeds`, with a progress bar."""
    found: dict[int, EpisodeResult] = {}
    with _bar(controller, len(seeds), "episode") as bar:
        for place, episode in envs.play(controller, seeds):
            found[place] = episode
            bar.update()
    return [found[place] for place in range(len(seeds))]


def views_of(spec: EnvSpec, system: System) -> dict[str, str]:
    """{camera of the model: the environment's camera that it shows}: what the run's first source with actions has
    there, which may be one camera for several views, or the environment's camera of the same name."""
    data = system.config.data
    keys: dict[str, str] = {}
    if robots := [source for _, source in sorted(data.sources.items()) if source.use_actions]:
        keys = dict(zip(data.cameras, map(short_key, robots[0].cameras or data.cameras), strict=True))
    shown = {
        view: next((c for c in (keys.get(view), view) if c in spec.cameras), None) for view in system.facts.cameras
    }
    return {view: camera for view, camera in shown.items() if camera}


def env_cameras(spec: EnvSpec, system: System) -> dict[str, tuple[int, int]]:
    """{the environment's camera: (height, width)} of the frames to draw."""
    return {camera: system.facts.cameras[view] for view, camera in views_of(spec, system).items()}


def under_views(observation: Mapping[str, np.ndarray], views: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The observation with what each of the model's views shows."""
    return {**observation, **{view: observation[camera] for view, camera in views.items()}}


def with_views(spec: EnvSpec, system: System) -> EnvSpec:
    """The environment whose actions are drawn on the model's first view of that camera."""
    if spec.action_plane is None:
        return spec
    camera, x_low, x_high, y_low, y_high = spec.action_plane
    views = [view for view, shown in sorted(views_of(spec, system).items()) if shown == camera]
    plane = (views[0] if views else camera, x_low, x_high, y_low, y_high)
    return dataclasses.replace(spec, action_plane=plane)


def check_fits(spec: EnvSpec, system: System) -> None:
    """Raises UserError where the model reads what the environment does not show, or acts in another space."""
    facts, views = system.facts, views_of(spec, system)
    problems = [
        *(
            f"camera {c!r}: {spec.name} has {', '.join(spec.cameras)}"
            for c in sorted(facts.cameras.keys() - views.keys())
        ),
        *(
            f"{key} ({dim} numbers): {spec.name} has {dict(spec.low_dim)}"
            for key, dim in facts.low_dim.items()
            if spec.low_dim.get(key) != dim
        ),
        *(["a text"] if facts.text_dim else []),
    ]
    if facts.action_dim != spec.action_dim:
        problems.append(f"{facts.action_dim} numbers of action: {spec.name} takes {spec.action_dim}")
    if problems:
        raise UserError(
            f"--env={spec.name} is not what the model was trained on. The model has\n  " + "\n  ".join(problems)
        )


def measure(results: Mapping[str, Sequence[EpisodeResult]], spec: EnvSpec) -> Metrics:
    """`<who>/max_<score>` and `<who>/success`, each `{mean, lo, hi, n, episodes}` with a 95 % interval over episodes.

    `no_action` is the start's score, what doing nothing gives. `paired/policy_vs_<who>/...` is the difference on the
    same starts, positive where the policy is better.
    """
    best = {who: np.array([e.max_score for e in episodes]) for who, episodes in results.items()}
    best["no_action"] = np.array([e.scores[0] for e in results[POLICY]])
    success = {who: np.array([e.success for e in episodes], np.bool_) for who, episodes in results.items()}
    every, bounds = np.arange(len(results[POLICY])), spec.score_range
    metrics = {f"{who}/max_{spec.score}": interval(x, every, bounds) for who, x in best.items()}
    metrics |= {f"{who}/success": proportion(x) for who, x in success.items()}
    for who in results.keys() - {POLICY}:
        pair, difference = f"paired/{POLICY}_vs_{who}", best[POLICY] - best[who]
        metrics[f"{pair}/max_{spec.score}"] = interval(difference, every, difference_bounds(*bounds))
        metrics[f"{pair}/success"] = proportion_difference(success[POLICY], success[who])
    return dict(sorted(metrics.items()))


def record(
    spec: EnvSpec, system: System, results: Mapping[str, Sequence[EpisodeResult]], execute: int, seed: int
) -> dict[str, Any]:
    """What `episodes.json` holds: how it was run, and each episode's seed, best and last score, steps and success."""
    return {
        "env": spec.name,
        "execute": execute,
        "sampler_seed": seed,
        **system.schedule.describe(),
        "max_steps": spec.max_steps,
        "episodes": {
            who: [
                {
                    "seed": e.seed,
                    f"max_{spec.score}": e.max_score,
                    f"last_{spec.score}": float(e.scores[-1]),
                    "steps": len(e.actions),
                    "success": e.success,
                }
                for e in episodes
            ]
            for who, episodes in results.items()
        },
    }


def telling(episodes: Sequence[EpisodeResult]) -> list[tuple[str, int]]:
    """(words, place) of the best, the median and the worst episode by their best score, as far as there are."""
    order = np.argsort([e.max_score for e in episodes], kind="stable")
    places = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    chosen: dict[int, str] = {}
    for word, place in places.items():
        chosen.setdefault(int(place), f"{word} of {len(episodes)}")
    return [(words, place) for place, words in chosen.items()]


def text_table(metrics: Metrics, score: str) -> str:
    """The metrics as a table for the terminal."""

    def cell(name: str) -> str:
        if name not in metrics:
            return ""
        return text(metrics[name], "+.3f" if "paired" in name else ".3f")

    who = [POLICY, "no_action", *sorted({n.split("/")[0] for n in metrics} - {POLICY, "no_action", "paired"})]
    rows = [["", f"max {score}", "success", f"policy better by (max {score})"]]
    for w in who:
        rows.append([w, cell(f"{w}/max_{score}"), cell(f"{w}/success"), cell(f"paired/{POLICY}_vs_{w}/max_{score}")])
    return cli.table(rows)


def _bar(description: str, total: int, unit: str) -> tqdm:
    pause = 0.5 if sys.stderr.isatty() else 10.0  # seconds between lines of a log file
    return tqdm(total=total, desc=description, unit=unit, mininterval=pause, disable=not description)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
