from __future__ import annotations

import json

import numpy as np
import pytest

from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.stats import column_stats, join_stats
from uwm_jax.errors import UserError


def _column(n: int = 5000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.normal(3, 2, n), rng.uniform(-5, -4, n), np.full(n, 0.7)], axis=1).astype(np.float32)


def test_minmax_is_the_closed_form() -> None:
    x = _column()
    normalizer = Normalizer.from_stats({"action": column_stats(x)}, "minmax", ["action"])
    scale, offset = normalizer.entries["action"]
    low, high = x.min(axis=0), x.max(axis=0)
    np.testing.assert_allclose(scale[:2], (high - low)[:2] / 2, rtol=1e-6)
    np.testing.assert_allclose(offset, (high + low) / 2, rtol=1e-6)
    y = normalizer.normalize("action", x)
    np.testing.assert_allclose(y.min(axis=0)[:2], -1, atol=1e-6)
    np.testing.assert_allclose(y.max(axis=0)[:2], 1, atol=1e-6)
    np.testing.assert_allclose(normalizer.unnormalize("action", y), x, atol=1e-5)


def test_constant_dimensions_become_zero_and_come_back() -> None:
    x = _column()
    for kind in ("minmax", "quantile"):
        normalizer = Normalizer.from_stats({"action": column_stats(x)}, kind, ["action"])
        assert normalizer.entries["action"][0][2] == 1
        np.testing.assert_array_equal(normalizer.normalize("action", x)[:, 2], 0)
        np.testing.assert_array_equal(normalizer.unnormalize("action", np.zeros(3, np.float32))[2], x[0, 2])


def test_quantiles_ignore_outliers_and_do_not_clip() -> None:
    x = _column()
    x[7, 0] = 1e6
    normalizer = Normalizer.from_stats({"state": column_stats(x)}, "quantile", ["state"])
    q01, q99 = np.quantile(x[:, 0], [0.01, 0.99])
    np.testing.assert_allclose(normalizer.normalize("state", np.float32([q01, -4.5, 0.7]))[0], -1, atol=1e-5)
    np.testing.assert_allclose(normalizer.normalize("state", np.float32([q99, -4.5, 0.7]))[0], 1, atol=1e-5)
    assert normalizer.normalize("state", x)[7, 0] > 1e4


def test_a_rare_event_falls_back_to_the_whole_range() -> None:
    x = np.zeros((1000, 1), np.float32)
    x[3] = 1
    normalizer = Normalizer.from_stats({"gripper": column_stats(x)}, "quantile", ["gripper"])
    np.testing.assert_allclose(normalizer.normalize("gripper", np.float32([[0], [1]])), [[-1], [1]])


def test_none_and_unknown_keys_are_the_identity() -> None:
    x = _column()
    normalizer = Normalizer.from_stats({"action": column_stats(x)}, "none", ["action"])
    assert normalizer.normalize("action", x) is x
    assert Normalizer().unnormalize("state", x) is x


def test_json_is_exact() -> None:
    normalizer = Normalizer.from_stats({"action": column_stats(_column())}, "minmax", ["action"])
    back = Normalizer.from_json(json.loads(json.dumps(normalizer.to_json())))
    for a, b in zip(normalizer.entries["action"], back.entries["action"], strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.dtype == np.float32


def test_values_that_are_not_finite_are_refused() -> None:
    x = _column()
    x[5, 1] = np.nan
    stats = column_stats(x)
    assert stats["nonfinite"] == 1
    assert np.isfinite(stats["max"]).all()
    with pytest.raises(UserError, match="action: 1 of 5000 steps are NaN or infinite"):
        Normalizer.from_stats({"action": stats}, "minmax", ["action"])


def test_stats_equal_numpy_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uwm_jax.data.stats._BLOCK", 301)
    x = _column() + 1000
    stats = column_stats(x)
    exact = x.astype(np.float64)
    for name, expected in {
        "min": exact.min(axis=0),
        "max": exact.max(axis=0),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
        "q01": np.quantile(x, 0.01, axis=0),
        "q99": np.quantile(x, 0.99, axis=0),
    }.items():
        np.testing.assert_allclose(stats[name], expected, rtol=1e-6, atol=1e-9)
    assert stats["count"] == len(x)
    # Thinned quantiles take every k-th row of the whole, whatever the blocks.
    monkeypatch.setattr("uwm_jax.data.stats._QUANTILE_VALUES", 3 * 700)
    stride = -(-len(x) * 3 // 2100)
    np.testing.assert_allclose(column_stats(x)["q99"], np.quantile(x[::stride], 0.99, axis=0), rtol=1e-6)


def test_rows_left_out_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uwm_jax.data.stats._BLOCK", 301)
    monkeypatch.setattr("uwm_jax.data.stats._QUANTILE_VALUES", 3 * 700)  # thinned
    x = _column()
    keep = np.random.default_rng(1).random(len(x)) < 0.6
    keep[:1000] = False  # whole blocks
    expected = column_stats(x[keep])
    x[~keep] = np.nan
    found = column_stats(x, keep=keep)
    assert found.keys() == expected.keys() and found["count"] == keep.sum() and found["nonfinite"] == 0
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, err_msg=name)


def test_transformed_and_joined() -> None:
    x = _column()
    parts = [column_stats(x, lambda v: np.square(v)), column_stats(x)]
    joined = join_stats(parts)
    np.testing.assert_allclose(joined["max"], np.concatenate([(x**2).max(axis=0), x.max(axis=0)]), rtol=1e-6)
    assert len(joined["q01"]) == 6
