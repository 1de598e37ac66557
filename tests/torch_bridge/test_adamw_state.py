"""A stored `optimizer` under the names of parameters, and what is refused by name; no torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import adamw_state

NAMES = ("vae.conv", "net.weight", "net.bias")  # the first is frozen


def stored() -> dict[str, Any]:
    """After 3 updates."""
    entries = {
        index: {
            "step": np.float32(3),
            "exp_avg": np.full(shape, index, np.float32),
            "exp_avg_sq": np.full(shape, 10 * index, np.float32),
        }
        for index, shape in ((1, (2, 3)), (2, (2,)))
    }
    group = {"lr": 5e-5, "initial_lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-6}
    return {"state": entries, "param_groups": [{**group, "amsgrad": False, "maximize": False, "params": [0, 1, 2]}]}


def test_indices_become_names() -> None:
    found = adamw_state.read(stored(), 2, NAMES, "x.pt")
    assert list(found.first) == list(found.second) == ["net.weight", "net.bias"]
    np.testing.assert_array_equal(found.second["net.bias"], [20, 20])
    assert (found.updates, found.steps) == (3, 3)
    assert (found.learning_rate, found.rate, found.b1, found.b2) == (1e-4, 5e-5, 0.9, 0.999)
    assert (found.eps, found.weight_decay) == (1e-8, 1e-6)


@pytest.mark.parametrize(
    ("step", "steps"),
    [(2, 3), (np.int64(2), 3), (3, 3), (9, 10), (None, 3)],
    ids=["last, from 0", "numpy", "counted", "skipped updates", "absent"],
)
def test_finished_steps(step: Any, steps: int) -> None:
    assert adamw_state.read(stored(), step, NAMES, "x.pt").steps == steps


def group(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda optimizer: optimizer["param_groups"][0].update(fields)


def entry(index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda optimizer: optimizer["state"][index].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.clear(), "with the keys state and param_groups; found a dictionary with nothing"),
        (lambda o: o["state"].clear(), "no step was made with it"),
        (lambda o: o["state"].update({3: o["state"][1]}), r"state\[3\]: expected indices from 0 to 2"),
        (lambda o: o["state"].update({True: o["state"].pop(1)}), r"state\[True\]: expected indices"),
        (lambda o: o["state"].update({"net.bias": o["state"].pop(2)}), r"state\['net.bias'\]: expected indices"),
        (
            entry(1, max_exp_avg_sq=np.zeros(1)),
            r"state\[1\] \(net.weight\) should hold exp_avg, exp_avg_sq, step; found",
        ),
        (lambda o: o["state"][2].pop("exp_avg"), r"state\[2\] \(net.bias\) should hold"),
        (entry(2, exp_avg=[0.0, 0.0]), r"state\[2\] \(net.bias\): exp_avg should be a tensor, found list"),
        (entry(2, step=np.float32(4)), "net.weight was updated 3 times, net.bias 4 times"),
        (entry(1, step=2.5), "step should count updates from 1 on, found 2.5"),
        (entry(1, step=np.float32(np.nan)), "step should be a number from 0 on"),
        (lambda o: o["param_groups"].append(o["param_groups"][0]), "one group of all parameters, found 2 groups"),
        (group(params=[0, 1]), "should be 0 to 2, one for each of the 3 tensors of `model`.*found 2 indices"),
        (group(params=[0, 2, 1]), "should be 0 to 2"),
        (group(amsgrad=True), r"'amsgrad'\] is True"),
        (group(maximize=True), r"'maximize'\] is True"),
        (group(decoupled_weight_decay=False), r"'decoupled_weight_decay'\] is False"),
        (group(betas=None), r"'betas'\] should be two numbers"),
        (group(eps="small"), "eps should be a number from 0 on, found 'small'"),
        (group(lr=None, initial_lr=1.0), "lr should be a number from 0 on, found None"),
    ],
)
def test_anything_else_is_refused_by_name(change: Callable[[dict[str, Any]], None], message: str) -> None:
    optimizer = copy.deepcopy(stored())
    change(optimizer)
    with pytest.raises(UserError, match=f"--optimizer: x.pt: its `optimizer`.*{message}"):
        adamw_state.read(optimizer, 2, NAMES, "x.pt")


@pytest.mark.parametrize("optimizer", [None, [], 3, {"state": {}}])
def test_what_is_no_optimizer(optimizer: Any) -> None:
    with pytest.raises(UserError, match="should be the state of torch.optim.AdamW"):
        adamw_state.read(optimizer, 2, NAMES, "x.pt")


@pytest.mark.parametrize("step", [1, -1, 2.5, "2"])
def test_a_step_that_does_not_fit_the_updates(step: Any) -> None:
    with pytest.raises(UserError, match=r"--optimizer: x.pt: its `(optimizer|step)`"):
        adamw_state.read(stored(), step, NAMES, "x.pt")
