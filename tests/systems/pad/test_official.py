"""Reading an official PAD run, and the errors where its configuration and tensors do not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.golden import reference
from uwm_jax.conversion.from_torch import read_official
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.official_config import OfficialRun
from uwm_jax.torch_bridge.official_yaml import OfficialYaml

NAME = "pad_libero_small"


@pytest.fixture
def read(tmp_path: Path):
    """(replacements of text, replacements of shapes) -> the run."""
    shapes = {name: x.shape for name, x in reference.weights(NAME).items()}

    def run(texts: dict[str, str] | None = None, changed: dict | None = None) -> OfficialRun:
        text = reference.official_yaml(NAME).read_text()
        for old, new in (texts or {}).items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "config.yaml").write_text(text)
        return read_official(OfficialYaml(tmp_path / "config.yaml"), {**shapes, **(changed or {})})

    return run


def test_the_run(read):
    found = read()
    c = found.config
    assert c.system == "pad" and not found.conflicts
    assert (c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.timestep_embed_dim) == (48, 2, 3, 32)
    assert c.data.window.obs == (0, 1) and c.data.window.action == tuple(range(1, 17))
    assert c.data.window.next_obs == (17, 18) and c.data.crop == (64, 64) and c.model.patch == (2, 4, 4)
    assert c.data.cameras == ("agentview_rgb", "eye_in_hand_rgb") and found.action_dim == 7 and not found.low_dim
    assert c.diffusion.clip.to_dict() == {"action": 1.0, "next_obs": 1.0}


def test_the_system_is_found_without_a_class(read):
    assert read({"_target_: models.pad.PAD\n": "_other_: 0\n"}).config.system == "pad"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"depth: 2": "depth: 3"}, "model.depth.*is 3, but the tensors say 2"),
        ({"timestep_embed_dim: 32": "timestep_embed_dim: 64"}, "timestep_embed_dim.*is 64, but the tensors say 32"),
        ({"- 2\n  - 4\n  - 4": "- 2\n  - 2\n  - 4"}, "model.latent_patch_shape"),
    ],
)
def test_conflicts_are_named(read, texts, words):
    assert re.search(words, "\n".join(read(texts).conflicts))


def test_unfit_patch_encoders_and_positions_are_named(read):
    patch, table = "noise_pred_net.obs_patchifier.patch_encoder.weight", "noise_pred_net.pos_embed"
    assert "reads 4 latent channels, but the VAE has 2 x 4" in read(changed={patch: (48, 4, 2, 4, 4)}).conflicts[0]
    assert "video tokens (8)" in read(changed={table: (1, 25, 48)}).conflicts[0]


def test_what_is_not_modelled_is_refused(read):
    with pytest.raises(UserError, match="imagenet_norm"):
        read({"imagenet_norm: false": "imagenet_norm: true"})
