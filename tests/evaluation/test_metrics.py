"""Errors of windows and their intervals, against numpy and closed forms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from uwm_jax.errors import RunError
from uwm_jax.evaluation.metrics import (
    CHANGED,
    bounds_of,
    errors,
    interval,
    pairs_of,
    proportion,
    proportion_difference,
    summarize,
    text,
)
from uwm_jax.systems.base import Use
from uwm_jax.systems.uwm.modes import ACTING, USES

PAIRS = pairs_of(USES, ACTING)


def test_interval_is_clustered():
    rng = np.random.default_rng(0)
    means = rng.normal(size=200)
    values = np.repeat(means, 5)  # windows of an episode are copies of each other
    clusters = np.repeat(np.arange(200), 5)
    found = interval(values, clusters)
    half = 1.96 * means.std() / np.sqrt(200)
    assert found["n"] == 1000 and found["episodes"] == 200
    np.testing.assert_allclose(found["mean"], means.mean())
    np.testing.assert_allclose([found["lo"], found["hi"]], [means.mean() - half, means.mean() + half], atol=0.02)
    within = interval(np.clip(values / 8 + 0.5, 0, 1), clusters, (0.0, 1.0))
    np.testing.assert_allclose(
        [within["lo"], within["hi"]], [0.5 + (means.mean() + s * half) / 8 for s in (-1, 1)], atol=2e-3
    )


def test_fewer_than_six_episodes_have_no_interval():
    scores = np.array([0.0, 1.0, 0.0, 0.0, 1.0])
    for count in (1, 2, 5):
        x = scores[:count]
        expected = {"mean": x.mean(), "lo": None, "hi": None, "n": count, "episodes": count}
        assert interval(x, np.arange(count)) == interval(x, np.arange(count), (0, 1)) == expected
        assert proportion(x > 0) == expected and proportion_difference(x > 0, x < 0) == expected
        assert text(expected) == f"{x.mean():.4g} [too few]"
    windows = interval(np.ones(60), np.arange(60) % 5)
    assert (windows["n"], windows["episodes"], windows["lo"]) == (60, 5, None)
    six = interval(np.arange(6.0), np.arange(6))
    assert six["lo"] < 2.5 < six["hi"] and "[" in text(six) and "too few" not in text(six)


def test_intervals_of_bounded_quantities_stay_in_their_range():
    """Few episodes, most of them at a bound: where a mean plus and minus something leaves the range."""
    rng = np.random.default_rng(0)
    for number in range(6, 12):
        for ones in range(1, 3):
            x = np.where(np.arange(number) < ones, rng.uniform(0.2, 1, number), 0)
            for values, bounds in ((x, (0, 1)), (1 - x, (0, 1)), (2 * x - 1, (-1, 1)), (30 * x, (0, np.inf))):
                found = interval(values, np.arange(number), bounds)
                assert bounds[0] < found["lo"] < found["mean"] < found["hi"] < bounds[1]
            pair = proportion_difference(x > 0, np.ones(number, bool))
            assert -1 <= pair["lo"] < pair["mean"] < pair["hi"] <= 1
    assert interval(np.ones(9), np.arange(9), (0, 1))["hi"] == 1
    named = {name: bounds_of(name) for name in ("a/psnr", "b/action_mse", "paired/x/pixel_mse", "paired/x/action_mse")}
    inf = np.inf
    assert list(named.values()) == [(0, pytest.approx(100)), (0, inf), (-1, 1), (-inf, inf)]


@pytest.mark.parametrize("shape", [(0.5, 5.0), (2.0, 2.0), (5.0, 1.0)])
def test_intervals_of_bounded_quantities_hold_the_truth_as_often_as_they_say(shape):
    rng, truth = np.random.default_rng(0), shape[0] / sum(shape)
    for count in (6, 22, 50):
        found = [interval(rng.beta(*shape, count), np.arange(count), (0, 1)) for _ in range(1000)]
        held = np.mean([x["lo"] <= truth <= x["hi"] for x in found])
        assert 0.90 < held < 0.98, (count, held)


def test_a_bounded_interval_against_students_of_the_logit():
    """By scipy, with the logit's standard error by the delta method, for episodes of one window each."""
    x = np.random.default_rng(1).uniform(0.1, 0.7, 17)
    mean, error = x.mean(), stats.sem(x)
    logit = stats.t(16, loc=np.log(mean / (1 - mean)), scale=error / (mean * (1 - mean)))
    logarithm = stats.t(16, loc=np.log(mean), scale=error / mean)
    found = [interval(x, np.arange(17), bounds) for bounds in ((0, 1), (0, np.inf))]
    for by_us, ends in zip(
        found, (1 / (1 + np.exp(-logit.ppf([0.025, 0.975]))), np.exp(logarithm.ppf([0.025, 0.975]))), strict=True
    ):
        np.testing.assert_allclose([by_us["lo"], by_us["hi"]], ends, rtol=1e-9)


@pytest.mark.parametrize(("first", "second", "together"), [(0.5, 0.2, 0.5), (0.7, 0.3, 0.0), (0.05, 0.05, 0.0)])
def test_differences_of_shares_hold_the_truth_as_often_as_they_say(first, second, together):
    """Pairs that share their randomness in a part of the episodes."""
    rng = np.random.default_rng(0)
    for count in (6, 22, 50):
        held = []
        for _ in range(600):
            u = rng.random(count)
            v = np.where(rng.random(count) < together, u, rng.random(count))
            found = proportion_difference(u < first, v < second)
            held.append(found["lo"] <= first - second <= found["hi"])
        assert np.mean(held) > 0.92, (count, np.mean(held))  # rare successes are held more often
    none = proportion_difference(np.zeros(50, bool), np.zeros(50, bool))
    one = proportion(np.zeros(50, bool))
    np.testing.assert_allclose([none["lo"], none["hi"]], [-one["hi"], one["hi"]])


def test_the_interval_of_few_clusters_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for clusters in (6, 22):
        found = [interval(rng.normal(size=clusters), np.arange(clusters), resamples=1000) for _ in range(1000)]
        held = np.mean([x["lo"] <= 0 <= x["hi"] for x in found])
        assert abs(held - 0.95) < 3 * np.sqrt(0.95 * 0.05 / len(found)), (clusters, held)


@pytest.mark.parametrize(("successes", "n"), [(0, 50), (7, 20), (50, 50)])
def test_the_interval_of_a_share_is_where_its_score_test_ends(successes, n):
    found = proportion(np.arange(n) < successes)
    assert found["mean"] == successes / n and found["n"] == n and found["lo"] <= found["mean"] <= found["hi"]
    for end, side in ((found["lo"], 1), (found["hi"], -1)):
        if 0 < end < 1:  # by normal theory at the end's own variance
            score = (found["mean"] - end) / np.sqrt(end * (1 - end) / n)
            np.testing.assert_allclose(score, stats.norm.ppf(0.975) * side, rtol=1e-9)
    assert found["hi"] - found["lo"] > 0.05


def test_errors_against_a_loop_over_windows():
    rng = np.random.default_rng(0)
    current = rng.uniform(size=(3, 2, 1, 4, 5, 3))
    truth = {
        "action": rng.normal(size=(3, 6, 2)),
        "next_obs_latent": rng.normal(size=(3, 2, 2, 2, 2, 4)),
        "next_obs": current + rng.choice([0.0, 0.04, 0.06, -0.3], size=(3, 2, 2, 4, 5, 3)),
    }
    truth["next_obs"][1] = current[1]
    made = {name: x + rng.normal(size=x.shape) for name, x in truth.items()}
    changed = np.abs(truth["next_obs"] - current) > CHANGED
    found = errors(
        {name: jnp.asarray(x, jnp.float32) for name, x in made.items()},
        {name: jnp.asarray(x) for name, x in (truth | {"changed": changed}).items()},
    )
    for i in range(3):
        square = (made["next_obs"][i] - truth["next_obs"][i]) ** 2
        expected = {
            "action_mse": ((made["action"][i] - truth["action"][i]) ** 2).mean(),
            "latent_mse": ((made["next_obs_latent"][i] - truth["next_obs_latent"][i]) ** 2).mean(),
            "pixel_mse": square.mean(),
            "psnr": 10 * np.log10(1 / square.mean()),
            "changed_mse": square[changed[i]].mean() if i != 1 else 0.0,
        }
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][i], value, rtol=1e-5, err_msg=name)
    # A prediction that is the same for all windows or frames counts as if it were repeated.
    one = errors({"action": jnp.zeros(2)}, {"action": jnp.asarray(truth["action"])})
    np.testing.assert_allclose(one["action_mse"], (truth["action"] ** 2).mean(axis=(1, 2)), rtol=1e-6)


def values(**changes):
    """Metrics of four windows of two episodes."""
    found = {
        "policy/action_mse": [0.3, 0.3, 0.1, 0.1],
        "inverse/action_mse": [0.1, 0.2, 0.1, 0.0],
        "baseline/linear_interpolation/action_mse": [0.5, 9.0, 0.3, 0.2],
        "forward/changed_mse": [1.0, 2.0, 0.0, 4.0],
        "video/changed_mse": [2.0, 4.0, 0.0, 5.0],
        "baseline/copied_frame/changed_mse": [1.5, 2.5, 0.0, 4.5],
        "baseline/last_action/action_mse": [0.4, 9.0, 0.3, 0.2],
        "has_changed": [True, True, False, True],
        "has_last_action": [True, False, True, True],
    }
    return {name: np.asarray(x) for name, x in (found | changes).items()}


def test_summaries_pair_windows_and_leave_out_what_a_window_lacks():
    metrics = summarize(values(), np.array([4, 4, 9, 9]), PAIRS)
    assert not [name for name in metrics if "has_" in name]
    assert metrics["forward/changed_mse"]["n"] == 3 and metrics["policy/action_mse"]["n"] == 4
    assert metrics["forward/changed_mse"]["mean"] == pytest.approx(7 / 3)
    line = metrics["baseline/linear_interpolation/action_mse"]
    assert line["n"] == 3 and line["mean"] == pytest.approx(1 / 3)
    pair = metrics["paired/inverse_vs_linear_interpolation/action_mse"]
    assert pair["n"] == 3 and pair["mean"] == pytest.approx((0.4 + 0.2 + 0.2) / 3)
    pair = metrics["paired/inverse_vs_policy/action_mse"]
    assert pair["mean"] == pytest.approx(0.1) and pair["lo"] is pair["hi"] is None  # of two episodes
    assert metrics["paired/forward_vs_video/changed_mse"]["mean"] == pytest.approx(4 / 3)
    frames = metrics["paired/forward_vs_copied_frame/changed_mse"]
    assert frames == {"mean": 0.5, "lo": None, "hi": None, "n": 3, "episodes": 2}
    assert metrics["paired/policy_vs_last_action/action_mse"]["n"] == 3
    assert "paired/policy_vs_mean_action/action_mse" not in metrics, "there is nothing to compare with"
    nothing = summarize(values(has_changed=[False] * 4), np.arange(4), PAIRS)
    assert "forward/changed_mse" not in nothing and "policy/action_mse" in nothing


def test_samples_that_are_not_finite_are_named_unless_they_do_not_count():
    with pytest.raises(RunError, match=r"policy/action_mse is nan in held-out window 2 and 1 more"):
        summarize(values(**{"policy/action_mse": [0.3, 0.3, np.nan, np.inf]}), np.arange(4), PAIRS)
    summarize(values(**{"baseline/linear_interpolation/action_mse": [0.5, np.nan, 0.3, 0.2]}), np.arange(4), PAIRS)


def test_a_use_is_compared_with_what_knows_no_more_than_it():
    assert set(PAIRS) == {
        *("policy_vs_mean_action", "policy_vs_last_action", "inverse_vs_mean_action"),
        *("inverse_vs_linear_interpolation", "inverse_vs_policy", "forward_vs_video", "forward_vs_shuffled"),
        *("forward_vs_copied_frame", "forward_vs_mean_image"),
    }
    assert PAIRS["forward_vs_shuffled"] == ("forward", "control/forward_shuffled")
    assert set(pairs_of({"joint": Use(("action", "next_obs"))}, "joint")) == {
        *("joint_vs_mean_action", "joint_vs_last_action", "joint_vs_copied_frame", "joint_vs_mean_image"),
    }
    assert pairs_of({}, "") == {}
