"""Every system acts in an environment."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from tests.pusht_run import SIZE  # noqa: E402
from uwm_jax import codecs, envs, systems  # noqa: E402
from uwm_jax.backend import JaxBackend  # noqa: E402
from uwm_jax.config import base, validate  # noqa: E402
from uwm_jax.data.normalize import Normalizer  # noqa: E402
from uwm_jax.data.spec import DataSpec  # noqa: E402
from uwm_jax.data.windows import WindowSpec  # noqa: E402
from uwm_jax.envs.parallel import replay  # noqa: E402
from uwm_jax.evaluation import closed_loop  # noqa: E402
from uwm_jax.reporting import film  # noqa: E402
from uwm_jax.reporting.sheets import read_labels  # noqa: E402

SEEDS = [100_000, 100_003]


def system_of(name: str):
    """A small model of a comparison system for the environment, without a codec that is fitted to data, and parameters
    that are nowhere zero."""
    c = base(name)
    c.data.cameras, c.data.resize, c.data.crop = ("image",), (SIZE, SIZE), (SIZE, SIZE)
    c.model.embed_dim, c.model.depth, c.model.num_heads = 32, 1, 2
    if name == "dp":
        c.data.low_dim = ("agent_pos",)
        c.model.encoder.use_low_dim = True
        c.model.encoder.stage_sizes, c.model.encoder.width = (1,), 16
    elif name == "pad":
        c.model.codec.name, c.model.patch = "pixels", (2, 8, 8)
    else:
        c.model.patch = (8, 8)
        c.model.encoder.patch, c.model.encoder.width, c.model.encoder.depth, c.model.encoder.mlp_dim = 8, 64, 1, 64
        c.model.resampler.depth, c.model.resampler.head_dim = 1, 16
        c.model.decoder.depth, c.model.decoder.num_heads = 1, 2
    if name != "gr1":
        c.model.timestep_embed_dim, c.diffusion.num_inference_steps = 16, 2
    validate(c)
    half = (np.full(2, 256, np.float32), np.full(2, 256, np.float32))
    normalizer = Normalizer({"action": half} | dict.fromkeys(c.data.low_dim, half))
    low_dim = dict.fromkeys(c.data.low_dim, 2)
    spec = DataSpec(WindowSpec.from_config(c.data.window), {"image": (SIZE, SIZE)}, low_dim, 2, 0, normalizer)
    system = systems.make(c, spec, codecs.from_config(c) if name == "pad" else None)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    return system, jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp", "pad", "gr1"])
def test_every_system_acts_and_is_filmed(name, tmp_path):
    """Three chunks of an episode, from what each of them reads; none imagines what given actions lead to."""
    system, params = system_of(name)
    spec = dataclasses.replace(envs.get("pusht"), max_steps=24)
    with closed_loop.open_envs("pusht", system, SEEDS, workers=1) as opened:
        opened.spec = spec
        episodes = closed_loop.closed_loop(JaxBackend(system, params, {}), opened, SEEDS)
    assert [e.actions.shape for e in episodes] == [(24, 2)] * 2
    assert np.isfinite(episodes[0].actions).all() and not np.array_equal(episodes[0].actions, episodes[1].actions)
    seen = replay(spec.make({"image": (SIZE, SIZE)}), episodes[0])
    clip = film.imagine(system, params, {}, episodes[0], seen, execute=8)
    np.testing.assert_array_equal(clip.steps, [0, 8])
    assert film.draw([clip], spec, system, tmp_path / "film.gif")
    assert len(read_labels(tmp_path / "film.gif").columns) == 1
    assert closed_loop.describe_episodes(spec, system, {"policy": episodes}, 8, 0)["execute"] == 8
