"""Inputs for `uwm_jax.sample` from a run's held-out windows: an npz that serves every mode.

    python -m uwm_jax.sample_inputs --workdir=DIR --windows=0:8 --output=IN.npz
    python -m uwm_jax.sample --workdir=DIR --mode=policy,forward --inputs=IN.npz --output=OUT.npz

The windows are those of `uwm_jax.evaluate`, numbered from 0 in its order: `config.eval.num_windows` of them, evenly
spread over the held-out episodes. The file holds `obs/<camera>` and `next_obs/<camera>` (uint8, as recorded),
`obs/<low-dim key>` and `action` (raw units), `obs/text` where the model reads text, and the draws that the system makes
(`noise/*`, `timestep/*`), which `denoise` needs. A window's noise is the one it has in an evaluation, where
--seed is 0; `sample` starts every mode from it and draws none of its own.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from uwm_jax import cli, config_help, files
from uwm_jax.data.held_out import FixedWindows
from uwm_jax.errors import UserError, warn
from uwm_jax.evaluation.data import doubt, open_raw
from uwm_jax.systems.base import System
from uwm_jax.training import average, fixed_fields, inference

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of a run, or owner/name[@revision] on the hub")
    flags.DEFINE_string("windows", "0:8", "START:STOP, which of the held-out windows, numbered from 0")
    flags.DEFINE_string("output", None, "the .npz to write")
    flags.DEFINE_integer("seed", 0, "of noise and timesteps", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    workdir, output = cli.required_run(), cli.required_path("output")
    files.check_output_file(output)
    system, _, _, step = inference.load_for_inference(
        workdir, FLAGS.step, call.overrides, average.RAW, fixed_fields.WINDOWS
    )
    data = open_raw(system, workdir, step, call.changed)
    if told := doubt(data.about()):
        warn(told)
    held_out = data.evaluated.held_out(system.config.eval.num_windows, whole=data.whole)
    start, stop = parse_windows(FLAGS.windows, len(held_out))
    arrays = sample_inputs(system, held_out, start, stop, FLAGS.seed)
    data.evaluated.close()
    with files.writing(output, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's types take any keyword for allow_pickle
    episodes = sorted(set(held_out.episodes[start:stop].tolist()))
    print(
        f"wrote {output}: held-out windows {start} to {stop - 1} of {len(held_out)}, of the episodes "
        f"{', '.join(map(str, episodes))}: {', '.join(f'{key} {value.shape}' for key, value in arrays.items())}"
    )


def parse_windows(text: str, count: int) -> tuple[int, int]:
    """`0:8` as (0, 8); UserError where it is something else, or not within `count` windows."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    start, stop = (int(number) for number in found.groups()) if found else (0, 0)
    if not start < stop <= count:
        raise UserError(
            f"--windows={text}: expected START:STOP with 0 <= START < STOP <= {count}, the number of held-out windows "
            "(--config.eval.num_windows decides it, as far as there are any)."
        )
    return start, stop


def sample_inputs(
    system: System, held_out: FixedWindows, start: int, stop: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """The arrays of held-out windows [start, stop) that `sample` takes, for every mode.

    Args:
      held_out: of data whose normaliser has no entries.
      seed: of noise and timesteps; those of a window depend on it and the window's number alone.
    """
    batch = held_out.batch(start, stop)
    recorded = [key for key in held_out.spec.batch_like(1) if key not in ("action_mask", "row")]
    key, rows = jax.random.key(seed), jnp.asarray(batch["row"])
    noise, times = system.noise(key, rows, system.acting), system.one_draw(key, rows).get("timestep", {})
    return {
        **{key: batch[key] for key in recorded},
        **{f"noise/{m}": np.asarray(x) for m, x in noise.items()},
        **{f"timestep/{m}": np.asarray(x) for m, x in times.items()},
    }


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
