"""Compares ways of sampling on held-out windows: how good all modes are against the number of network evaluations.

    python -m uwm_jax.compare_samplers --workdir=runs/quickstart --sampler=leading,trailing --steps=10,4,2 \\
        [--env=pusht --episodes=50] [--step=N] [--output=DIR]

Every pair of a spacing of timesteps and a number of steps is measured on the windows of `uwm_jax.evaluate`, with the
same noise; with --env the policy acts too. Results go to `eval/<step>/few_steps.json`, and to `report.html`. What was
compared there first stays: with other data, config, parameters or ways they go to `eval/<step>/<name>/`, --name or a
digest of what differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from uwm_jax import cli, config_help, systems
from uwm_jax.backend import JaxBackend
from uwm_jax.envs.parallel import ParallelEnvs
from uwm_jax.errors import UserError, warn
from uwm_jax.evaluation import closed_loop, places
from uwm_jax.evaluation.data import doubt
from uwm_jax.evaluation.evaluator import Evaluator
from uwm_jax.evaluation.metrics import text
from uwm_jax.evaluation.run import open_run
from uwm_jax.files import write_text
from uwm_jax.policy import Policy
from uwm_jax.reporting.run_page import write as write_report
from uwm_jax.systems.base import System
from uwm_jax.training import inference

FLAGS = flags.FLAGS

SPACINGS = ("leading", "trailing")  # of timesteps, as `uwm_jax.diffusion.schedule` has them


def define_flags() -> None:
    flags.DEFINE_string(
        "workdir", None, "directory of the run whose samplers are compared, or owner/name[@revision] on the hub"
    )
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    flags.DEFINE_string("sampler", None, f"spacings of timesteps: {', '.join(SPACINGS)} or both; default the config's")
    flags.DEFINE_string("steps", None, "numbers of network evaluations, e.g. 10,4,2; default the config's")
    flags.DEFINE_string("env", None, "the policy also acts in this environment, e.g. pusht")
    flags.DEFINE_integer("episodes", 50, "with --env: episodes", lower_bound=1)
    flags.DEFINE_integer("execute", 8, "with --env: steps of each chunk of actions that are taken", lower_bound=1)
    inference.define_flags()
    places.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    workdir = cli.required_run()
    if FLAGS.sampler is None and FLAGS.steps is None:
        raise UserError("--sampler or --steps is required, such as --sampler=leading,trailing --steps=10,4,2.")
    if FLAGS["episodes"].present and not FLAGS.env:
        raise UserError("--episodes requires --env: the number of held-out windows is --config.eval.num_windows.")
    if FLAGS["execute"].present and not FLAGS.env:
        raise UserError("--execute requires --env: only a policy that acts takes a part of each chunk.")
    run = open_run(
        workdir,
        cli.optional_path("output"),
        step=FLAGS.step,
        parameters=FLAGS.parameters,
        overrides=call.overrides,
    )
    ways = parse_ways(run.system, FLAGS.sampler, FLAGS.steps)
    settings = dict(run.settings) | {"ways": [_named(way) for way in ways]}
    settings |= {name: FLAGS[name].value for name in ("env", "episodes", "execute") if FLAGS.env}
    folder = run.folder("few_steps.json", settings, shared=True, name=FLAGS.name)
    evaluator = run.evaluator()
    about = run.about(evaluator, settings, call.line)
    if told := doubt(about):
        warn(told)

    start, file = time.perf_counter(), folder / "few_steps.json"
    found: list[dict[str, Any]] = []
    with open_acting(FLAGS.env, run.system, FLAGS.episodes, FLAGS.execute) as acting:
        how = about | {"ways": len(ways)} | (acting.about() if acting else {})
        for way in ways:
            found.append(compare(evaluator, way, run.params, run.frozen, acting))
            write_text(file, json.dumps({"about": how, "rows": found}, indent=2) + "\n")
    seconds = time.perf_counter() - start
    print(f"{about['windows']} held-out windows of {about['episodes']} episodes, {len(ways)} samplers, {seconds:.1f} s")
    print(f"{text_table(found)}\nwrote {file}", flush=True)
    print(f"wrote {write_report(workdir, results=run.root)}")


def parse_ways(system: System, spacings: str | None, steps: str | None) -> list[System]:
    """A system for every pair of `leading,trailing` and `10,4,2`; None is the config's own.

    Raises:
      UserError: something else, or more steps than the network was trained with.
    """
    how = system.describe_sampling()
    for flag, given, field in (("sampler", spacings, "spacing"), ("steps", steps, "num_inference_steps")):
        if given and f"sampler_{field.removeprefix('num_inference_')}" not in how:
            raise UserError(
                f"--{flag}={given}: this workdir is a {system.config.system} run, whose samples do not depend on "
                f"config.diffusion.{field}."
            )
    diffusion = system.config.diffusion
    names = [part.strip() for part in spacings.split(",")] if spacings else [None]
    for name in names if spacings else ():
        if name not in SPACINGS:
            raise UserError(f"--sampler: expected {' or '.join(SPACINGS)}, or both with a comma; found {name!r}.")
    most = diffusion.num_train_steps
    numbers = [part.strip() for part in (steps or str(diffusion.num_inference_steps)).split(",")]
    for number in numbers:
        if not number.isdecimal() or not 1 <= int(number) <= most:
            raise UserError(f"--steps: expected numbers from 1 to {most}, such as 10,4,2; found {number!r}.")
    ways = []
    for name in dict.fromkeys(names):
        for number in dict.fromkeys(numbers):
            config = system.config.copy_and_resolve_references()
            config.diffusion.num_inference_steps = int(number)
            if name is not None:
                config.diffusion.spacing = name
            ways.append(systems.make(config, system.spec, system.codec))
    return ways


@dataclasses.dataclass(frozen=True)
class Acting:
    """The environment that the policy acts in during an evaluation, one episode from each of `seeds`."""

    envs: ParallelEnvs
    seeds: range
    execute: int

    def about(self) -> dict[str, Any]:
        return {"env": self.envs.spec.name, "closed_loop_episodes": len(self.seeds), "execute": self.execute}


@contextlib.contextmanager
def open_acting(env: str | None, system: System, episodes: int, execute: int) -> Iterator[Acting | None]:
    """Opens the processes that simulate; None without an `env`.

    Raises:
      UserError: as `closed_loop.closed_loop`.
    """
    if not env:
        yield None
        return
    # Refuses what does not fit before minutes of sampling.
    Policy(JaxBackend(system, None, None), execute=execute, source=closed_loop.acting_source(system))
    seeds = range(closed_loop.FIRST_SEED, closed_loop.FIRST_SEED + episodes)
    with closed_loop.open_envs(env, system, seeds) as envs:
        yield Acting(envs, seeds, execute)


def compare(evaluator: Evaluator, way: System, params: Any, frozen: Any, acting: Acting | None) -> dict[str, Any]:
    """One row of `few_steps.json`.

    Returns:
      {"sampler": the spacing, "steps": network evaluations, "first_timestep": the noisiest that they visit,
      "hidden_timestep": that of what a mode hides, "metrics": {metric of a mode: interval}, "seconds_per_sample": until
      the policy mode has sampled one chunk for one observation}; where it acts the metrics have
      `closed_loop/max_<score>` and `closed_loop/success`, with intervals over episodes.
    """
    spacing, steps = _named(way)
    name = f"{spacing}, {steps} steps" if spacing else f"{steps} steps"
    how, metrics = way.describe_sampling(), evaluator.run_uses(way, params, frozen, name)
    if acting:
        envs, execute, progress = acting.envs, acting.execute, f"{name}, {acting.envs.spec.name}"
        backend = JaxBackend(way, params, frozen)
        results = closed_loop.closed_loop(backend, envs, acting.seeds, execute=execute, progress=progress)
        acted = closed_loop.measure({closed_loop.POLICY: results}, envs.spec)
        for metric in (f"max_{envs.spec.score}", "success"):
            metrics[f"closed_loop/{metric}"] = acted[f"{closed_loop.POLICY}/{metric}"]
    return {
        "sampler": spacing,
        "steps": steps,
        "first_timestep": how.get("sampler_first_timestep"),
        "hidden_timestep": how.get("sampler_hidden_timestep"),
        "seconds_per_sample": policy_seconds(way, params, frozen),
        "metrics": metrics,
    }


def _named(way: System) -> tuple[str, int]:
    """(spacing, "" for systems without one; network evaluations)."""
    how = way.describe_sampling()
    return how.get("sampler_spacing", ""), how["sampler_steps"]


def policy_seconds(system: System, params: Any, frozen: Any, repeats: int = 5) -> float:
    """Seconds until a chunk of actions is sampled for one observation, without compilation; the median of some."""

    @jax.jit
    def sample(params: Any, frozen: Any, batch: Any) -> Any:
        noise = system.noise(jax.random.key(0), batch["row"], system.acting)
        return system.sample(params, system.encode(frozen, batch), system.acting, noise)

    device = jax.local_devices()[0]
    inputs = jax.device_put((params, frozen, system.spec.zeros(1)), device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(sample(*inputs))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _is_main(name: str) -> bool:
    group, _, metric = name.rpartition("/")
    return "/" not in group and metric in ("action_mse", "psnr")


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `compare` as text, one line per way of sampling: the main metric of each modality of each use."""
    names = [n for n in rows[0]["metrics"] if n.startswith("closed_loop/") or _is_main(n)]
    lines = [("sampler", "steps", "first t", "hidden t", "policy ms", *names)]
    for row in rows:
        cells = [
            row["sampler"],
            str(row["steps"]),
            *("" if row[t] is None else str(row[t]) for t in ("first_timestep", "hidden_timestep")),
            f"{1000 * row['seconds_per_sample']:.1f}",
        ]
        lines.append((*cells, *(text(row["metrics"][name]) for name in names)))
    return cli.table(lines)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
