"""Cameras and texts that are drawn for each sample from several keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data import loader_case as case
from uwm_jax import config as config_lib
from uwm_jax import config_help
from uwm_jax.config import base, source
from uwm_jax.data.choices import keys_of, pick
from uwm_jax.data.order import mix
from uwm_jax.data.samples import cover
from uwm_jax.data.sources import keys_read
from uwm_jax.errors import UserError

made, config, open_loader, take = case.made, case.config, case.open_loader, case.take


def test_draws_are_even_independent_and_a_function_of_the_samples_bits() -> None:
    draws = [mix(i) for i in range(3000)]
    first, second = ([pick((0, 1, 2), name, draw) for draw in draws] for name in ("exterior", "text"))
    for drawn in (first, second):
        assert np.abs(np.bincount(drawn) - 1000).max() < 100  # four standard deviations
    pairs = np.bincount(3 * np.array(first) + second, minlength=9)
    assert np.abs(pairs - 3000 / 9).max() < 75
    assert first == [pick((0, 1, 2), "exterior", draw) for draw in draws]
    assert pick(("a", "b"), "exterior", None) == pick(("a",), "exterior", 5) == "a"


def test_a_sources_choice_is_in_place_of_the_runs() -> None:
    assert keys_of("x", {"x": ["a", "b"]}, {"y": ("c",)}) == ("a", "b")
    assert keys_of("x", {"x": ("a", "b")}, {"x": ("c",)}) == ("c",)
    assert keys_of("z", {"x": ("a", "b")}, {}) == ("z",)


def test_a_sample_shows_one_of_the_keys_in_all_its_frames(config: ConfigDict) -> None:
    config.val_ratio = 0.3
    plain = open_loader(config)
    config.cameras, config.choices = ("any", "exterior"), {"any": ("wrist", "exterior")}
    loader = open_loader(config)
    like = loader.data.spec.observation_like(1)
    assert like["any"].shape == (1, 16, 16, 3) and "wrist" not in like  # the size of the first; a policy gives `any`
    batches = take(loader, 6)
    shown = []
    for batch, before in zip(batches, take(plain, 6), strict=True):
        assert before.keys() - batch.keys() == {"obs/wrist", "next_obs/wrist"}
        for key in batch.keys() & before.keys():
            np.testing.assert_array_equal(batch[key], before[key])
        for row in range(8):
            of_key = {
                "wrist": [before[f"{group}/wrist"][row] for group in ("obs", "next_obs")],
                "exterior": [[cover(f, (16, 16)) for f in before[f"{g}/exterior"][row]] for g in ("obs", "next_obs")],
            }
            found = [batch[f"{group}/any"][row] for group in ("obs", "next_obs")]
            shown += [key for key, frames in of_key.items() if np.array_equal(found, frames)]
    assert len(shown) == 48 and 12 < shown.count("wrist") < 36
    # The rows of two processes are those of one.
    for index in range(2):
        for batch, part in zip(
            batches, take(open_loader(config, process_index=index, process_count=2), 3), strict=False
        ):
            np.testing.assert_array_equal(part["obs/any"], batch["obs/any"][index::2])
    # Held-out windows show the first.
    held_out, before = (x.data.held_out(6).batch(0, 6) for x in (loader, plain))
    np.testing.assert_array_equal(held_out["obs/any"], before["obs/wrist"])
    np.testing.assert_array_equal(held_out["next_obs/any"], before["next_obs/wrist"])


def test_a_source_has_choices_of_its_own(config: ConfigDict) -> None:
    config.cameras, config.choices = ("any", "wrist"), {"any": ("wrist", "exterior")}
    config.sources.a = source(choices={"any": ("exterior",)})
    config.sources.b = source(cameras=("other", "wrist"), choices={"other": ("wrist",)})
    loader = open_loader(config)
    keys = {name: s.samples.camera_keys["any"] for name, s in loader.data.sources.items()}
    assert keys == {"a": "observation/exterior", "b": "observation/wrist"}
    assert keys_read(config)["cameras"] == {
        "data.cameras": ["exterior", "wrist"],
        "data.sources.b.cameras": ["wrist", "wrist"],
    }
    del config.sources["b"]
    config.sources.a.choices = ConfigDict()
    assert keys_read(config)["cameras"] == {"data.cameras": ["wrist or exterior", "wrist"]}
    config.sources.a.choices = {"any": ("exterior", "front")}
    with pytest.raises(UserError, match="no camera 'front'; it has: observation/exterior, observation/wrist"):
        open_loader(config)


def test_texts_are_chosen_likewise(config: ConfigDict) -> None:
    config.val_ratio, config.text = 0.3, "said"
    config.choices = {"said": ("reward", "gripper")}  # any vectors of one width
    loader = open_loader(config)
    dataset = loader.data.sources[loader.data.directory.name].dataset
    columns = [dataset.column(key).reshape(-1) for key in ("reward", "gripper")]
    shown = []
    for step, batch in enumerate(take(loader, 4)):
        for row in range(8):
            trace = loader.describe(step * 8 + row)
            at = dataset.episode_starts[trace.episode] + trace.origin + 1
            shown.append([batch["obs/text"][row, 0] == column[at] for column in columns])
    assert np.sum(shown, axis=1).tolist() == [1] * 32 and 6 < np.sum(shown, axis=0)[0] < 26
    windows = loader.data.held_out(5)
    at = dataset.episode_starts[windows.episodes] + windows.origins + 1
    np.testing.assert_array_equal(windows.batch(0, 5)["obs/text"][:, 0], columns[0][at])
    config.choices = {"said": ("embedding", "gripper")}
    with pytest.raises(UserError, match="said: observation/gripper has 1 numbers in .*but embedding has 300"):
        open_loader(config)


def test_a_config_file_may_list_the_keys_of_a_choice(tmp_path: Path) -> None:
    text = """
from uwm_jax.config import base, source
def get_config(name="any"):
    c = base()
    c.data.cameras, c.data.choices = (name,), {name: ["a", "b"]}
    c.data.path, c.data.sources.x = "", source(path="x", choices={name: ["c"]})
    return c
"""
    (file := tmp_path / "chosen.py").write_text(text)
    c = config_lib.load(str(file))
    assert (c.data.choices.any, c.data.sources.x.choices.any) == (("a", "b"), ("c",))
    with pytest.raises(UserError, match=r"config\.data\.choices\.a-b: expected a name of letters, digits and undersc"):
        config_lib.load(f"{file}:a-b")


def test_choices_are_config_fields_by_name() -> None:
    c = base()
    c.data.cameras, c.data.choices = ("exterior", "wrist"), {"exterior": ("a", "b")}
    c.data.path, c.data.sources.x = "", source(path="x", choices={"wrist": ("w", "v")})
    config_lib.apply_overrides(c, [("data.choices.exterior", "c,d"), ("data.sources.x.choices.exterior", "e")])
    config_lib.validate(c)
    assert (c.data.choices.exterior, c.data.sources.x.choices.exterior) == (("c", "d"), ("e",))
    again = config_lib.from_json(config_lib.to_json(c), "config.json")
    assert config_lib.flatten(again) == config_lib.flatten(c)
    stored = json.loads(config_lib.to_json(c))
    with pytest.raises(
        UserError, match=r"config\.json: config\.data\.choices\.exterior: expected at least one key, ea"
    ):
        config_lib.from_dict({**stored, "data": {**stored["data"], "choices": {"exterior": ["a", "a"]}}}, "config.json")
    with pytest.raises(UserError, match=r"data\.sources\.x\.choices\.top is used by none of config\.data\.cameras=\("):
        config_lib.apply_overrides(c, [("data.sources.x.choices.top", "a")])
        config_lib.validate(c)
    c.data.sources.x.choices, c.data.sources.x.cameras = {"exterior": ("e",)}, ("front", "side")
    with pytest.raises(
        UserError, match=r"x\.choices\.exterior is used by none of config\.data\.sources\.x\.cameras=\("
    ):
        config_lib.validate(c)
    help_lines = config_help.describe("", [("data.cameras", "exterior"), ("data.choices.exterior", "a,b")])
    at = help_lines.index("  data.choices.exterior = ('a', 'b')")
    assert "drawn for each sample" in " ".join(map(str.strip, help_lines[at + 1 : at + 3]))
    assert "  data.sources.NAME.choices = {}" in help_lines
    with pytest.raises(UserError, match=r"--config\.data\.choices\.a\.b: there is no such field"):
        config_lib.apply_overrides(c, [("data.choices.a.b", "c")])
