"""The image codecs of `uwm_torch.py` against those of JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from uwm_jax.codecs import PCACodec, PixelsCodec, VAECodec
from uwm_jax.torch_bridge import diffusers_vae

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from uwm_jax.torch_bridge import uwm_torch  # noqa: E402

CONFIG = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}


def close(found, wanted):
    assert tuple(found.shape) == tuple(wanted.shape)
    np.testing.assert_allclose(found.detach(), wanted, atol=2e-5 * float(np.abs(wanted).max()))


def frames(height: int = 16, width: int = 24) -> np.ndarray:
    """(B, V, T, H, W, 3) in [0, 1]."""
    return np.random.default_rng(0).random((2, 2, 1, height, width, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def vae():
    """A tiny autoencoder in the official wrapper, two frames in a pass."""
    torch.manual_seed(0)
    codec = {"diffusers_config": CONFIG, "scaling_factor": 0.5, "shift_factor": 0.1}
    module = uwm_torch.VAECodec({"codec": codec, "config": {"model": {"codec": {"microbatch": 2}}}})
    module.shift.zero_()
    module.scale.fill_(VAECodec.divisor)
    return module.requires_grad_(False)


def test_the_autoencoder_in_passes(vae):
    tensors = {name: x.numpy() for name, x in vae.vae.state_dict().items()}
    params = diffusers_vae.params_from_tensors(CONFIG, tensors)
    codec = VAECodec(diffusers_vae.module_from_config(CONFIG), microbatch=72)
    latents = jax.jit(lambda p, x: codec.encode(p, x, None))(params, frames())
    close(vae.encode(torch.from_numpy(frames()).movedim(-1, -3)), latents)
    close(vae.decode(torch.tensor(latents)), np.moveaxis(jax.jit(codec.decode)(params, latents), -1, -3))


def test_an_autoencoder_from_before_diffusers_018(vae, tmp_path):
    stored = {name: x.numpy() for name, x in vae.vae.state_dict().items()}
    old = {}
    for name, x in stored.items():
        for before, now in uwm_torch._OLD_ATTENTION.items():
            if f"attentions.0.{now}." in name:
                name = name.replace(now, before)
                x = x[:, :, None, None] if x.ndim == 2 else x
        old[name] = x
    assert len(old.keys() - stored.keys()) == 16
    save_file(old, tmp_path / "vae.safetensors")
    module = uwm_torch.Autoencoder(CONFIG)
    uwm_torch._fill(module, tmp_path / "vae.safetensors")
    assert all(torch.equal(x, torch.from_numpy(stored[name])) for name, x in module.state_dict().items())


@pytest.mark.slow
def test_a_program_encodes_any_number_of_rows(vae):
    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codec = vae

        def forward(self, images):
            return self.codec.encode(images)

    images = torch.from_numpy(frames(8, 8)).movedim(-1, -3)
    program = torch.export.export(Encode(), (images,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for rows in (1, 2, 5):
        given = images[torch.arange(rows) % 2]
        close(program(given), vae.encode(given))


def test_pixels_and_principal_components():
    codec = PCACodec(patch=4, channels=5)
    arrays = codec.synthetic_arrays(2, 16, 24) | {"scale": jnp.float32(0.7)}
    module = uwm_torch.PCACodec(
        {"codec": {"patch": 4, "channels": 5}, "cameras": {"a": 0, "b": 0}, "images": {"crop": [16, 24]}}
    )
    module.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in arrays.items()})
    for ours, theirs, params in ((codec, module, arrays), (PixelsCodec(), uwm_torch.PixelsCodec(), {})):
        latents = ours.encode(params, frames(), None)
        close(theirs.encode(torch.from_numpy(frames()).movedim(-1, -3)), latents)
        close(theirs.decode(torch.tensor(np.asarray(latents))), np.moveaxis(ours.decode(params, latents), -1, -3))
