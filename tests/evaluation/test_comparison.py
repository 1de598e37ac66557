"""Which way a metric is better, and what counts as the best of several runs."""

from __future__ import annotations

import pytest

from uwm_jax.evaluation.comparison import _best, _more_is_better
from uwm_jax.evaluation.results import Interval


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("forward/psnr", True),
        ("rollout/policy/success", True),
        ("control/shuffle_gap", True),
        ("paired/inverse_vs_policy/action_mse", True),
        ("policy/action_mse", False),
        ("baseline/copied_frame/changed_mse", False),
    ],
)
def test_which_way_is_better(name, more):
    assert _more_is_better(name) is more


def test_the_best_is_apart_from_every_other():
    low, middle, high = (Interval(m, m - h, m + h, 90, 9) for m, h in ((1, 0.5), (1.8, 0.4), (3, 0.5)))
    assert _best([low, None, middle, high], more=True) is high
    assert _best([low, middle, high], more=False) is None  # low and middle overlap
    assert _best([low, high], more=False) is low
    assert _best([None, high], more=True) is None
    assert _best([low, high._replace(episodes=5)], more=True) is None  # by chance
