from __future__ import annotations

import pytest

from uwm_jax.config import base, flatten
from uwm_jax.errors import UserError
from uwm_jax.sweeps import members


def names(made):
    return [member.name for member in made]


def test_a_grid_has_all_combinations_under_short_names():
    made = members.make_members(base(), members.parse_grid(["loss.weights.action=1,5", "seed=0,1"]))
    assert names(made) == ["action=1,seed=0", "action=1,seed=1", "action=5,seed=0", "action=5,seed=1"]
    assert made[2].overrides == {"loss.weights.action": 5.0, "seed": 0}
    assert made[3].config.loss.weights.action == 5.0 and made[3].config.seed == 1
    assert members.grid({"a": (1, 2), "b": (3,)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_names_are_as_long_as_they_must_be():
    assert members._short_names(["data.seed", "seed", "model.dtype", "model.codec.dtype"]) == {
        "data.seed": "data.seed",
        "seed": "seed",
        "model.dtype": "model.dtype",
        "model.codec.dtype": "codec.dtype",
    }
    assert [members._text(x) for x in (3e-4, 1.0, "a/b c", "")] == ["0.0003", "1", "a_b_c", "none"]
    assert members._text(1.0000001) == "1.0000001", "or it would be the name of 1"


def test_members_see_the_data_of_the_base_config():
    config = base()
    config.seed = 7
    made = members.make_members(config, [{"seed": 1}, {"seed": 2}])
    assert [(m.config.seed, m.config.data.seed) for m in made] == [(1, 7), (2, 7)]
    config.data.seed = 3
    assert members.make_members(config, [{"seed": 1}])[0].config.data.seed == 3
    own = members.make_members(config, members.grid({"data.seed": (-1,), "seed": (1, 2)}))
    assert [m.config.data.seed for m in own] == [1, 2] and len(members.groups(own)) == 2
    assert config.seed == 7 and flatten(config)["data.seed"] == 3


def test_members_that_differ_in_scalars_share_a_program():
    grid = ["optimizer.learning_rate=1e-4,1e-3", "model.depth=2,4", "loss.weights.next_obs=1"]
    groups = members.groups(members.make_members(base(), members.parse_grid(grid)))
    assert [[m.config.model.depth for m in group] for group in groups] == [[2, 2], [4, 4]]
    text = members.describe(groups)
    assert text.startswith("4 members in 2 program(s)") and "learning_rate=0.001,depth=4,next_obs=1" in text
    longer = members.make_members(base(), [{"total_steps": 10}, {"total_steps": 20}, {"data.seed": 5}])
    assert [len(group) for group in members.groups(longer)] == [1, 1, 1]


@pytest.mark.parametrize(
    "grid, message",
    [
        (["seed"], "--grid=seed: expected FIELD=V1,V2"),
        (["seed=1,"], "expected FIELD=V1,V2"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["seed=1,1"], "2 members 'seed=1'"),
        (["sed=1"], "there is no such field"),
        (["seed=x"], "expected an integer"),
        (["data.cameras=a,b"], "a list cannot be varied by a flag"),
        (["batch_size=0,4"], "at least 1"),
    ],
)
def test_what_is_no_grid_is_refused(grid, message):
    with pytest.raises(UserError, match=message):
        members.make_members(base(), members.parse_grid(grid))


def test_names_that_are_equal_or_too_long_are_refused_with_what_makes_them():
    with pytest.raises(UserError, match=r"share the folder 'path=a_b': {'data.path': 'a/b'} and {'data.path': 'a_b'}"):
        members.make_members(base(), [{"data.path": "a/b"}, {"data.path": "a_b"}])
    members.make_members(base(), [{"data.path": "x" * 250}])
    with pytest.raises(UserError, match=r"1 fields to values that make a name of 256 bytes, 'path=xxx.* at most 255"):
        members.make_members(base(), [{"data.path": "x" * 251}])


def test_a_grid_of_a_file_that_names_its_members_is_refused(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text("def get_members():\n    return [{'seed': 3}]\n")
    assert members.asked_for(str(file), None) == [{"seed": 3}]
    with pytest.raises(UserError, match=r"--grid: .*sweep.py names its members itself, in get_members\(\)"):
        members.asked_for(f"{file}:x", ["seed=0,1"])
    file.write_text("")
    assert members.asked_for(str(file), ["seed=0,1"]) == [{"seed": "0"}, {"seed": "1"}]


def test_members_of_a_file(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text("def get_members(n='2'):\n    return [{'seed': i} for i in range(int(n))]\n")
    assert members.read_members(str(file)) == [{"seed": 0}, {"seed": 1}]
    assert members.read_members(f"{file}:1") == [{"seed": 0}]
    file.write_text("def get_members():\n    return {}\n")
    with pytest.raises(UserError, match="get_members of .* returned {}, expected a file with get_members"):
        members.read_members(str(file))
    file.write_text("")
    with pytest.raises(UserError, match="any other file needs --grid"):
        members.read_members(str(file))
