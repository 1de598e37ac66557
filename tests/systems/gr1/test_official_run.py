"""Configurations of official GR1 runs, together with the shapes of their tensors."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.systems.gr1 import case
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.systems.gr1 import SYSTEM
from uwm_jax.torch_bridge.official_yaml import OfficialYaml

ENCODER = ("model", "obs_encoder")
RESAMPLER = (*ENCODER, "resampler_params")


@pytest.fixture
def read(tmp_path):
    """Reads a golden run, with fields of its YAML and shapes of its tensors replaced (None: left out)."""

    def read(name="gr1_tiny", fields=(), tensors=()):
        stored = yaml.safe_load(case.reference.official_yaml(name).read_text())
        for path, value in dict(fields).items():
            node = stored
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            if value is None:
                del node[path[-1]]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
        shapes = {n: s for n, s in (case.manifest(name) | dict(tensors)).items() if s is not None}
        return SYSTEM.official.read(OfficialYaml(tmp_path / "config.yaml"), shapes, config_lib.base("gr1"))

    return read


def test_the_small_vit_is_read_off_its_tensors(read):
    run = read()
    config_lib.validate(c := run.config)
    assert run.conflicts == () and (run.action_dim, run.low_dim, run.text_dim) == (7, {}, 0)
    assert run.cameras == {"agentview_rgb": (40, 40), "eye_in_hand_rgb": (40, 40)}
    assert c.model.encoder.to_dict() == {"patch": 16, "width": 128, "depth": 2, "mlp_dim": 256, "imagenet_weights": ""}
    assert c.model.resampler.to_dict() == {"depth": 2, "num_heads": 2, "head_dim": 32, "num_latents": 3}
    assert c.model.decoder.to_dict() == {"depth": 1, "num_heads": 4, "mlp_ratio": 4, "qkv_bias": True}
    assert (c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.patch) == (128, 3, 4, (16, 16))
    assert (c.data.resize, c.data.crop, c.data.augment.draw) == ((72, 72), (64, 64), "batch")
    assert (c.data.window.obs, c.data.window.next_obs) == ((0, 1), (17, 18))


def test_the_shipped_run_is_the_default_model(read):
    """The official fields are our defaults; the golden run has fewer layers."""
    c = read("gr1_small", {(*RESAMPLER, "num_media_embeds"): None, (*ENCODER, "imagenet_norm"): None}).config
    default = config_lib.base("gr1")
    assert (c.model.depth, c.model.resampler.depth, c.model.decoder.depth) == (2, 2, 1)
    for part in (c.model, c.model.resampler, c.model.decoder):
        part.depth = default.model.depth if part is c.model else 3
    assert c.model.to_dict() == default.model.to_dict()


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("model", "depth"), 4, "model.depth.* is 4, but the tensors say 3"),
        (("model", "embed_dim"), 64, r"model.embed_dim.* is 64, but the tensors say 128 \(action_queries"),
        (("model", "action_dim"), 6, "model.action_dim"),
        (("model", "decoder_depth"), 2, "model.decoder_depth.* is 2, but the tensors say 1"),
        (("model", "decoder_mlp_ratio"), 2, "decoder_blocks.0.mlp.fc1.weight"),
        (("model", "patch_size"), 32, "decoder_head.1.weight"),
        (("model", "image_size"), 32, r"is 32, but the encoder's crop is \(64, 64\)"),
        (("model", "qkv_bias"), False, "model.qkv_bias"),
        ((*RESAMPLER, "depth"), 3, "resampler_params.depth"),
        ((*RESAMPLER, "num_latents"), 4, "resampler_params.num_latents"),
        ((*RESAMPLER, "heads"), 3, "resampler_params.heads"),
        ((*RESAMPLER, "dim"), 64, r"the ViT's width as well\)"),
    ],
)
def test_fields_that_the_tensors_contradict_are_conflicts(read, path, value, words):
    fields = {path: value}
    if path == ("model", "action_dim"):
        fields |= {(*parent, "shape_meta", "action", "shape"): [6] for parent in (("dataset",), ENCODER)}
    conflicts = read(fields=fields).conflicts
    assert any(re.search(words, line) for line in conflicts), conflicts


@pytest.mark.parametrize(
    "path, value, words",
    [
        ((*ENCODER, "imagenet_norm"), False, "is false, which we do not model"),
        ((*RESAMPLER, "num_media_embeds"), 2, "is 2, which we do not model"),
        (("model", "num_heads"), "four", "should be an integer, found 'four'"),
        (("num_frames",), 18, "the model predicts as many frames as it sees"),
    ],
)
def test_what_is_not_modelled_is_refused(read, path, value, words):
    with pytest.raises(UserError, match=words):
        read(fields={path: value})


def test_other_tensors_are_refused(read):
    with pytest.raises(UserError, match="such as action_queries and obs_encoder.img_encoder.model.class_token"):
        read(tensors={name: None for name in case.manifest("gr1_tiny") if ".model." in name})
