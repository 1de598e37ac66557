"""Closed loop: the policy of a run acts in a simulator, compared with random policies and an expert on the same starts.

    python -m uwm_jax.rollout --workdir=runs/quickstart --env=pusht --episodes=50 [--first_seed=100000 --execute=8]
    python -m uwm_jax.rollout --workdir=runs/quickstart --env=pusht --latency=4 --switch=replacement [--against=FOLDER]
    python -m uwm_jax.rollout --export=exports/quickstart --env=pusht [--against=FOLDER]

Writes to `rollout/<step>` of the workdir (or of the export folder): `metrics.json`, each `{mean, lo, hi, n, episodes}`
with a 95 % interval over episodes; `episodes.json`, every episode by its seed; `episodes.gif`, three episodes next to
what the model imagined. And `report.html` again. What was rolled out there first stays: one with another environment,
other seeds, another --execute, --latency, --history, config or parameters goes to `rollout/<step>/<name>`, --name or a
digest of what differs.

With --latency a chunk of actions takes so many control steps until it is there, and --switch says what the robot does
meanwhile (`uwm_jax.policy.Policy`). --history=repeated shows it the newest frame in place of its history. --export
acts by PyTorch, from a folder of `convert to-torch`, with the same noise at every decision as the run has in JAX.
--against compares with a closed loop of before on the same starts, in place of the random policies and the expert.

An episode is a function of the parameters, its seed and the flags alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from uwm_jax import cli, config_help
from uwm_jax.backend import Backend, JaxBackend
from uwm_jax.envs import EnvSpec, get
from uwm_jax.envs.parallel import EpisodeResult, controllers, replay
from uwm_jax.errors import UserError, warn
from uwm_jax.evaluation import places
from uwm_jax.evaluation.against import read as read_against
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
from uwm_jax.files import Place
from uwm_jax.policy import HISTORIES, SWITCHES, possible_switch
from uwm_jax.reporting import film
from uwm_jax.reporting.run_page import write as write_report
from uwm_jax.torch_bridge.torch_backend import TorchBackend
from uwm_jax.training import average, fixed_fields, inference
from uwm_jax.training.checkpoints.reader import CheckpointReader
from uwm_jax.training.provenance import describe_use

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run whose policy acts, or owner/name[@revision] on the hub")
    flags.DEFINE_string("export", None, "an export folder, which PyTorch runs, in place of --workdir")
    flags.DEFINE_string("device", "cpu", "with --export: PyTorch's device")
    flags.DEFINE_string("env", None, "the environment: pusht")
    flags.DEFINE_integer("episodes", 50, "how many, each from a seed of its own", lower_bound=1)
    flags.DEFINE_integer("first_seed", FIRST_SEED, "of the first episode's start", lower_bound=0, upper_bound=2**31)
    flags.DEFINE_integer("execute", 8, "steps of each chunk of actions that are taken", lower_bound=1)
    flags.DEFINE_integer("latency", 0, "control steps until a chunk of actions is there", lower_bound=0)
    flags.DEFINE_enum("switch", SWITCHES[0], SWITCHES, "with --latency: what the robot does until a chunk is there")
    flags.DEFINE_enum("history", HISTORIES[0], HISTORIES, "repeated: the newest frame stands for those before it")
    flags.DEFINE_string("against", None, "folder of a closed loop from the same starts, to compare with")
    flags.DEFINE_integer("seed", 0, "of the sampler's noise", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    flags.DEFINE_integer("workers", 0, "processes that simulate; 0 = all cores, at most one per episode", lower_bound=0)
    inference.define_flags()
    places.define_flags()
    cli.accept_config_overrides(config_help.describe)


class Acting(NamedTuple):
    """The model that acts.

    Attributes:
        backend: of the model.
        used: which parameters it has, for the files of results.
        settings: what tells it from the run's own.
        own: whether it is the run's own, or that of the export folder.
    """

    backend: Backend
    used: dict[str, Any]
    settings: dict[str, Any]
    own: bool


def main(call: cli.Call) -> None:
    env = cli.required("env")
    export = cli.export_folder()
    if (FLAGS.workdir is None) == (export is None):
        raise UserError("--workdir or --export is required, one of them.")
    place = export or cli.required_run()
    spec, root = get(env), places.root(cli.optional_path("output"), place)
    seeds = range(FLAGS.first_seed, FLAGS.first_seed + FLAGS.episodes)
    against = None
    if there := cli.optional_path("against"):
        against = read_against(there, spec, seeds)
    acting = _of_export(export, call) if export else _of_run(place, call)
    backend = acting.backend
    check_fits(spec, backend)
    switch = possible_switch(backend, FLAGS.latency, FLAGS.switch)
    when = {"latency": FLAGS.latency, "switch": switch, "history": FLAGS.history}
    settings = settings_of(env, FLAGS.first_seed, FLAGS.episodes, FLAGS.execute, FLAGS.seed, **when)
    settings = acting.settings | settings
    if against:
        settings["against"] = against.name
    folder = places.choose(
        root / "rollout" / str(backend.step),
        "episodes.json",
        settings,
        own=acting.own,
        shared=True,
        name=FLAGS.name,
        run=places.of_run(root, place),
    )
    if seeds[0] < FIRST_SEED:
        say = "episodes may start as demonstrations did, which data_prep.demo numbers from 0 on."
        warn(f"--first_seed={seeds[0]}: {say}")

    start = time.perf_counter()
    with open_envs(env, backend, seeds, FLAGS.workers) as envs:
        results = {
            POLICY: closed_loop(backend, envs, seeds, execute=FLAGS.execute, seed=FLAGS.seed, progress=POLICY, **when)
        }
        for name in () if against else controllers(spec):
            results[name] = play(envs, name, seeds)
    seconds = time.perf_counter() - start

    metrics = measure(results | ({against.name: against.episodes} if against else {}), spec)
    how = describe_use(call.line, backend.config, call.changed)
    how |= describe_episodes(spec, backend, results, FLAGS.execute, FLAGS.seed, **when)
    how |= acting.used | {"settings": settings} | places.of_run(root, place)
    if against:
        how["against"] = {"folder": str(against.folder), "first_chunks": against.first_chunks(results[POLICY])}
    write_episodes(folder, metrics, how)
    files = ["metrics.json", "episodes.json"]
    if isinstance(backend, JaxBackend) and _film(backend, spec, results[POLICY], folder / "episodes.gif"):
        files.append("episodes.gif")
    print(f"{env}, {len(seeds)} episodes from seed {seeds[0]} on, {FLAGS.execute} steps of a chunk: {seconds:.0f} s")
    print(text_table(metrics, spec.score))
    if against and (difference := how["against"]["first_chunks"]) is not None:
        print(f"first chunks of an episode and those of {against.name} differ by at most {difference:.2g} (normalised)")
    print(f"wrote {', '.join(str(folder / file) for file in files)}", flush=True)
    if export is None:
        print(f"wrote {write_report(place, results=root)}")


def _of_run(workdir: Place, call: cli.Call) -> Acting:
    system, params, frozen, step = inference.load_for_inference(workdir, FLAGS.step, call.overrides, FLAGS.parameters)
    used = inference.parameters_used(workdir, step, FLAGS.parameters)
    default = inference.parameters_used(workdir, step)["parameters"]
    fields = [name for name in call.changed if not name.startswith("eval.")]
    own_config, _ = fixed_fields.config_of_run(workdir, CheckpointReader(workdir.absolute() / "checkpoints", step))
    settings = places.differences(system.config, own_config, fields, used["parameters"], default)
    backend = JaxBackend(system, system.held(params), frozen, step=step, parameters=used["parameters"])
    return Acting(backend, used, settings, own=not settings)


def _of_export(folder: Place, call: cli.Call) -> Acting:
    if given := [f"--{name}" for name in ("step", "parameters") if FLAGS[name].value is not None]:
        raise UserError(f"{', '.join(given)}: an export holds one set of parameters. Export others of the run instead.")
    if call.overrides:
        raise UserError(f"--config.{call.overrides[0][0]}: an export samples as it was written. Export it again.")
    backend = TorchBackend(folder, FLAGS.device)
    used = average.describe(backend.config, backend.step, backend.parameters)
    return Acting(backend, used, {"backend": "torch"}, own=True)


def _film(backend: JaxBackend, spec: EnvSpec, episodes: Sequence[EpisodeResult], file: Place) -> bool:
    """Draws the best, the median and the worst episode; False where there is nothing to show."""
    system, clips = backend.model, []
    for label, i in film.representative(episodes):
        episode = episodes[i]
        seen = under_views(replay(spec.make(env_cameras(spec, system)), episode), views_of(spec, system))
        clips.append(film.imagine(system, *backend.arrays, episode, seen, execute=FLAGS.execute, label=label))
    return film.draw(clips, with_views(spec, system), system, file)


def text_table(metrics: Metrics, score: str) -> str:
    """The metrics as a table for the terminal."""

    def cell(name: str) -> str:
        if name not in metrics:
            return ""
        return text(metrics[name], "+.3f" if "paired" in name else ".3f")

    who = [POLICY, "no_action", *sorted({n.split("/")[0] for n in metrics} - {POLICY, "no_action", "paired"})]
    columns = {f"max {score}": f"max_{score}", "success": "success", "seam": "seam"}
    paired = {f"policy better by (max {score})": f"max_{score}", "smoother by (seam)": "seam"}
    rows = [["", *columns, *paired]]
    for w in who:
        pair = f"paired/{POLICY}_vs_{w}"
        rows.append([w, *(cell(f"{w}/{m}") for m in columns.values()), *(cell(f"{pair}/{m}") for m in paired.values())])
    shown = [i for i, column in enumerate(zip(*rows, strict=True)) if i == 0 or any(column[1:])]
    return cli.table([[row[i] for i in shown] for row in rows])


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
