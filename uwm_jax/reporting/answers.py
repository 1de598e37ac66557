"""Questions that intervals answer, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from uwm_jax.envs.parallel import HOLD
from uwm_jax.reporting import names
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import NOTHING, head, interval, number_head, table
from uwm_jax.reporting.results import Interval, verdict


class Claim(NamedTuple):
    """A question, and the metric whose interval answers it: positive is yes. Those of one group are in one unit."""

    group: str
    question: str
    metric: str


ACTIONS, FRAMES, SIMULATED = "Actions", "Frames", "In the simulator"


CLAIMS = (
    Claim(ACTIONS, "Does it act? The policy mode against the mean action", "paired/policy_vs_mean_action/action_mse"),
    Claim(ACTIONS, "… against the last action, repeated", "paired/policy_vs_last_action/action_mse"),
    Claim(
        ACTIONS,
        "Does it explain? The inverse mode against the mean action",
        "paired/inverse_vs_mean_action/action_mse",
    ),
    Claim(
        ACTIONS,
        "… against the policy mode, which does not see the later frame",
        "paired/inverse_vs_policy/action_mse",
    ),
    Claim(
        ACTIONS,
        "… against a straight line to the true last action",
        "paired/inverse_vs_linear_interpolation/action_mse",
    ),
    Claim(
        FRAMES,
        "Does it predict what actions do? One evaluation with the true actions against another window's",
        "control/shuffle_gap",
    ),
    Claim(FRAMES, "… whole samples, all pixels", "paired/forward_vs_shuffled/pixel_mse"),
    Claim(FRAMES, "… whole samples, pixels that changed", "paired/forward_vs_shuffled/changed_mse"),
    Claim(
        FRAMES,
        "Do known actions help to predict? Forward against video, pixels that changed",
        "paired/forward_vs_video/changed_mse",
    ),
    Claim(
        FRAMES,
        "Are the forward mode's frames better than the current frame, copied?",
        "paired/forward_vs_copied_frame/pixel_mse",
    ),
    Claim(FRAMES, "Are they better than the mean image?", "paired/forward_vs_mean_image/pixel_mse"),
    Claim(FRAMES, "… on pixels that changed", "paired/forward_vs_mean_image/changed_mse"),
)
CLOSED_LOOP_CLAIMS = (
    Claim(SIMULATED, "Does it do better than random targets?", "random_uniform"),
    Claim(SIMULATED, f"… than random targets that are held for {HOLD} steps?", "random_held"),
)


def answers(metrics: Mapping[str, Interval], closed_loop: Mapping[str, Interval], step: str = "") -> Html:
    """Verdicts of the intervals of an evaluation and of a closed loop, a table for each unit; "" for none.

    Args:
      step: of the closed loop, in words, where it is another one than the evaluation's.
    """
    found: dict[str, list[tuple[str, str, Interval]]] = {}
    for group, question, name in CLAIMS:
        if (m := metrics.get(name)) is not None:
            found.setdefault(group, []).append((question, name, m))
    for group, question, other in CLOSED_LOOP_CLAIMS:
        for name, m in closed_loop.items():
            if name.startswith(f"paired/policy_vs_{other}/max_"):
                found.setdefault(group, []).append((f"{question} ({m.n} episodes{step})", name, m))
    return fill("{}", [_table(group, rows) for group, rows in found.items()]) if found else NOTHING


def _table(group: str, claims: Sequence[tuple[str, str, Interval]]) -> Html:
    form = Format.of(m.mean for *_, m in claims)
    rows = [
        [
            head(question),
            _answer(name, m),
            fill('<td class="number">{}</td>', form(m.mean)),
            fill('<td class="number">{}</td>', interval(m, form)),
        ]
        for question, name, m in claims
    ]
    heads = [group, "answer", number_head("difference"), number_head("95 % interval")]
    return fill('<div class="answers">{}</div>', table(heads, rows, f"what the numbers say: {group}"))


def _answer(name: str, m: Interval) -> Html:
    """A `<td>`: green for yes, red for what is worse than something that knows no more."""
    answer = verdict(m)
    if answer.startswith("no") and any(f"_vs_{other}/" in name for other in names.KNOWS_MORE):
        return Html('<td class="open">no, but that is told more</td>')
    kind = {"yes": "yes", "no, it is worse": "no"}.get(answer, "open")
    return fill('<td class="{}">{}</td>', kind, answer)
