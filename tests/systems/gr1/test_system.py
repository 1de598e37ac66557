"""GR1 as a system: what it makes of a batch, its losses without actions, and what it says of its parameters."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.models import layers
from uwm_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.systems.gr1 import official
from uwm_jax.torch_bridge import layout, torchvision_vit
from uwm_jax.training import pretrained
from uwm_jax.training import state as state_lib
from uwm_jax.training.build import build

MEAN, STD = np.array([IMAGENET_MEAN, IMAGENET_STD], np.float32)
CAMERAS = {"front": (12, 16), "wrist": (16, 20)}


def tiny_config():
    c = config_lib.base("gr1")
    c.model.update(embed_dim=16, depth=2, num_heads=2, patch=(8, 4), mlp_ratio=3)
    c.model.encoder.update(patch=8, width=64, depth=2, mlp_dim=24)
    c.model.resampler.update(num_latents=2, depth=2, num_heads=2, head_dim=12)
    c.model.decoder.update(depth=2, num_heads=4, mlp_ratio=2)
    c.data.cameras = tuple(CAMERAS)
    c.data.resize, c.data.crop = (18, 18), (16, 16)
    c.data.window.action, c.data.window.next_obs = (1, 2, 3), (4, 5)
    return c


def make(config):
    spec = DataSpec(WindowSpec.from_config(config.data.window), CAMERAS, {}, 5, 0, Normalizer({}))
    return systems.make(config, spec)


@pytest.fixture(scope="module")
def system():
    config_lib.validate(config := tiny_config())
    return make(config)


@pytest.fixture(scope="module")
def params(system):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape).astype(np.float32)), shapes)


@pytest.fixture(scope="module")
def batch(system):
    rng = np.random.default_rng(1)
    made = {}
    for key, like in system.spec.batch_like(4).items():
        drawn = rng.integers(0, 256, like.shape) if like.dtype == np.uint8 else rng.normal(size=like.shape)
        made[key] = jnp.asarray(drawn.astype(like.dtype))
    return made | {"action_mask": jnp.array([True, False, True, False]), "row": jnp.arange(4, dtype=jnp.int32)}


def test_images_are_normalised_and_augmented_row_by_row(system, batch):
    encode = jax.jit(partial(system.encode, {}))
    plain = encode(batch)
    assert plain["images"].shape == plain["next_images"].shape == (4, 2, 2, 16, 16, 3)
    current, following = system.images(batch)
    np.testing.assert_allclose(plain["images"] * STD + MEAN, current, atol=1e-6)
    np.testing.assert_allclose(plain["next_images"] * STD + MEAN, following, atol=1e-6)
    key = jax.random.key(3)
    augmented, part = encode(batch, key), encode({k: v[2:] for k, v in batch.items()}, key)
    assert np.abs(augmented["images"] - plain["images"]).max() > 0.1
    for name in ("images", "next_images"):
        np.testing.assert_allclose(augmented[name][2:], part[name], atol=1e-6)
    assert "next_images" not in encode({k: v for k, v in batch.items() if not k.startswith("next_obs/")})


def test_rows_without_actions_train_the_frames_alone(system, params, batch):
    @jax.jit
    def evaluate(params, batch):
        def loss(params):
            losses = system.losses(params, system.encode({}, batch), {})
            shares = system.shares(batch, jax.random.key(0))
            sums = {part: (shares[part] * losses.parts[part]).sum() for part in shares}
            return sum(sums.values()), (sums, shares, losses.parts)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (sums, shares, parts) = evaluate(params, batch)
    np.testing.assert_allclose(shares["action"], [0.5, 0, 0.5, 0])
    np.testing.assert_allclose(shares["next_obs"], [0.25] * 4)
    np.testing.assert_allclose(sums["action"], (parts["action"][0] + parts["action"][2]) / 2, rtol=1e-6)
    assert np.abs(gradients["action_head"]["fc3"]["kernel"]).max() > 0

    other = batch | {"action": batch["action"].at[1::2].set(7.0)}  # what stands there in place of actions
    gradients_of_other, (sums_of_other, *_) = evaluate(params, other)
    jax.tree.map(np.testing.assert_array_equal, sums_of_other, sums)
    jax.tree.map(np.testing.assert_array_equal, gradients_of_other, gradients)

    gradients, (sums, shares, _) = evaluate(params, batch | {"action_mask": jnp.zeros(4, bool)})
    assert sums["action"] == 0 and sums["next_obs"] > 0 and not shares["action"].any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert not any(g.any() for g in jax.tree.leaves((gradients["action_head"], gradients["action_queries"])))
    assert np.abs(gradients["transformer"]["blocks"]["qkv"]["kernel"]).max() > 0


def test_samples_are_the_predictions_in_units_of_images(system, params, batch):
    encoded = jax.jit(partial(system.encode, {}))({k: v for k, v in batch.items() if k.startswith("obs/")})
    assert set(encoded) == {"images"} and system.noise(jax.random.key(0), batch["row"], "joint") == {}
    made = jax.jit(partial(system.sample, use="joint", noise={}))(params, encoded)
    predicted, _ = jax.jit(system.predict)(params, encoded)
    assert made["action"].shape == (4, 3, 5)
    np.testing.assert_allclose(made["action"], predicted["action"], atol=1e-6)
    frames = system.frames({}, made)
    np.testing.assert_allclose((frames - MEAN) / STD, predicted["next_obs"], atol=1e-4)
    traced = jax.eval_shape(partial(system.sample, use="joint", noise={}, trace=True), params, encoded)
    assert {name: x.shape for name, x in traced.items()} == {name: (1, *x.shape) for name, x in made.items()}


def test_fields_come_from_the_config():
    config = tiny_config()
    config.model.update(scan_blocks=True, remat="dots", dtype="bfloat16")
    network = make(config).network
    stacks = [network.transformer, network.decoder, network.obs_encoder.vit, network.obs_encoder.resampler]
    assert all(part.scan and part.remat == "dots" for part in stacks)
    dtypes = {part.dtype for part in (*stacks[1:], network.transformer.layer, network.decoder.layer)}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert (network.decoder.patch, network.decoder.layer.num_heads, network.transformer.depth) == ((8, 4), 4, 2)


def test_imagenet_weights_enter_the_vit_alone(params, tmp_path):
    path = ("obs_encoder", "vit")
    drawn = jax.tree.map(lambda x: x + 1, params[path[0]][path[1]])
    tensors = layout.to_official(drawn, torchvision_vit.entry_of(8))
    save_file(tensors | {"heads.head.weight": np.zeros((1000, 64), np.float32)}, tmp_path / "model.safetensors")
    config = tiny_config()
    config.model.encoder.imagenet_weights = str(tmp_path)
    system = make(config)
    loaded = pretrained.load(system, params)
    expected = {**params, "obs_encoder": {**params["obs_encoder"], "vit": drawn}}
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert pretrained.load(make(tiny_config()), params) is params
    fresh = {"obs_encoder/feat_head/kernel"}  # the ViT comes from another run
    assert pretrained.load(system, params, fresh) is params


def test_bfloat16_stays_close(params, batch):
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_config()
        config.model.dtype = dtype
        system = make(config)
        evaluate = jax.jit(lambda params, batch, system=system: system.losses(params, system.encode({}, batch), {}))
        found[dtype] = evaluate(params, batch).parts
        assert all(part.dtype == jnp.float32 for part in found[dtype].values())
    for name, part in found["float32"].items():
        assert 0 < np.abs(found["bfloat16"][name] - part).max() < 0.03 * part.max(), name


def test_flops_are_the_products_of_a_forward_pass(system, count_products):
    params = jax.eval_shape(system.init, jax.random.key(0))
    images = jnp.zeros((1, 2, 2, 16, 16, 3))
    products = count_products(system.network.apply, {"params": params}, images)
    assert sum(system.flops().trained.values()) == products and system.flops().frozen == 0


@pytest.mark.slow
def test_untrained_arrays_are_the_same_after_steps_and_a_conversion_back(params, batch):
    config = tiny_config()
    config.batch_size, config.mesh.data = 4, 1
    config.optimizer.update(learning_rate=1e-2, weight_decay=0.1, ema_decay=0.9)
    program = build(config, make(config).spec, None, mesh_lib.make_mesh(config, jax.devices()[:1]))
    state = state_lib.create(config, params, program.optimizer, program.system.tree.untrained)
    state = jax.device_put(jax.tree.map(jnp.copy, state), program.shardings)
    step = program.compile_step({})
    state, before = program.system.held(state), jax.device_get(params)
    for _ in range(5):
        state, _ = step(state, {}, batch)
    entry_of = official.entry_of(config.model.encoder.patch, config.model.patch)
    before = layout.to_official(before, entry_of)
    heads = "obs_encoder.img_encoder.model.heads."
    for tree in (state.params, state.ema_params):
        after = layout.to_official(jax.device_get(layers.stacked(tree)), entry_of)
        assert before.keys() == after.keys()
        same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
        assert same == {"decoder_pos_embed", f"{heads}weight", f"{heads}bias"}
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]
    moments = [path for path in paths if path.startswith("opt_state")]
    assert [path for path in moments if "obs_encoder/feat_head" in path]
    assert not [path for path in moments if "obs_encoder/heads" in path or "decoder/pos_embed" in path]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.encoder.width": 96}, "model.encoder.width: expected a multiple of 64"),
        ({"model.encoder.patch": 5}, "model.encoder.patch=5 does not divide config.data.crop"),
        ({"model.patch": (8, 5)}, r"model.patch=\(8, 5\) does not divide config.data.crop"),
        ({"model.patch": (8,)}, "model.patch: expected 2 positive integers"),
        ({"model.decoder.num_heads": 3}, "model.decoder.num_heads=3 does not divide"),
        ({"model.num_heads": 3}, "model.num_heads=3 does not divide"),
        ({"model.resampler.depth": 0}, "model.resampler.depth: expected a number of at least 1"),
        ({"data.window.next_obs": ()}, "data.window.next_obs: expected at least one"),
        ({"data.window.next_obs": (4,)}, "same number"),
        ({"data.cameras": ()}, "data.cameras: expected at least one"),
    ],
)
def test_unusable_fields_are_named(changes, words):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        config_lib.validate(config)
