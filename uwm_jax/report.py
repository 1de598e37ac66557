"""Pictures of what a run does, and one offline HTML page that shows them."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from ml_collections import ConfigDict

import uwm_jax
from uwm_jax.config import base, flatten
from uwm_jax.data.normalize import Normalizer
from uwm_jax.diffusion.modes import MODES, QUESTIONS, generated, given
from uwm_jax.files import write_text
from uwm_jax.training.log import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SYMBOLS = {"action": "a", "next_obs": "o'"}


def formula(mode: str) -> str:
    """`p(o' | o, a)` of a mode."""
    known = ["o", *(SYMBOLS[m] for m in given(mode))]
    return f"p({', '.join(SYMBOLS[m] for m in generated(mode))} | {', '.join(known)})"


def draw_modes(windows: Mapping[str, np.ndarray], normalizer: Normalizer, path: Path, rows: int = 4) -> None:
    """Held-out windows, one a row: frames of the first view beside the truth, and action traces over time.

    Args:
      windows: as `evaluate.collect` returns.
      normalizer: turns actions back to raw units for the axes.
    """
    picked = np.linspace(0, len(windows["episode"]) - 1, min(rows, len(windows["episode"]))).astype(int)
    frames = [("current frame", "current"), ("true next frame", "next_obs")]
    frames += [(f"{mode}: {formula(mode)}", f"{mode}/next_obs") for mode in MODES if f"{mode}/next_obs" in windows]
    dims = min(windows["action"].shape[-1], 3)
    widths = [1.0] * len(frames) + [1.5] * dims
    figure, axes = plt.subplots(
        len(picked),
        len(widths),
        figsize=(2.3 * sum(widths), 2.5 * len(picked) + 0.6),
        gridspec_kw={"width_ratios": widths},
        squeeze=False,
        layout="constrained",
    )
    for row, window in enumerate(picked):
        for axis, (title, key) in zip(axes[row], frames, strict=False):
            axis.imshow(windows[key][window, 0, -1], vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(title, fontsize=10)
        axes[row, 0].set_ylabel(f"episode {windows['episode'][window]}", fontsize=9)
        for dim in range(dims):
            axis = axes[row, len(frames) + dim]

            def trace(key: str, dim: int = dim, window: int = window) -> np.ndarray:
                return normalizer.unnormalize("action", windows[key][window])[:, dim]

            axis.plot(trace("action"), color="black", linewidth=2.5, label="truth")
            for mode in MODES:
                if f"{mode}/action" in windows:
                    axis.plot(trace(f"{mode}/action"), linewidth=1.4, label=f"{mode}: {formula(mode)}")
            axis.tick_params(labelsize=7)
            if row == 0:
                axis.set_title(f"action, dimension {dim}", fontsize=10)
            if row == len(picked) - 1:
                axis.set_xlabel("step of the chunk", fontsize=8)
    handles, labels = axes[0, len(frames)].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=4, fontsize=9)
    _save(figure, path)


def draw_curves(metrics_file: Path, path: Path) -> None:
    """Training and held-out losses of both modalities over steps, on a logarithmic axis."""
    lines = read_metrics(metrics_file)
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for modality, color in (("action", "tab:blue"), ("next_obs", "tab:orange")):
        for prefix, style, name in (("loss/", "-", "training"), ("eval/loss/", "o--", "held out")):
            points = [(x["step"], x[prefix + modality]) for x in lines if prefix + modality in x]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=color, label=f"{modality}, {name}", markersize=4)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("mean squared error")
    axis.grid(alpha=0.3, which="both")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    _save(figure, path)


def text_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics as aligned lines `name  mean [lo, hi]`."""
    width = max(len(name) for name in metrics)
    return "\n".join(
        f"  {name:<{width}}  {m['mean']:.4f}  [{m['lo']:.4f}, {m['hi']:.4f}]" for name, m in metrics.items()
    )


def write(
    workdir: Path,
    config: ConfigDict,
    step: int,
    metrics: Mapping[str, Mapping[str, float]],
    modes_picture: Path,
    curves_picture: Path,
) -> None:
    """Writes `report.html`: one file with its pictures inside, readable without a network."""

    def picture(path: Path, alt: str) -> str:
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<a href="{path.relative_to(workdir)}"><img alt="{alt}" src="data:image/png;base64,{data}"></a>'

    def cell(name: str, digits: int) -> str:
        m = metrics.get(name)
        if m is None:
            return "<td></td>"
        return f"<td>{m['mean']:.{digits}f}<br><small>{m['lo']:.{digits}f} to {m['hi']:.{digits}f}</small></td>"

    rows = "".join(
        f"<tr><th>{mode}</th><td>{html.escape(formula(mode))}</td><td>{QUESTIONS[mode]}</td>"
        + cell(f"{mode}/action_mse", 4)
        + cell(f"{mode}/latent_mse", 4)
        + cell(f"{mode}/psnr", 2)
        + "</tr>"
        for mode in MODES
    )
    rows += "<tr><th>copied frame</th><td></td><td>baseline: the current frame as the prediction</td><td></td><td></td>"
    rows += cell("baseline/copied_frame/psnr", 2) + "</tr>"
    defaults = flatten(base())
    changed = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(json.dumps(value))}</td></tr>"
        for name, value in sorted(flatten(config).items())
        if name not in defaults or value != defaults[name]  # the sources of a mixture have no defaults
    )
    count = next(iter(metrics.values()))["n"]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>UWM: {html.escape(workdir.name)}, step {step}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
small {{ color: #666; }}
</style></head><body>
<h1>One set of weights, five questions</h1>
<p>A Unified World Model diffuses actions and future frames together, each at its own noise level. Giving a
modality clean makes it a condition, giving it as pure noise hides it, so one network answers all of the questions
below. o is the current observation, a the next actions, o' the observation after them.</p>
<h2>What it samples, beside the truth</h2>
<p>{count} windows of held-out episodes; the picture shows {html.escape(modes_picture.name)} of step {step}.</p>
{picture(modes_picture, "samples of all modes beside the truth")}
<table><tr><th>mode</th><th>samples</th><th>the question</th><th>action error<br><small>MSE, normalised</small></th>
<th>latent error<br><small>MSE</small></th><th>frame quality<br><small>PSNR, dB</small></th></tr>{rows}</table>
<p><small>Mean over windows, and a 95 % interval that resamples whole episodes.</small></p>
<h2>Loss</h2>
{picture(curves_picture, "loss over steps")}
<h2>The run</h2>
<p>uwm_jax {uwm_jax.__version__}, step {step} of {config.total_steps}. Fields that differ from
<code>uwm_jax.config.base()</code>:</p>
<table>{changed}</table>
</body></html>
"""
    write_text(workdir / "report.html", page)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
