"""Diffusion Policy's config fields: their checks, and the lines about fields without effect."""

from __future__ import annotations

import pytest

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.systems.dp.config import remarks


def changed(*pairs: tuple[str, str]):
    config = config_lib.base("dp")
    config_lib.apply_overrides(config, pairs)
    return config


def test_it_reads_no_later_frame_and_has_no_codec():
    config = changed()
    config_lib.validate(config)
    assert config.data.window.next_obs == () and "codec" not in config.model
    assert config.loss.weights.to_dict() == {"action": 1.0}


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([("model.predictor", "mlp")], "config.model.predictor"),
        ([("diffusion.kind", "ddpm")], "config.diffusion.kind"),
        ([("model.num_heads", "7")], "config.model.num_heads=7 does not divide config.model.embed_dim=768"),
        ([("data.window.next_obs", "17,18")], "config.system='dp' reads no next_obs"),
        ([("diffusion.timeshift", "0")], "config.diffusion.timeshift: expected a positive number, found 0"),
        ([("diffusion.num_train_noise_samples", "0")], "config.diffusion.num_train_noise_samples"),
        ([("model.predictor", "unet"), ("model.unet.down_dims", "60,128")], "multiples of .*groups=8"),
        ([("model.predictor", "unet"), ("model.unet.down_dims", "64")], "at least two multiples"),
        (
            [("model.predictor", "unet"), ("model.unet.groups", "4"), ("model.unet.down_dims", "12,16")],
            "a multiple of 8, the groups of the last normalisation",
        ),
        (
            [("model.predictor", "unet"), ("data.window.action", "1,2,3,4,5,6")],
            "config.data.window.action has 6 steps; .* expected a multiple of 4",
        ),
        ([("model.predictor", "unet"), ("model.unet.kernel_size", "4")], "expected an odd number, found 4"),
    ],
)
def test_unusable_values_are_named(pairs, words):
    with pytest.raises(UserError, match=words):
        config_lib.validate(changed(*pairs))


def test_rows_without_actions_are_refused():
    config = changed()
    config.data.sources.robot = config_lib.source()
    config_lib.validate(config)
    config.data.sources.clips = config_lib.source(use_actions=False)
    with pytest.raises(UserError, match="config.data.sources.clips.use_actions=False: a dp run learns from actions"):
        config_lib.validate(config)


def test_fields_without_effect_are_told():
    assert remarks(changed()) == []
    assert remarks(changed(("model.predictor", "unet"), ("diffusion.kind", "flow"))) == []
    lines = remarks(changed(("model.depth", "6"), ("diffusion.timeshift", "3"), ("model.unet.groups", "4")))
    assert lines == [
        "config.model.unet.groups=4 has no effect: config.model.predictor is not unet.",
        "config.diffusion.timeshift=3.0 has no effect: config.diffusion.kind is not flow.",
    ]
    config = changed(("model.predictor", "unet"), ("model.depth", "6"), ("diffusion.kind", "flow"))
    config.diffusion.prediction.action = "sample"
    assert remarks(config) == [
        "config.model.depth=6 has no effect: config.model.predictor is not transformer.",
        "config.diffusion.prediction.action=sample has no effect: config.diffusion.kind is not ddim.",
    ]


def test_fields_without_effect_may_differ_when_a_run_continues():
    before, now = changed(("model.predictor", "unet")), changed(("model.predictor", "unet"), ("model.depth", "6"))
    config_lib.refuse_changed(now, before)
    with pytest.raises(UserError, match="model.depth"):
        config_lib.refuse_changed(changed(("model.depth", "6")), changed())
