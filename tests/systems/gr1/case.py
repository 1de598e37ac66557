"""Networks of GR1 whose weights and inputs follow the published formula."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import reference
from uwm_jax.systems.gr1.network import GR1Network, network_from_config
from uwm_jax.torch_bridge import layout


def numbered(entries: list[tuple[str, tuple[int, ...]]], norms: tuple[str, ...] = ("norm",)) -> dict[str, np.ndarray]:
    """Formula weights in torch's shapes, numbered in the order given; names of norms contain one of `norms`."""
    tensors = {}
    for k, (name, shape) in enumerate(entries):
        drawn = 0.2 * reference.filler(int(np.prod(shape)), k)
        is_scale = any(text in name for text in norms) and name.endswith("weight")
        tensors[name] = drawn.astype(np.float32).reshape(shape) + np.float32(is_scale)
    return tensors


def inputs(shape: tuple[int, ...], k: int) -> jax.Array:
    return jnp.asarray((2.0 * reference.filler(int(np.prod(shape)), k)).astype(np.float32).reshape(shape))


def check(found: Any, *, mean: float, std: float, first: list[float], last: list[float]) -> None:
    found = np.asarray(found)
    np.testing.assert_allclose([found.mean(), found.std()], [mean, std], atol=3e-6)
    flat = found.reshape(-1)
    np.testing.assert_allclose(flat[: len(first)], first, atol=3e-6)
    np.testing.assert_allclose(flat[-len(last) :], last, atol=3e-6)


def model_fields(**changes: Any) -> SimpleNamespace:
    """`config.model` of the small golden network; `changes` of fields such as `encoder_depth` or `depth`."""
    parts: dict[str, dict[str, Any]] = {
        "encoder": {"patch": 16, "width": 128, "depth": 2, "mlp_dim": 256},
        "resampler": {"num_latents": 3, "depth": 2, "num_heads": 2, "head_dim": 32},
        "decoder": {"depth": 1, "num_heads": 4, "mlp_ratio": 4, "qkv_bias": True},
    }
    own = {"embed_dim": 128, "patch": (16, 16), "depth": 3, "num_heads": 4, "mlp_ratio": 4, "qkv_bias": True}
    own |= {"scan_blocks": False, "remat": "none", "dtype": "float32", "attention": "xla"}
    for name, value in changes.items():
        part, _, field = name.partition("_")
        if part in parts:
            parts[part][field] = value
        else:
            own[name] = value
    return SimpleNamespace(**own, **{name: SimpleNamespace(**fields) for name, fields in parts.items()})


FULL_SIZE = {
    "embed_dim": 768,
    "patch": (32, 32),
    "num_heads": 12,
    "encoder_patch": 32,
    "encoder_width": 768,
    "encoder_depth": 12,
    "encoder_mlp_dim": 3072,
    "resampler_num_latents": 9,
    "resampler_num_heads": 4,
    "resampler_head_dim": 128,
    "decoder_num_heads": 16,
}
SMALL = FULL_SIZE | {"depth": 2, "decoder_depth": 1, "resampler_depth": 2}


def build(model: Any, action_dim: int, views: int, size: int, action_len: int = 16) -> tuple[GR1Network, Any]:
    """A network and the shapes of its parameters, for two frames of `size` pixels."""
    network = network_from_config(
        model, action_dim=action_dim, action_len=action_len, num_views=views, crop=(size, size)
    )
    images = jax.ShapeDtypeStruct((1, views, 2, size, size, 3), jnp.float32)
    return network, jax.eval_shape(network.init, jax.random.key(0), images)["params"]


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    stored = json.loads((reference.FOLDER / f"{name}.manifest.json").read_text())
    return {tensor: tuple(shape) for tensor, shape, _ in stored["tensors"]}


def official_names(shapes: Any, entry_of: layout.EntryOf) -> dict[str, tuple[int, ...]]:
    return {e.name: e.torch_shape for e in layout.table(shapes, entry_of)}
