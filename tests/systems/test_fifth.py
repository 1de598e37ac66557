"""A system that is as unlike a world model as possible, defined here alone: the trainer and the commands serve it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.systems.base import Flops, Losses, System, SystemType, TreeInfo, share_equally

TREE = TreeInfo(gradient_groups=(("", "all"),), mesh_rules=(("w", ("fsdp", "tensor")), ("*", ())))


class Regression(System):
    """Predicts the last step of the low-dimensional observation from the first by a matrix; no images, no actions."""

    uses, acting, tree = {}, "", TREE

    def init(self, key):
        return {"w": 0.1 * jax.random.normal(key, (self.width, self.width)), "b": jnp.zeros(self.width)}

    @property
    def width(self):
        return sum(self.spec.low_dim.values())

    def encode(self, frozen, batch, key=None):
        return {"x": jnp.concatenate([batch[f"obs/{k}"] for k in sorted(self.spec.low_dim)], axis=-1)}

    def draws(self, key, rows):
        return {}

    def shares(self, batch, key):
        return {"x": share_equally(jnp.ones(batch["row"].shape, bool))}

    def losses(self, params, encoded, draws, *, train=False):
        x = encoded["x"]
        error = x[:, 0] @ params["w"] + params["b"] - x[:, -1]
        return Losses({"x": jnp.square(error).mean(axis=-1)}, {}, {})

    def noise(self, key, rows, use):
        return {}

    def sample(self, params, encoded, use, noise, *, trace=False):
        raise KeyError(use)

    def flops(self):
        return Flops({"matrix": 2.0 * self.width**2})


def add_fields(c: ConfigDict) -> None:
    c.model = ConfigDict({"dtype": "float32"})
    c.loss = ConfigDict({"weights": ConfigDict({"x": 1.0})})
    c.data.cameras, c.data.window.action, c.data.window.next_obs = (), (), ()


REGRESSION = SystemType(
    name="regression",
    title="Linear regression",
    add_fields=add_fields,
    check=lambda config: None,
    make=Regression,
    tree=lambda config: TREE,
    uses={},
    acting="",
)
