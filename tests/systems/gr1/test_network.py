"""GR1's network against published numbers and those of the official classes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.gr1 import case
from uwm_jax.data.images import preprocess
from uwm_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from uwm_jax.systems.gr1 import official
from uwm_jax.torch_bridge import layout

BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def test_published_predictions_of_given_tokens():
    """The whole model after the encoder: 2 views, 2 frames, 3 tokens per frame."""
    model = case.model_fields(
        embed_dim=32, patch=(8, 8), depth=2, num_heads=4, decoder_depth=1, decoder_num_heads=2,
        encoder_patch=8, encoder_width=64, encoder_depth=1, encoder_mlp_dim=8, resampler_num_latents=2,
    )  # fmt: skip
    network, shapes = case.build(model, action_dim=3, views=2, size=16, action_len=4)
    entry_of = official.entry_of(8, (8, 8))
    order = ["action_queries", "obs_queries", "decoder_query_token", "decoder_pos_embed"]
    for block in ("transformer.0", "transformer.1"):
        order += [f"{block}.{name}.{leaf}" for name in BLOCK for leaf in ("weight", "bias")]
    order += [f"action_head.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")]
    order += [f"decoder_proj.{leaf}" for leaf in ("weight", "bias")]
    order += [f"decoder_blocks.0.{name}.{leaf}" for name in BLOCK for leaf in ("weight", "bias")]
    order += [f"decoder_head.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]
    names = case.official_names(shapes, entry_of)
    tensors = case.numbered([(name, names[name]) for name in order], norms=("norm", "decoder_head.0"))
    assert len(tensors) == 52
    tensors["decoder_pos_embed"] = np.asarray(network.decoder.table())[None]
    rest = {name: np.zeros(shape, np.float32) for name, shape in names.items() if name not in tensors}
    params = layout.from_official(tensors | rest, shapes, entry_of, "x")
    made = jax.jit(partial(network.apply, method="predict"))({"params": params}, case.inputs((2, 12, 32), 1006))
    case.check(
        np.moveaxis(made["next_obs"], -1, 2),
        mean=0.0181004,
        std=0.3142054,
        first=[-0.297613, 0.096944, -0.214388, -0.209379, -0.407099],
        last=[0.158626, 0.236171, 0.466635],
    )
    case.check(
        made["action"],
        mean=0.0152003,
        std=0.0201107,
        first=[-0.009899, 0.03817, 0.017746, -0.010902, 0.03855],
        last=[-0.010263, 0.038927, 0.017623],
    )


class Golden:
    """An official network, its inputs, and what it makes of them (`tests/golden`)."""

    def __init__(self, name: str):
        fields, (size, patch) = ({}, (64, 16)) if name == "gr1_tiny" else (case.SMALL, (224, 32))
        self.numbers = case.reference.numbers(name)
        self.network, shapes = case.build(case.model_fields(**fields), action_dim=7, views=2, size=size)
        self.entry_of = official.entry_of(patch, (patch, patch))
        self.params = layout.from_official(case.reference.weights(name), shapes, self.entry_of, name)
        cameras = ("agentview_rgb", "eye_in_hand_rgb")
        current, following = (
            {c: jnp.asarray(self.numbers[f"{group}/{c}"]) for c in cameras} for group in ("obs", "next_obs")
        )
        resize = {64: 72, 224: 240}[size]
        images = preprocess(current, following, resize=(resize, resize), crop=(size, size))
        self.current, self.target = ((x - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD) for x in images)
        self.action = jnp.asarray(self.numbers["action_normalized"])

    def compare(self, key: str, found, atol: float, rtol: float = 0.0) -> None:
        """`found` next to the array `key`, of which every fifth pixel may be stored; images are channels-last."""
        if np.ndim(found) == 6:
            found = np.moveaxis(found, -1, 2)
        expected = self.numbers.get(key)
        if expected is None:
            expected, found = self.numbers[f"{key}_s5"], found[..., ::5, ::5]
        np.testing.assert_allclose(found, expected, atol=atol, rtol=rtol, err_msg=key)

    def losses(self, params, action_mask):
        """Sum of the losses; all that the set holds but gradients."""
        tokens = self.network.apply({"params": params}, self.current, method="encode")
        made = self.network.apply({"params": params}, tokens, action_mask, method="predict")
        errors = jnp.mean((made["action"] - self.action) ** 2, axis=(1, 2))
        action = (errors * action_mask).sum() / action_mask.sum()
        next_obs = jnp.mean((made["next_obs"] - self.target) ** 2)
        return action + next_obs, {"obs_tokens": tokens, **made, "loss/action": action, "loss/next_obs": next_obs}

    def check(self) -> None:
        one = {"atol": 2e-5, "rtol": 2e-5}
        self.compare("enc/next_imgs", self.target, **one)
        evaluate = jax.jit(jax.value_and_grad(self.losses, has_aux=True))
        for prefix, mask in (("", np.ones(2, bool)), ("masked/", self.numbers["action_mask"])):
            with jax.default_matmul_precision("highest"):
                (_, found), gradients = evaluate(self.params, mask)
            sampled = prefix or "joint/"
            self.compare(f"{sampled}action_normalized", found["action"], 2e-5 if prefix else 1e-4)
            rows = slice(1, 2) if prefix else slice(None)
            self.compare(f"{sampled}next_obs_image", found["next_obs"][rows], 2e-5, 2e-5)
            for key in ("loss/action", "loss/next_obs"):
                self.compare(f"{prefix}{key}", found[key], **one)
            if not prefix:
                self.compare("obs_tokens", found["obs_tokens"], **one)
            gradients = layout.to_official(gradients, self.entry_of)
            keys = [key for key in self.numbers if key.startswith(f"{prefix}grad/")]
            assert len(keys) == (4 if prefix else 12)
            for key in keys:
                largest = np.abs(self.numbers[key]).max()
                self.compare(key, gradients[key.removeprefix(f"{prefix}grad/")], 1e-3 * largest)
            for name in ("decoder_pos_embed", "obs_encoder.img_encoder.model.heads.weight"):
                assert not gradients[name].any(), name


@pytest.mark.slow
def test_official_numbers():
    Golden("gr1_tiny").check()


@pytest.mark.slow
def test_official_numbers_at_full_width():
    Golden("gr1_small").check()


def test_hidden_actions_change_no_frame():
    """Frames of masked rows do not depend on the action queries; those of other rows do."""
    network, shapes = case.build(
        case.model_fields(embed_dim=16, depth=2, decoder_num_heads=2, encoder_width=64), 3, views=1, size=32
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape).astype(np.float32)), shapes)
    tokens = jnp.asarray(rng.normal(size=(2, 8, 16)).astype(np.float32))
    predict = jax.jit(partial(network.apply, method="predict"))
    mask = jnp.array([True, False])
    before = predict({"params": params}, tokens, mask)
    after = predict({"params": {**params, "action_queries": params["action_queries"][..., ::-1]}}, tokens, mask)
    np.testing.assert_array_equal(before["next_obs"][1], after["next_obs"][1])
    assert np.abs(before["next_obs"][0] - after["next_obs"][0]).max() > 1e-3
    unmasked = predict({"params": params}, tokens)
    np.testing.assert_allclose(before["next_obs"][0], unmasked["next_obs"][0], atol=1e-5)
    assert np.abs(before["next_obs"][1] - unmasked["next_obs"][1]).max() > 1e-3


@pytest.mark.slow
def test_initialisation():
    network, _ = case.build(case.model_fields(), action_dim=7, views=2, size=64)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 64, 64, 3)))["params"]
    expected = case.reference.numbers("gr1_tiny")["const/decoder_pos_embed"]
    np.testing.assert_allclose(params["decoder"]["pos_embed"], expected, atol=1e-6)
    for name in ("pos_scale", "pos_shift"):
        assert not params["obs_encoder"][name].any()
    assert not params["decoder"]["query_token"].any()
    blocks = params["transformer"]["blocks"]
    for kernel in (params["action_queries"], params["obs_queries"], *(blocks[n]["kernel"] for n in ("qkv", "fc1"))):
        assert abs(kernel.std() / 0.02 - 1) < 5 / np.sqrt(kernel.size) and not blocks["qkv"]["bias"].any()
    assert not np.array_equal(blocks["qkv"]["kernel"][0], blocks["qkv"]["kernel"][1])
    for layer, inputs in (
        (params["decoder"]["layers"]["blocks"]["fc2"], 512),
        (params["decoder"]["head"], 128),
        (params["action_head"]["fc3"], 64),
        (params["obs_encoder"]["feat_head"], 128),
    ):  # torch's default
        bound = 1 / np.sqrt(inputs)
        assert 0.9 * bound < jnp.abs(layer["kernel"]).max() <= bound
        assert 0 < jnp.abs(layer["bias"]).max() <= bound
