"""The tables of parameters of all systems at their official sizes, from shapes alone."""

from __future__ import annotations

import math

import jax
import pytest
from flax import traverse_util

from uwm_jax import codecs, systems
from uwm_jax.config import base
from uwm_jax.errors import UserError
from uwm_jax.models.adaln import VARIANTS
from uwm_jax.synthetic import synthetic_spec
from uwm_jax.training.build import rules_of
from uwm_jax.training.patterns import matches

LARGE = 64 * 1024  # bytes


def official(variant: str) -> systems.System:
    """A system as its official code has it, or with another AdaLN, for three DROID cameras, state and text where it can
    read them."""
    name, _, part = variant.partition(" ")
    c = base(name)
    if part:
        c.model["adaln" if part in VARIANTS else "predictor"] = part
    if "use_low_dim" in c.model.get("encoder", {}):
        c.data.low_dim, c.data.text = ("state",), "text"
        c.model.encoder.use_low_dim = c.model.encoder.use_language = True
    return systems.make(c, synthetic_spec(c, action_dim=10, frame_size=(180, 320)), codecs.from_config(c))


@pytest.fixture(
    scope="module",
    params=[
        "uwm",
        "uwm shared",
        "uwm low_rank",
        "dp transformer",
        "dp shared",
        "dp unet",
        "pad",
        "gr1",
    ],
)
def parameters(request):
    system = official(request.param)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    return system, {name: x.shape for name, x in traverse_util.flatten_dict(shapes, sep="/").items()}


def test_no_large_kernel_is_left_to_the_last_rule(parameters):
    system, shapes = parameters
    rules = rules_of(system)
    large = [n for n, shape in shapes.items() if n.endswith("/kernel") and 4 * math.prod(shape) >= LARGE]
    assert large and [name for name in large if rules.find(name)[0] == "*"] == []
    assert all(len(rules.find(name)[1]) <= len(shape) for name, shape in shapes.items())


def test_a_table_names_parameters_that_exist(parameters):
    system, shapes = parameters
    tree = system.tree
    patterns = [*(p for group in tree.interfaces.values() for p in group), *tree.misfits, *tree.untrained]
    patterns += [part.marker for part in tree.pretrained]
    assert [p for p in patterns if not any(matches(name, (p,)) for name in shapes)] == []
    assert all(any(text in name for text, _ in tree.gradient_groups) for name in shapes)
    assert tree.codec == "" or tree.codec_interface


def test_every_large_part_of_adaln_is_cut(parameters):
    system, shapes = parameters
    rules = rules_of(system)
    large = [n for n, shape in shapes.items() if "adaln/" in n and 4 * math.prod(shape) >= 2**20]
    assert all("fsdp" in rules.find(name)[1][-1] for name in large)


@pytest.mark.parametrize("name", ["uwm", "dp", "pad"])
@pytest.mark.parametrize("adaln", ["shared", "low_rank"])
def test_official_checkpoints_have_the_official_adaln_alone(name, adaln):
    config = base(name)
    config.model.adaln = adaln
    message = f"config.model.adaln='{adaln}': official checkpoints have an AdaLN kernel in every block"
    with pytest.raises(UserError, match=message):
        systems.official(name).entry_of(config)
    if name == "dp":  # the U-Net has no AdaLN, so the field has no effect
        config.model.predictor = "unet"
        assert systems.official(name).entry_of(config)
