"""Samples every mode on held-out windows: `eval/<step>/metrics.json`, pictures, and `report.html`.

    python -m uwm_jax.evaluate --workdir=runs/quickstart [--step=N] [--output=DIR]

With other data, another config or other parameters than the run's own, results go to `eval/<step>/<name>/`: --name, or
a digest of what differs. A split that the run was not trained on is evaluated whole.

The windows are a fixed, evenly spread set of validation windows, and a window's noise depends on its place in
that set alone, so two checkpoints see the same inputs.
"""

from __future__ import annotations

import time

from absl import flags

from uwm_jax import cli, config_help
from uwm_jax.errors import UserError, warn
from uwm_jax.evaluation import places
from uwm_jax.evaluation.data import doubt
from uwm_jax.evaluation.evaluator import write_results
from uwm_jax.evaluation.losses import HeldOutLosses
from uwm_jax.evaluation.metrics import Metrics, text
from uwm_jax.evaluation.run import open_run
from uwm_jax.reporting import pictures
from uwm_jax.reporting.run_page import write as write_report
from uwm_jax.training import inference

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run to evaluate, or owner/name[@revision] on the hub")
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    for name in ("sampler", "steps"):
        flags.DEFINE_string(name, None, "a flag of python -m uwm_jax.compare_samplers, refused here")
    inference.define_flags()
    places.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    for name in ("sampler", "steps"):
        if (value := FLAGS[name].value) is not None:
            raise UserError(
                f"--{name}={value}: samplers are compared by a command of its own: "
                f"python -m uwm_jax.compare_samplers --{name}={value}. --config.diffusion.spacing and "
                "--config.diffusion.num_inference_steps evaluate with another sampler than the run's."
            )
    run = open_run(
        cli.required_run(),
        cli.optional_path("output"),
        step=FLAGS.step,
        parameters=FLAGS.parameters,
        overrides=call.overrides,
    )
    folder = run.folder("about.json", run.settings, shared=False, name=FLAGS.name)
    evaluator = run.evaluator()
    about = run.about(evaluator, run.settings, call.line)
    if told := doubt(about):
        warn(told)

    start = time.perf_counter()
    print("compiling the losses and the samplers of all uses...", flush=True)
    losses = HeldOutLosses(evaluator)
    losses.compile(run.params, run.frozen)
    evaluator.compile(run.params, run.frozen)
    metrics, windows = evaluator.run(run.params, run.frozen, progress=True)
    metrics = losses.run(run.params, run.frozen) | metrics
    write_results(folder, metrics, about)
    pictures.draw(windows, run.system.spec, run.system.config, folder)
    seconds = time.perf_counter() - start
    count = len(run.system.uses)
    print(f"{about['windows']} held-out windows of {about['episodes']} episodes, {count} uses, {seconds:.1f} s")
    print(f"{text_table(metrics)}\nwrote {folder / 'metrics.json'}", flush=True)
    print(f"wrote {write_report(run.workdir, results=run.root)}")


def text_table(metrics: Metrics) -> str:
    """The metrics as aligned lines `name  mean [lo, hi]`."""
    return cli.table([(name, text(value)) for name, value in metrics.items()])


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
