"""Opened data: one opening serves every normaliser and every position of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from uwm_jax.data import run_data
from uwm_jax.data.loader import Loader
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError

_SPEC = importlib.util.spec_from_file_location("loader_case", Path(__file__).with_name("loader_case.py"))
case = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(case)
made, config, open_loader, take = case.made, case.config, case.open_loader, case.take


def test_data_opened_once_equals_data_opened_anew(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finetune takes its origin's normaliser, and a run falls back to an older checkpoint."""
    given = Normalizer({"action": (np.full(17, 2, np.float32), np.ones(17, np.float32))})
    anew = [open_loader(config), open_loader(config, normalizer=given)]
    expected = [take(anew[0], 2), take(open_loader(config, start_step=3), 2), take(anew[1], 2)]
    expected.append(list(anew[1].data.held_out(5).batches(5)))

    opened: list[Any] = []
    plain = run_data.open_sources
    monkeypatch.setattr(run_data, "open_sources", lambda *args: opened.append(args) or plain(*args))
    data = RunData(config, seed=5)
    other = data.with_normalizer(given)
    state = Loader(data, batch_size=8).state(3)
    found = [take(Loader(data, batch_size=8), 2), take(Loader(data, batch_size=8, start_step=3, state=state), 2)]
    found += [take(Loader(other, batch_size=8), 2), list(other.held_out(5).batches(5))]
    assert len(opened) == 1 and other.spec.normalizer is given and data.spec.normalizer is not given
    for ours, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_a_normaliser_for_other_keys_is_refused(config: ConfigDict) -> None:
    data = RunData(config, seed=5)
    with pytest.raises(UserError, match=r"is for action \(3 numbers\), but config.data.action"):
        data.with_normalizer(Normalizer({"action": (np.ones(3, np.float32), np.ones(3, np.float32))}))
