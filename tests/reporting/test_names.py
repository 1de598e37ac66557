"""Words for the names of metrics."""

from __future__ import annotations

import re

import pytest

from uwm_jax.evaluation.metrics import pairs_of
from uwm_jax.reporting import names
from uwm_jax.systems.uwm.modes import ACTING, MODES, USES


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("policy/action_mse", "policy: action error (MSE)"),
        ("control/shuffle_gap", "what wrong actions cost (MSE)"),
        ("control/forward_shuffled/psnr", "control, forward with another window's actions: frame quality (PSNR)"),
        ("baseline/linear_interpolation/action_mse", "baseline, a straight line to the true end: action error (MSE)"),
        ("paired/inverse_vs_policy/action_mse", "inverse against policy: action error (MSE)"),
        ("rollout/policy/max_coverage", "in the simulator, policy: best coverage of an episode"),
        ("rollout/paired/policy_vs_expert/success", "in the simulator, policy against the expert: success"),
        ("closed_loop/success", "in the simulator: success"),
        ("closed_loop/max_some_thing", "in the simulator: best some thing of an episode"),
    ],
)
def test_names(name, words):
    assert names.of(name)[0] == words


def test_every_metric_has_words_of_its_own():
    who = [*MODES, *(f"baseline/{b}" for b in names.BASELINES), *(f"paired/{p}" for p in pairs_of(USES, ACTING))]
    who += [
        "control/forward_shuffled",
        *(f"rollout/{actor}" for actor in names.ACTORS),
        "rollout/paired/policy_vs_expert",
    ]
    found = {f"{w}/{m}": names.of(f"{w}/{m}")[0] for w in who for m in (*names.METRICS, "max_coverage")}
    assert len(set(found.values())) == len(found)
    assert not [words for words in found.values() if re.search(r"\w[_/]\w", words)]
