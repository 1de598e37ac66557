"""The plain torch network: published numbers, the official implementation's, and our Flax network's, both ways."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uwm_jax import config as config_lib
from uwm_jax.conversion.from_torch import from_torch
from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.synthetic import synthetic_batch, synthetic_system
from uwm_jax.systems.uwm.network import network_from_config
from uwm_jax.systems.uwm.official import entry_of
from uwm_jax.torch_bridge import layout
from uwm_jax.training import workdir as workdir_lib

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from tests.golden import reference  # noqa: E402
from uwm_jax.torch_bridge import torch_network  # noqa: E402

DROID = "uwm_droid_small"


def relative(found, wanted) -> float:
    """Largest difference relative to the largest value."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def tensors(tree):
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


def model_fields(**changes):
    model = config_lib.base().model
    model.update(embed_dim=24, depth=2, num_heads=3, num_registers=2, timestep_embed_dim=16)
    model.update(changes)
    return model


def fill(module) -> int:
    """Formula weights, numbered by registration as the published numbers are; norms' scales are moved to 1."""
    norms = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.GroupNorm)}
    count = 0
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            value = (0.2 * reference.filler(parameter.numel(), k)).astype(np.float32)
            parameter.copy_(torch.from_numpy(value).reshape(parameter.shape) + float(id(parameter) in norms))
            count += 1
    return count


def published(shape: tuple[int, ...], k: int):
    value = (2.0 * reference.filler(int(np.prod(shape)), k)).astype(np.float32)
    return torch.from_numpy(value.reshape(shape))


def test_published_predictions():
    net = torch_network.NoisePredNet(model_fields(), 20, (4, 3), (2, 2, 8, 8, 4))
    assert fill(net) == 42
    noisy = {
        "action": published((2, 4, 3), 1001),
        "next_obs": published((2, 2, 4, 2, 8, 8), 1002).movedim(2, -1),
    }
    timestep = {"action": torch.tensor([7, 90]), "next_obs": torch.tensor([0, 41])}
    with torch.no_grad():
        pred = net(published((2, 20), 1000), noisy, timestep)
    action, video = pred["action"].numpy(), pred["next_obs"].movedim(-1, 2).numpy()
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    close([action.mean(), action.std()], [0.0440302, 0.0374948])
    close(action.ravel()[:5], [-0.025695, 0.040555, 0.056299, 0.000508, 0.055101])
    close(action.ravel()[-3:], [0.02781, 0.111135, 0.068326])
    close([video.mean(), video.std()], [0.0053571, 0.1018134])
    np.testing.assert_allclose(np.abs(video).sum(dtype=np.float64), 166.03311, rtol=1e-5)
    close(video.ravel()[:5], [0.023993, -0.157659, -0.115261, 0.111975, -0.022373])
    close(video.ravel()[-3:], [-0.111461, -0.066371, -0.017681])


def test_published_features():
    net = torch_network.ResNet((2, 2, 2, 2), 64, 8, "average", (64, 64))
    assert fill(net) == 62
    images = (reference.filler(2 * 3 * 2 * 64 * 64, 1007) + 0.5).astype(np.float32).reshape(2, 3, 2, 64, 64)
    images = torch.from_numpy(images).movedim(1, -1).flatten(0, 1)  # (V, C, T, H, W) -> (V * T, H, W, C)
    with torch.no_grad():
        features = torch_network.ImageEncoder(net)(images).numpy().ravel()
    np.testing.assert_allclose([features.mean(), features.std()], [-0.1751449, 1.1243242], atol=4e-6)
    np.testing.assert_allclose(features[:5], [0.729113, -2.437508, 0.894957, -0.12738, 1.035589], atol=4e-6)
    np.testing.assert_allclose(features[-3:], [-1.042441, -0.353726, -0.061039], atol=4e-6)


def test_a_fresh_network_predicts_zero_and_learns_at_once():
    torch.manual_seed(0)
    net = torch_network.NoisePredNet(model_fields(), 20, (4, 3), (2, 2, 8, 8, 4))
    noisy = {"action": torch.randn(2, 4, 3), "next_obs": torch.randn(2, 2, 2, 8, 8, 4)}
    pred = net(torch.randn(2, 20), noisy, {m: torch.tensor([3, 99]) for m in noisy})
    assert all(not p.any() for p in pred.values())
    assert net.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    sum((pred[m] - noisy[m]).square().mean() for m in pred).backward()
    assert net.action_decoder[2].bias.grad.abs().max() > 0


ENCODERS = {
    "averaged": {},
    "flattened, state and text": {"pool": "flatten", "use_low_dim": True, "use_language": True},
}


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_our_flax_network_agrees_in_values_and_gradients(encoder):
    model = model_fields(mlp_ratio=3, qkv_bias=not encoder, num_registers=0 if encoder else 2)
    model.encoder.update(stage_sizes=(1, 2), width=16, **encoder)
    latent_shape, low_dim, text_dim = (3, 2, 8, 4, 4), {"b": 2, "a": 3}, 5
    net = network_from_config(model, action_dim=3, action_len=4, num_views=3, num_frames=2, latent_shape=latent_shape)
    rng = np.random.default_rng(0)
    obs = {
        "images": rng.random((2, 3, 2, 21, 30, 3)),
        "low_dim": {k: rng.normal(size=(2, 2, n)) for k, n in low_dim.items()},
        "text": rng.normal(size=(2, text_dim)),
    }
    noisy = {"action": rng.normal(size=(2, 4, 3)), "next_obs": rng.normal(size=(2, *latent_shape))}
    target = jax.tree.map(lambda x: rng.normal(size=x.shape), noisy)
    obs, noisy, target = jax.tree.map(jnp.float32, (obs, noisy, target))
    timestep = {"action": jnp.array([0, 99]), "next_obs": jnp.array([57, 3])}

    shapes = jax.eval_shape(
        lambda: net.init(jax.random.key(0), *obs.values(), noisy, timestep, method="init_all")["params"]
    )
    params = jax.tree.map(lambda s: jnp.float32(0.2 * rng.normal(size=s.shape)), shapes)

    def loss(params):
        pred, _ = net.apply({"params": params}, *obs.values(), noisy, timestep, method="init_all")
        return sum(jnp.mean((pred[m] - target[m]) ** 2) for m in pred), pred

    (wanted_loss, wanted), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    torch_net = torch_network.UWM(
        model, action_shape=(4, 3), latent_shape=latent_shape, crop=(21, 30), low_dim=low_dim, text_dim=text_dim
    )
    torch_net.load_state_dict(tensors(layout.to_official(params, entry_of(model.patch))))
    found = torch_net(torch_net.encode_obs(**tensors(obs)), tensors(noisy), tensors(timestep))
    total = sum((found[m] - tensors(target[m])).square().mean() for m in found)
    total.backward()
    for m in wanted:
        assert relative(found[m].detach(), wanted[m]) < 2e-5
    assert total.item() == pytest.approx(float(wanted_loss), rel=1e-5)
    for name, wanted_grad in layout.to_official(grads, entry_of(model.patch)).items():
        assert relative(torch_net.get_parameter(name).grad, wanted_grad) < 1e-4, name


# --- what `convert` writes ---------------------------------------------------------------------------


def load(path):
    """The network of a file of to-torch, and its description."""
    description = json.loads(path.with_suffix(".json").read_text())
    network = torch_network.UWM.from_description(description)
    network.load_state_dict(tensors(load_file(path)))
    return network.eval(), description


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A converted official checkpoint, exported again and loaded: (network, description)."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("official")
    save_file(reference.weights(DROID), folder / "source.safetensors")
    from_torch(folder / "source.safetensors", reference.official_yaml(DROID), folder / "run", no_normalizer=True)
    to_torch(folder / "run", folder / "out.safetensors")
    return load(folder / "out.safetensors")


@pytest.mark.slow
def test_official_names_load_strictly(official):
    network, _ = official
    assert not network.training
    stored = reference.weights(DROID)
    assert network.state_dict().keys() == stored.keys()
    assert all(np.array_equal(tensor.numpy(), stored[name]) for name, tensor in network.state_dict().items())


@pytest.mark.slow
def test_official_predictions_latents_and_gradients(official):
    network, _ = official
    g = {name: torch.from_numpy(value) for name, value in reference.numbers(DROID).items()}
    images, latents = g["enc/curr_imgs"].movedim(2, -1), g["next_obs_latent"].movedim(2, -1)
    features = network.encode_obs(images)
    assert relative(features.detach(), g["obs_feat"]) < 2e-5

    abar = torch.tensor(official[1]["diffusion"]["alphas_cumprod"])
    clean = {"action": g["action_normalized"], "next_obs": latents}
    noise = {"action": g["noise/action"], "next_obs": g["noise/next_obs"].movedim(2, -1)}
    timestep = {m: g[f"timestep/{m}"] for m in clean}

    def noised(m):
        a = abar[timestep[m]].reshape(-1, *[1] * (clean[m].ndim - 1))
        return a.sqrt() * clean[m] + (1 - a).sqrt() * noise[m]

    pred = network(features, {m: noised(m) for m in clean}, timestep)
    assert relative(pred["action"].detach(), g["noise_pred/action"]) < 2e-5
    assert relative(pred["next_obs"].detach(), g["noise_pred/next_obs"].movedim(2, -1)) < 2e-5
    losses = {m: (pred[m] - noise[m]).square().mean() for m in pred}
    for m, loss in losses.items():
        assert loss.item() == pytest.approx(g[f"loss/{m}"].item(), rel=1e-5)
    sum(losses.values()).backward()
    wanted = {name.removeprefix("grad/"): value for name, value in g.items() if name.startswith("grad/")}
    assert len(wanted) > 5
    for name, value in wanted.items():
        assert relative(network.get_parameter(name).grad, value) < 1e-4, name
    frozen = [p for name, p in network.named_parameters() if name.startswith("obs_encoder.vae.")]
    assert frozen and all(not p.requires_grad and p.grad is None for p in frozen)


def tiny_config(codec: str):
    c = config_lib.base()
    c.model.update(model_fields(patch=(2, 2, 2)).to_dict())
    c.model.encoder.update(stage_sizes=(1,), width=16, pool="flatten", use_low_dim=True)
    c.model.codec.name = codec
    c.data.update(cameras=("b", "a"), low_dim=("state",), resize=(24, 32), crop=(16, 32))
    return c


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["pca", "pixels"])
def test_an_export_of_ours_loads_and_agrees(codec, tmp_path):
    config = tiny_config(codec)
    system, frozen = synthetic_system(config, 3)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.float32(0.2 * rng.normal(size=s.shape)), shapes)
    workdir_lib.save_params_only(tmp_path / "run", config, system.spec, params, frozen)
    to_torch(tmp_path / "run", tmp_path / "out.safetensors")
    network, description = load(tmp_path / "out.safetensors")
    assert description["codec"]["name"] == codec
    assert network.state_dict().keys() == load_file(tmp_path / "out.safetensors").keys()

    batch = synthetic_batch(system, 2)
    current, following = jax.jit(system.images)(batch)
    noise = jax.jit(system.noise, static_argnums=2)(jax.random.key(1), batch["row"], "policy")
    timestep = {"action": jnp.array([5, 60]), "next_obs": jnp.array([99, 20])}
    draws = {"noise": noise, "timestep": timestep}
    wanted = jax.jit(lambda params, batch: system.losses(params, system.encode(frozen, batch), draws))(params, batch)
    wanted = wanted.outputs
    with torch.no_grad():
        latents = network.encode_frames(tensors(following))
        features = network.encode_obs(tensors(current), {"state": tensors(batch["obs/state"])})
        clean = {"action": batch["action"], "next_obs": jnp.asarray(latents.numpy())}
        noisy = {m: jax.jit(system.schedule.add_noise)(clean[m], noise[m], timestep[m]) for m in clean}
        pred = network(features, tensors(noisy), tensors(timestep))
    assert relative(latents, wanted["next_obs_latent"]) < 2e-5
    assert relative(features, wanted["obs_feat"]) < 2e-5
    for m in pred:
        assert relative(pred[m], wanted[f"noise_pred/{m}"]) < 2e-5


def test_jax_is_not_imported():
    code = "import sys, uwm_jax.torch_bridge.torch_network; assert not {'jax', 'flax', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
