"""Held-out episodes that an origin was trained on, against sets that are drawn here."""

from __future__ import annotations

import numpy as np
import pytest
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.data.loader import Loader
from uwm_jax.data.run_data import RunData
from uwm_jax.training import lineage


def held_out(ratio, episodes=6):
    return set(np.random.default_rng(0).choice(episodes, round(ratio * episodes), replace=False).tolist())


@pytest.fixture
def data(tiny_config):
    """Of six episodes, half of which are held out."""
    tiny_config.data.val_ratio = 0.5
    data = RunData(tiny_config.data, seed=0)
    yield data
    data.close()


def entry(data, **changed):
    (mine,) = lineage.of_data(data)
    return mine | changed


def test_another_share_of_held_out_episodes_leaks(data):
    seen = held_out(0.5) - held_out(0.17)
    assert seen
    told = lineage.leak([entry(data, val_ratio=0.17)], data)
    assert told is not None and told.startswith(f"{len(seen)} of 3 held-out episodes of ")
    assert "(config.data.val_ratio=0.5 here, 0.17 there)" in told
    assert lineage.leak([entry(data, val_ratio=0.0)], data).startswith("3 of 3")


def test_an_origin_that_chose_among_the_episodes_may_have_seen_fewer(data):
    told = lineage.leak([entry(data, val_ratio=0.0, selection="'a' in path")], data)
    assert told is not None and told.startswith("up to 3 of 3 held-out episodes of ")


def test_what_does_not_leak(data):
    for other in ({}, {"val_ratio": 0.17, "fingerprint": "another"}, {"val_ratio": 0.17, "split": "val"}):
        assert lineage.leak([entry(data, **other)], data) is None
    assert lineage.leak([], data) is None


def test_origins_of_origins_count_and_an_origin_that_does_not_tell_is_told(data, capsys):
    past = lineage.begin(data, [entry(data), entry(data, val_ratio=0.17)], True)
    assert "of 3 held-out episodes" in past["leak"] and f"warning: {past['leak']}" in capsys.readouterr().out
    assert [x["val_ratio"] for x in past["learned_from"]] == [0.5, 0.17, 0.5]
    assert lineage.of_checkpoint(past, {}, None) == past["learned_from"]
    unknown = lineage.begin(data, None, True)
    assert "does not say what it was trained on" in unknown["leak"] and unknown["learned_from"] is None
    assert lineage.begin(data, None, False) == {"learned_from": lineage.of_data(data), "leak": None}
    assert lineage.kept({"leak": "text", "config": {}}) == {"leak": "text"}


def test_older_checkpoints_tell_by_their_config_and_position(data, tiny_config):
    data_iter = Loader(data, batch_size=4).state(3)
    assert lineage.of_checkpoint({}, data_iter, tiny_config) == lineage.of_data(data)
    assert lineage.of_checkpoint({}, {}, tiny_config) is None
    tiny_config.data.sources = ConfigDict({"robot": config_lib.source(split="val")})
    data_iter = {"datasets": {"robot": "abc (with 'x' in path)"}}
    assert lineage.of_checkpoint({}, data_iter, tiny_config) == [
        {"fingerprint": "abc", "split": "val", "val_ratio": 0.5, "selection": "with 'x' in path"}
    ]
    tiny_config.init_from = "runs/a@3"  # whose own data these checkpoints do not tell
    assert lineage.of_checkpoint({}, data_iter, tiny_config) is None
