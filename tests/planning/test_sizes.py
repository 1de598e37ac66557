"""Sizes of data: a dataset's before those of a config file, and what nothing states is asked for by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.planning import sizes
from uwm_jax.training import codec_store

CONFIGS = Path(__file__).parents[2] / "configs"
DROID = str(CONFIGS / "droid.py")


@pytest.fixture(autouse=True)
def no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path))


def test_a_config_file_states_true_sizes():
    found = sizes.of_data(config_lib.load(DROID), DROID)
    assert found.spec.cameras == dict.fromkeys(found.spec.cameras, (180, 320)) and len(found.spec.cameras) == 3
    assert found.spec.action_dim == 10  # 6 numbers whose Euler angles become 6-d rotations, and the gripper
    assert (found.arrays, found.origin) == (None, f"data_sizes() of {DROID}")


def test_keys_that_the_command_line_adds_have_sizes_too():
    overrides = [("data.low_dim", "gripper_position,joint_position"), ("data.text", "language_embedding")]
    spec = sizes.of_data(config_lib.load(DROID, overrides), DROID).spec
    assert spec.low_dim == {"gripper_position": 1, "joint_position": 7} and spec.text_dim == 512


def test_what_is_missing_is_asked_for_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from uwm_jax.config import base as get_config\n")
    overrides = [("data.cameras", "top"), ("data.low_dim", "pose"), ("data.text", "words")]
    config = config_lib.load(str(file), overrides)
    wanted = r"--sizes=top=180x320,pose=7,words=7,action=7 \(sizes are examples\)"
    with pytest.raises(UserError, match=f"4 key.*no dataset at {tmp_path}/droid.*data_sizes.*{wanted}"):
        sizes.of_data(config, str(file))
    given = ["top=90x160", "pose=6", "words=512", "action=4"]
    spec = sizes.of_data(config, str(file), given).spec
    assert spec.cameras == {"top": (90, 160)} and spec.low_dim == {"pose": 6}
    assert (spec.text_dim, spec.action_dim) == (512, 4)


def test_columns_and_relative_actions_have_the_widths_of_their_transforms() -> None:
    c = config_lib.load(DROID, [("data.action", "bridge")])
    assert sizes.of_data(c, DROID, ["action=7"]).spec.action_dim == 10
    c.data.action = (("action[:6]", "relative:cartesian_position:rpy"), ("action", "identity"))
    assert sizes.of_data(c, DROID, ["action=7"]).spec.action_dim == 16
    with pytest.raises(UserError, match=r"action\[:6\] takes columns that 'action', of 5 numbers, does not have"):
        sizes.of_data(c, DROID, ["action=5"])


def test_a_choice_has_the_size_of_its_first_key() -> None:
    c = config_lib.load(DROID)
    c.data.cameras = ("exterior", "wrist_image_left")
    c.data.choices = {"exterior": ("exterior_image_1_left", "exterior_image_2_left")}
    assert sizes.of_data(c, DROID).spec.cameras == {"exterior": (180, 320), "wrist_image_left": (180, 320)}


@pytest.mark.parametrize("size", [(96,), "180x320", 96, (96, 0), (96, 96.0)])
def test_data_sizes_of_another_type_are_refused(tmp_path, size):
    file = tmp_path / "mine.py"
    stated = f"def data_sizes():\n    return {{'top': {size!r}, 'action': 7}}\n"
    file.write_text(f"from uwm_jax.config import base as get_config\n\n{stated}")
    config = config_lib.load(str(file), [("data.cameras", "top")])
    with pytest.raises(UserError, match=r"top: expected \(height, width\) of at least 1, found .* of .*mine.py"):
        sizes.of_data(config, str(file))


def test_sizes_of_keys_that_are_not_read_are_refused():
    with pytest.raises(UserError, match="the config reads no 'wirst_image_left'.*Did you mean wrist_image_left"):
        sizes.of_data(config_lib.load(DROID), DROID, ["wirst_image_left=180x320"])


@pytest.mark.parametrize(
    "given",
    ["wrist_image_left=7", "wrist_image_left", "=7", "action_dict/gripper_position=2x3", "wrist_image_left=0x320"],
)
def test_sizes_of_another_form_are_refused(given):
    with pytest.raises(UserError, match="expected"):
        sizes.of_data(config_lib.load(DROID), DROID, [given])


def test_the_dataset_counts_where_it_is_present(make_tiny_config, tmp_path):
    config = make_tiny_config()
    data = RunData(config.data, seed=0)
    codec, frozen = codec_store.open_codec(config, codec_store.in_dataset(config, data))
    found = sizes.of_data(config, "none.py")
    like, expected = found.spec.batch_like(4), data.spec.batch_like(4)
    data.close()
    assert like == expected and found.origin == f"the dataset {config.data.path}"
    assert found.arrays == {name: x.shape for name, x in frozen.items()} and codec is not None
    with pytest.raises(UserError, match="--sizes states sizes of data that are not there, but .* is present"):
        sizes.of_data(config, "none.py", ["wrist=180x320"])
    assert found.arrays["components"] == np.shape(frozen["components"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_states_the_sizes_of_its_data(path):
    spec = sizes.of_data(config_lib.load(str(path)), str(path)).spec
    assert spec.cameras and spec.action_dim
