"""Closed loop: the policy of a run acts in a simulator, compared with random policies and an expert on the same starts.

    python -m uwm_jax.rollout --workdir=runs/quickstart --env=pusht --episodes=50 [--first_seed=100000 --execute=8]

Writes to `rollout/<step>` of the workdir: `metrics.json`, each `{mean, lo, hi, n, episodes}` with a 95 % interval over
episodes; `episodes.json`, every episode by its seed; `episodes.gif`, three episodes next to what the model imagined.
And `report.html` again. What was rolled out there first stays: one with another environment, other seeds, another
--execute, config or parameters goes to `rollout/<step>/<name>`, --name or a digest of what differs.

An episode is a function of the parameters, its seed and the flags alone.
"""

from __future__ import annotations

import time

from absl import flags

from uwm_jax import cli, config_help
from uwm_jax.backend import JaxBackend
from uwm_jax.envs import get
from uwm_jax.envs.parallel import controllers, replay
from uwm_jax.errors import warn
from uwm_jax.evaluation import places
from uwm_jax.evaluation.closed_loop import (
    FIRST_SEED,
    POLICY,
    check_fits,
    closed_loop,
    describe_episodes,
    env_cameras,
    measure,
    open_envs,
    play,
    settings_of,
    under_views,
    views_of,
    with_views,
    write_episodes,
)
from uwm_jax.evaluation.metrics import Metrics, text
from uwm_jax.reporting import film
from uwm_jax.reporting.run_page import write as write_report
from uwm_jax.training import fixed_fields, inference
from uwm_jax.training.checkpoint_reader import CheckpointReader
from uwm_jax.training.provenance import describe_use

FLAGS = flags.FLAGS


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
    places.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    workdir, env = cli.required_path("workdir"), cli.required("env")
    spec, root = get(env), places.root(cli.optional_path("output"), workdir)
    system, params, frozen, step = inference.load_for_inference(workdir, FLAGS.step, call.overrides, FLAGS.parameters)
    check_fits(spec, system)
    params = system.held(params)
    backend = JaxBackend(system, params, frozen)
    seeds = range(FLAGS.first_seed, FLAGS.first_seed + FLAGS.episodes)
    used = inference.parameters_used(workdir, step, FLAGS.parameters)
    default = inference.parameters_used(workdir, step)["parameters"]
    fields = [name for name in call.changed if not name.startswith("eval.")]
    own_config, _ = fixed_fields.config_of_run(workdir, CheckpointReader(workdir.absolute() / "checkpoints", step))
    settings = places.differences(system.config, own_config, fields, used["parameters"], default)
    own = not settings
    settings |= settings_of(env, FLAGS.first_seed, FLAGS.episodes, FLAGS.execute, FLAGS.seed)
    folder = places.choose(
        root / "rollout" / str(step),
        "episodes.json",
        settings,
        own=own,
        shared=True,
        name=FLAGS.name,
        run=places.of_run(root, workdir),
    )
    if seeds[0] < FIRST_SEED:
        say = "episodes may start as demonstrations did, which data_prep.demo numbers from 0 on."
        warn(f"--first_seed={seeds[0]}: {say}")

    start = time.perf_counter()
    with open_envs(env, system, seeds, FLAGS.workers) as envs:
        results = {POLICY: closed_loop(backend, envs, seeds, execute=FLAGS.execute, seed=FLAGS.seed, progress=POLICY)}
        for name in controllers(spec):
            results[name] = play(envs, name, seeds)
    seconds = time.perf_counter() - start

    metrics = measure(results, spec)
    how = describe_use(call.line, system.config, call.changed)
    how |= describe_episodes(spec, system, results, FLAGS.execute, FLAGS.seed)
    how |= used | {"settings": settings} | places.of_run(root, workdir)
    write_episodes(folder, metrics, how)
    clips = []
    for label, i in film.representative(results[POLICY]):
        episode = results[POLICY][i]
        seen = under_views(replay(spec.make(env_cameras(spec, system)), episode), views_of(spec, system))
        clips.append(film.imagine(system, params, frozen, episode, seen, execute=FLAGS.execute, label=label))
    files = ["metrics.json", "episodes.json"]
    if film.draw(clips, with_views(spec, system), system, folder / "episodes.gif"):
        files.append("episodes.gif")
    print(f"{env}, {len(seeds)} episodes from seed {seeds[0]} on, {FLAGS.execute} steps of a chunk: {seconds:.0f} s")
    print(text_table(metrics, spec.score))
    print(f"wrote {', '.join(str(folder / file) for file in files)}", flush=True)
    print(f"wrote {write_report(workdir, results=root)}")


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


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
