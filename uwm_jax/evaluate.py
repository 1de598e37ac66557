"""Samples every mode on held-out windows: `eval/<step>/metrics.json`, pictures, and `report.html`.

    python -m uwm_jax.evaluate --workdir=runs/quickstart [--step=N]

The windows are a fixed, evenly spread set of validation windows, and a window's noise depends on its place in
that set alone, so two checkpoints see the same inputs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from uwm_jax import cli, report
from uwm_jax.data.loader import Loader
from uwm_jax.diffusion.modes import MODES
from uwm_jax.errors import UserError
from uwm_jax.files import write_text
from uwm_jax.system import DataFacts, System
from uwm_jax.training import checkpoint as checkpoint_lib

FLAGS = flags.FLAGS

Arrays = dict[str, np.ndarray]


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run to evaluate")
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default")
    cli.accept_config_overrides()


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}: flags are written --flag=value.")
    workdir = Path(cli.required("workdir"))
    system, params, frozen, step = checkpoint_lib.load_for_inference(workdir, FLAGS.step, cli.config_overrides())
    config = system.config
    loader = Loader(config.data, batch_size=1, seed=config.seed, normalizer=system.facts.normalizer)
    refuse_other_data(system, loader)
    held_out = loader.held_out(config.eval.num_windows)

    start = time.perf_counter()
    windows = collect(system, params, frozen, held_out)
    metrics = measure(windows)
    seconds = time.perf_counter() - start

    folder = workdir / "eval" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    report.draw_modes(windows, system.facts.normalizer, folder / "modes.png")
    report.draw_curves(workdir / "metrics.jsonl", workdir / "curves.png")
    report.write(workdir, config, step, metrics, folder / "modes.png", workdir / "curves.png")
    print(f"{len(windows['episode'])} held-out windows, {len(MODES)} modes, {seconds:.1f} s")
    print(report.text_table(metrics))
    print(f"wrote {folder / 'metrics.json'} and {workdir / 'report.html'}")


def refuse_other_data(system: System, loader: Loader) -> None:
    """Raises UserError where the dataset is not of the kind that the run was trained on."""
    trained, found = system.facts.to_json(), DataFacts(**loader.facts()).to_json()
    for name in ("cameras", "low_dim", "action_dim", "text_dim"):
        if trained[name] != found[name]:
            raise UserError(
                f"{loader.directory}: {name} is {found[name]}, but the run was trained with {trained[name]}."
            )


def collect(system: System, params: Any, frozen: Any, held_out: Any, batch_size: int = 64) -> Arrays:
    """Truth and samples of all modes for every held-out window, on the host.

    Returns:
      `episode` (N,); `action` (N, Ta, Da) normalised; `next_obs_latent` (N, V, T, h, w, C); `current`, `next_obs`
      (N, V, T, h, w, 3) float32 in [0, 1]; and `<mode>/action`, `<mode>/next_obs_latent`, `<mode>/next_obs` of
      what each mode generates.
    """
    key = jax.random.key(0)

    @jax.jit
    def run(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        noise = system.draw_noise(key, batch["row"])
        current, following = system.preprocess(batch)
        latent = system.encode_frames(frozen, following)
        batch = {**batch, "next_obs_latent": latent}
        out = {"action": batch["action"], "next_obs_latent": latent, "current": current, "next_obs": following}
        for mode in MODES:
            made = system.sample(params, frozen, batch, mode, noise)
            if "next_obs_latent" in made:
                made["next_obs"] = jnp.clip(system.decode(frozen, made["next_obs_latent"]), 0, 1)
            out |= {f"{mode}/{name}": value for name, value in made.items()}
        return out

    total = len(held_out)
    size = min(batch_size, total)
    pieces = []
    with tqdm(total=total, desc="sampling all modes", unit="window") as bar:
        for batch in held_out.batches(size):
            pieces.append(jax.device_get(run(params, frozen, batch)))
            bar.update(min(size, total - bar.n))
    # The last batch is filled up from the beginning; what it repeats is cut off.
    return {
        "episode": held_out.episodes,
        **{name: np.concatenate([p[name] for p in pieces])[:total] for name in pieces[0]},
    }


def measure(windows: Arrays) -> dict[str, dict[str, float]]:
    """`{mode}/action_mse` (normalised units), `{mode}/latent_mse`, `{mode}/psnr` (dB), and the frame-copying
    baseline, each `{mean, lo, hi, n}` with a 95 % interval clustered by episode."""
    values: Arrays = {}
    for mode in MODES:
        if f"{mode}/action" in windows:
            values[f"{mode}/action_mse"] = _per_window(windows[f"{mode}/action"] - windows["action"])
        if f"{mode}/next_obs" in windows:
            values[f"{mode}/latent_mse"] = _per_window(windows[f"{mode}/next_obs_latent"] - windows["next_obs_latent"])
            values[f"{mode}/psnr"] = _psnr(windows[f"{mode}/next_obs"], windows["next_obs"])
    values["baseline/copied_frame/psnr"] = _psnr(windows["current"], windows["next_obs"])
    return {name: interval(value, windows["episode"]) for name, value in values.items()}


def _per_window(error: np.ndarray) -> np.ndarray:
    return np.square(error, dtype=np.float64).reshape(len(error), -1).mean(axis=1)


def _psnr(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return -10 * np.log10(np.maximum(_per_window(prediction - truth), 1e-10))


def interval(values: np.ndarray, clusters: np.ndarray, resamples: int = 2000) -> dict[str, float]:
    """Mean over windows with a 95 % bootstrap interval that resamples whole clusters (episodes).

    Windows of one episode are alike, so that resampling windows would claim too much.

    Args:
      values, clusters: (N,).

    Returns:
      {"mean", "lo", "hi", "n"}; lo and hi equal the mean when there is one cluster.
    """
    _, index = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    draws = np.random.default_rng(0).integers(0, len(sums), (resamples, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    lo, hi = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "lo": float(lo), "hi": float(hi), "n": len(values)}


if __name__ == "__main__":
    cli.run(main, define_flags)
