"""Questions that intervals answer, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uwm_jax.envs.parallel import HOLD
from uwm_jax.reporting import names
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import NOTHING, head, interval, number_head, table
from uwm_jax.reporting.results import Interval, verdict

ACTIONS, FRAMES, SIMULATED = "Actions", "Frames", "In the simulator"


SIMULATED_QUESTIONS = {  # by the actor that the policy is set against
    "random_uniform": "Does it do better than random targets?",
    "random_held": f"\u2026 than random targets that are held for {HOLD} steps?",
}
_ASKED = ("action_mse", "pixel_mse", "changed_mse")  # of pairs without a question of their own


def answers(
    metrics: Mapping[str, Interval],
    closed_loop: Mapping[str, Interval],
    questions: Mapping[str, str],
    step: str = "",
) -> Html:
    """Verdicts of the intervals of an evaluation and of a closed loop, a table for each unit; "" for none.

    Args:
      questions: {metric: what it answers} of a system, asked first; other pairs are asked in general words.
      step: of the closed loop, in words, where it is another one than the evaluation's.
    """
    found: dict[str, list[tuple[str, str, Interval]]] = {}
    asked = dict(questions)
    if not questions:
        pairs = [name for name in metrics if name.startswith("paired/") and name.rpartition("/")[2] in _ASKED]
        asked = {name: f"Is it better? {names.of(name)[0]}" for name in pairs}
    for name, question in asked.items():
        if (m := metrics.get(name)) is not None:
            found.setdefault(ACTIONS if name.endswith("/action_mse") else FRAMES, []).append((question, name, m))
    for other, question in SIMULATED_QUESTIONS.items():
        for name, m in closed_loop.items():
            if name.startswith(f"paired/policy_vs_{other}/max_"):
                found.setdefault(SIMULATED, []).append((f"{question} ({m.n} episodes{step})", name, m))
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
