"""The description next to exported weights, read again or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import description


def _description() -> dict[str, Any]:
    return {
        "format": description.FORMAT,
        "format_version": description.FORMAT_VERSION,
        "config": json.loads(config_lib.to_json(config_lib.base())),
        "cameras": {"front": [45, 80]},
        "low_dim": {"state": 7},
        "shapes": {"action": [16, 2]},
        "text_dim": 0,
        "robots": {
            "arm": {
                "parts": [
                    {"columns": "action[:1]", "transform": "gripper_scaled:-1:15", "width": 1},
                    {"columns": "action[1:]", "transform": "relative:state[5:6]:position", "width": 1},
                ],
                "states": {"state": 7},
            }
        },
        "normalizers": {"action": {"scale": [0.5, 2.0], "offset": [1.0, 0.0]}},
        "step": 20,
        "parameters": "average",
        "fingerprints": {"data": [{"fingerprint": "ab", "split": "train", "val_ratio": 0.1, "selection": ""}]},
    }


def test_a_description_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(_description()))
    found = description.read(tmp_path / "model.json", "--official-config")
    assert (found.step, found.parameters, found.config.model.depth) == (20, "average", config_lib.base().model.depth)
    spec = found.spec
    assert (spec.cameras, spec.low_dim, spec.action_dim) == ({"front": (45, 80)}, {"state": 7}, 2)
    assert spec.normalizer.entries["action"][0].tolist() == [0.5, 2.0]
    (robot,) = spec.robots.values()
    made = robot.to_robot(np.array([[0.25, 0.5]]), {"state": np.arange(7.0)})
    np.testing.assert_array_equal(made, [[3, 5.5]])
    old = _description()
    assert found.learned_from == old["fingerprints"]["data"]
    del old["robots"], old["fingerprints"]
    (tmp_path / "model.json").write_text(json.dumps(old))
    found = description.read(tmp_path / "model.json", "--official-config")
    assert (found.spec.robots, found.learned_from) == ({}, None)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (("cameras",), [3, "x", [], {}, None, {"front": 3}, {"front": [45]}, {"front": [45, 80, 3]}]),
        (("cameras", "front", 0), [-1, 0, 1.5, True, "4", None, INFINITE, 10**400]),
        (("low_dim",), [3, [1], None]),
        (("low_dim", "state"), [-1, 0, 1.5, "7", INFINITE, 10**400]),
        (("shapes", "action"), [None, [], [16, 0], [16, 1.5], [16, INFINITE]]),
        (("text_dim",), [-1, 1.5, True, None, INFINITE, 10**400]),
        (("normalizers", "action", "scale", 0), [None, "x", INFINITE, 10**400, {}]),
        (("normalizers", "action"), [3, None, {"scale": [1.0]}]),
        (("robots",), [3, None, {"arm": 3}, {"arm": {}}]),
        (("robots", "arm", "parts"), [3, None, [3], [], [{}]]),
        (("robots", "arm", "parts", 0, "transform"), ["none", "xyz_rpy_to_rot6d", None, 3, "gripper_scaled:1:1"]),
        (("robots", "arm", "parts", 0, "columns"), ["a[", None]),
        (("robots", "arm", "parts", 1, "transform"), ["relative:other:position", "relative:state:position"]),
        (("robots", "arm", "parts", 1, "width"), [0, -1, "x", None, INFINITE, 2]),
        (("robots", "arm", "states"), [{}, None, {"state": 3}, {"state": "x"}]),
        (("step",), [-1, 1.5, True, "20", None, INFINITE, 10**400]),
        (("parameters",), ["other", None, [1], 3]),
        (("fingerprints",), [3, None, [1]]),
        (("fingerprints", "data"), [3, [3], [{}], {"a": 1}]),
        (("fingerprints", "data", 0, "val_ratio"), [2.0, 1, "x", None, INFINITE]),
        (("fingerprints", "data", 0, "split"), [3, None]),
    ],
)
def test_values_that_no_run_has_are_refused(tmp_path: Path, field: tuple[str | int, ...], values: list[Any]) -> None:
    for value in values:
        stored = _description()
        place: Any = stored
        for part in field[:-1]:
            place = place[part]
        place[field[-1]] = value
        (tmp_path / "model.json").write_text(json.dumps(stored))
        with pytest.raises(UserError, match=r"model\.json: a field is missing or not as `convert to-torch` wrote it"):
            description.read(tmp_path / "model.json", "--official-config")
