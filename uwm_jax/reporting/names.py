"""Words of pages for what files call `policy/action_mse`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from uwm_jax.envs.parallel import HOLD
from uwm_jax.evaluation.evaluator import MEAN_IMAGE_WINDOWS
from uwm_jax.systems.base import Use

SYMBOLS = {"action": "a", "next_obs": "o'"}  # of what a use makes or is given
_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#a0418f")  # of uses, in the order of a system

METRICS = {  # a metric's name, and what its numbers are
    "action_mse": ("action error (MSE)", "actions from -1 to 1"),
    "pixel_mse": ("frame error (MSE)", "pixels from 0 to 1"),
    "changed_mse": ("frame error where the picture changed (MSE)", "pixels from 0 to 1"),
    "psnr": ("frame quality (PSNR)", "dB, more is better"),
    "latent_mse": ("latent error (MSE)", ""),
    "shuffle_gap": ("what wrong actions cost (MSE)", "one evaluation, more is better"),
    "success": ("success", "share of episodes"),
    "seam": ("jump from one chunk of actions to the next (RMS)", "actions from -1 to 1, less is smoother"),
}
BASELINES = {
    "mean_action": "the mean action of the training episodes",
    "last_action": "the last action, repeated",
    "linear_interpolation": "a straight line from the last action to the chunk's true end, which no model has",
    "copied_frame": "the current frame, copied",
    "mean_image": f"the mean later frame of {MEAN_IMAGE_WINDOWS} windows of training episodes",
    "codec": "not a baseline but the ceiling: the true frame through the image codec",
}
ACTORS = {
    "policy": "the model",
    "expert": "the expert that made the demonstrations",
    "random_held": f"random targets, each held for {HOLD} steps",
    "random_uniform": "random targets, a new one each step",
    "no_action": "doing nothing: how the episodes start",
}
PICTURES = {  # of an evaluation, and what they show
    "modes.png": "Predicted frames next to what really came, and below each where it is wrong. Error: the root of the "
    "mean square over all pixels.",
    "actions.png": "Sampled actions and those that were really done.",
    "denoise.gif": "A sample on its way from pure noise.",
}
ERRORS = {  # panels of a run's curves: the metric of each use, and what is drawn next to it, with its words and line
    "Error of sampled actions": (
        "action_mse",
        {
            "baseline/mean_action": ("mean action", "-."),
            "baseline/linear_interpolation": ("straight line to the true end", ":"),
        },
    ),
    "Error of frames where the picture changed": (
        "changed_mse",
        {"baseline/copied_frame": ("copied frame", "-."), "baseline/mean_image": ("mean image", ":")},
    ),
}
KNOWS_MORE = ("linear_interpolation", "codec")  # these are told some of the truth, so that to be worse is no defect


def colors(uses: Iterable[str]) -> dict[str, str]:
    """{use: colour of its lines}."""
    return dict(zip(uses, itertools.cycle(_COLORS), strict=False))


def formula(use: Use) -> str:
    """`p(o' | o, a)` of a use."""
    known = ["o"] * use.sees_obs + [SYMBOLS[m] for m in use.given]
    return f"p({', '.join(SYMBOLS[m] for m in use.makes)}{' | ' + ', '.join(known) if known else ''})"


def of_metric(name: str) -> tuple[str, str]:
    """A metric's name and what its numbers are, such as ("error of actions", "MSE, range -1 to 1")."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("max_"):
        return f"best {name.removeprefix('max_').replace('_', ' ')} of an episode", "mean over episodes, more is better"
    return name.replace("_", " "), ""


def of(name: str) -> tuple[str, str]:
    """A name of `metrics.json` for people, and what its numbers are: `policy/action_mse` is ("policy: action error
    (MSE)", "actions from -1 to 1"). Before names of a closed loop `rollout/` or `closed_loop/` stands."""
    *before, metric = name.split("/")
    says, unit = of_metric(metric)
    simulated = before[:1] in (["rollout"], ["closed_loop"])
    kind, who = (before[simulated:] or [""])[0], before[-1] if len(before) > simulated else ""
    if kind == "paired":
        first, _, second = who.partition("_vs_")
        who, unit = f"{_plain(first)} against {_plain(second)}", "difference; positive: the first is better"
    elif who == "control":
        who = ""
    elif kind in ("baseline", "control"):
        who = f"{kind}, {_plain(who)}"
    else:
        who = _plain(who)
    who = ", ".join(part for part in ("in the simulator" if simulated else "", who) if part)
    return (f"{who}: {says}" if who else says), unit


_PLAIN = {
    "linear_interpolation": "a straight line to the true end",
    "shuffled": "the same with another window's actions",
    "random_held": f"random targets held for {HOLD} steps",
    "random_uniform": "random targets",
    "mean_action": "the mean action",
    "last_action": "the last action repeated",
    "copied_frame": "the current frame copied",
    "mean_image": "the mean image",
    "no_action": "doing nothing",
    "expert": "the expert",
    "codec": "the codec alone",
}


def _plain(who: str) -> str:
    if who.endswith("_shuffled"):
        return f"{who.removesuffix('_shuffled')} with another window's actions"
    return _PLAIN.get(who, who.replace("_", " "))
