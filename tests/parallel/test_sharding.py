from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from uwm_jax.codecs import VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.models.activations import constrain
from uwm_jax.parallel import sharding
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.systems.uwm.tree import TREE
from uwm_jax.training import state as state_lib


def abstract(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def droid():
    """Shapes of the full-width state, with robot state of a width that no mesh divides."""
    c = base()
    c.optimizer.ema_decay, c.optimizer.clip_norm = 0.99, 1.0
    c.data.low_dim, c.model.encoder.use_low_dim = ("state",), True
    spec = DataSpec(
        WindowSpec.from_config(c.data.window),
        dict.fromkeys(c.data.cameras, (180, 320)),
        {"state": 7},
        10,
        0,
        Normalizer(),
    )
    system, optimizer = UWM(c, spec, VAECodec(AutoencoderKL())), state_lib.make_optimizer(c)
    return jax.eval_shape(lambda key: state_lib.create(c, system.init(key), optimizer), jax.random.key(0))


@pytest.fixture(scope="module")
def rules():
    return sharding.load_rules("", "uwm", TREE.mesh_rules)


def on_device(shapes, shardings):
    sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def test_every_large_parameter_is_cut(droid, rules):
    whole = on_device(droid, sharding.state_sharding(abstract(data=8), rules, droid))
    for sizes, share in (({"fsdp": 8}, 1 / 8), ({"data": 2, "fsdp": 2, "tensor": 2}, 1 / 4), ({"tensor": 4}, 1 / 4)):
        placed = sharding.state_sharding(abstract(**sizes), rules, droid)
        assert share <= on_device(droid, placed) / whole < share + 0.03, sizes
        assert placed.params["noise_pred_net"]["blocks"]["adaln"]["kernel"].shard_shape((12, 5134, 6, 768)) == (
            *(12, 5134, 6),
            int(768 * share),
        )


def test_convolutions_of_the_image_encoder_stay_whole(droid, rules):
    """Cut into 16, the kernels would have 4 to 32 output channels a piece; they are 2.8 % of the parameters."""
    encoder = sharding.state_sharding(abstract(fsdp=16), rules, droid).params["obs_encoder"]["img_encoder"]
    specs = {name: x.spec for name, x in traverse_util.flatten_dict(encoder, sep="/").items()}
    assert specs.pop("fc/kernel") == PartitionSpec("fsdp")
    assert set(specs.values()) == {PartitionSpec()}


def test_moments_and_average_lie_with_their_parameters(droid, rules):
    placed = sharding.state_sharding(abstract(fsdp=2, tensor=4), rules, droid)
    adam = next(s for s in placed.opt_state if hasattr(s, "mu"))
    for tree in (placed.ema_params, adam.mu, adam.nu):
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, tree, placed.params))
    for scalar in (placed.step, adam.count, *jax.tree.leaves(placed.hparams)):
        assert scalar.spec == PartitionSpec()
    assert placed.params["noise_pred_net"]["blocks"]["fc1"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_moments_of_what_is_trained_lie_with_their_parameters_where_the_rest_is_frozen(rules):
    c = base()
    c.optimizer.freeze = ("obs_encoder/*", "noise_pred_net/blocks/qkv/*")
    spec = DataSpec(
        WindowSpec.from_config(c.data.window), dict.fromkeys(c.data.cameras, (180, 320)), {}, 10, 0, Normalizer()
    )
    system, optimizer = UWM(c, spec, VAECodec(AutoencoderKL())), state_lib.make_optimizer(c)
    shapes = jax.eval_shape(lambda key: state_lib.create(c, system.init(key), optimizer), jax.random.key(0))
    placed = sharding.state_sharding(abstract(fsdp=2, tensor=4), rules, shapes)
    adam = next(s for s in placed.opt_state if hasattr(s, "mu"))
    blocks = placed.params["noise_pred_net"]["blocks"]
    assert adam.mu.keys() == {"noise_pred_net"} and "qkv" not in adam.mu["noise_pred_net"]["blocks"]
    assert blocks["fc1"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    for name, of_layer in adam.mu["noise_pred_net"]["blocks"].items():
        assert of_layer == blocks[name], name


def test_axis_that_does_not_divide_is_left_whole(droid, rules):
    placed = sharding.state_sharding(abstract(tensor=8), rules, droid)  # 12 heads
    blocks = placed.params["noise_pred_net"]["blocks"]
    assert blocks["qkv"]["kernel"].spec == PartitionSpec()
    assert blocks["fc1"]["kernel"].spec == PartitionSpec(None, None, "tensor")
    # of several mesh axes, the ones on the right go first: 768 = 3 * 256 is no multiple of 512
    placed = sharding.state_sharding(abstract(fsdp=64, tensor=8), rules, droid)
    assert placed.params["noise_pred_net"]["head"]["adaln"]["kernel"].spec == PartitionSpec(None, None, "tensor")


def test_table_of_the_full_model(droid, rules):
    mesh = abstract(data=2, fsdp=2, tensor=8)
    text = sharding.table(mesh, rules, droid, sharding.state_sharding(mesh, rules, droid))
    lines = text.splitlines()
    assert len(lines) <= 22 and max(map(len, lines)) <= 120, text
    assert "data 2, fsdp 2, tensor 8" in lines[0]
    adaln = next(line.split() for line in lines if line.startswith("noise_pred_net/blocks/adaln/kernel"))
    cut = 12 * 5134 * 6 * 768 // 16 * 4 / 1e6
    assert adaln[2:7] == ["12x5134x6x768", ".", ".", ".", "tensor+fsdp"]
    assert adaln[-2:] == [f"{cut:,.2f}", f"{4 * cut:,.2f}"]  # with EMA and two moments
    heads = next(line for line in lines if line.startswith("noise_pred_net/blocks/qkv/kernel"))
    assert ". fsdp . .! ." in heads and "!" in lines[-1], "a cut that was not possible is marked and explained"
    total = next(line.split() for line in lines if line.startswith("total"))
    count = sum(x.size for x in jax.tree.leaves(droid.params))
    assert total[2] == f"{count:,}"
    assert total[4] == f"{on_device(droid, sharding.state_sharding(mesh, rules, droid)) / 1e6:,.2f}"


GOOD = 'PARAMS = (("*/kernel", ("fsdp", None)), ("*", ()))\nACTIVATIONS = (("batch", ("data", "fsdp")),)\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("PARAMS = (", "does not load .SyntaxError"),
        ("import sys; sys.exit(0)", "does not load .SystemExit"),
        ("ACTIVATIONS = ()", "expected PARAMS = .*found nothing of that name"),
        (GOOD.replace('"fsdp", None', '"fdsp", None'), r"'fdsp' is no axis of the mesh.*Did you mean fsdp"),
        (GOOD.replace('("fsdp", None)', '"fsdp"'), r"the spec of '\*/kernel' is 'fsdp', expected a tuple"),
        (GOOD.replace('"fsdp", None', '"fsdp", "fsdp"'), "names a mesh axis twice"),
        (GOOD.replace('"fsdp", None', "3, None"), "3 is no axis of the mesh"),
        (GOOD.replace('"batch"', '"bach"'), "names 'bach', expected one of batch.*Did you mean batch"),
        (GOOD.replace('(("batch", ("data", "fsdp")),)', '("batch",)'), "expected ACTIVATIONS = "),
    ],
)
def test_malformed_rules_are_refused(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        sharding.load_rules(str(tmp_path / "mine.py"), "uwm", TREE.mesh_rules)


def test_rules_of_a_file(tmp_path, droid):
    (tmp_path / "mine.py").write_text(GOOD)
    rules = sharding.load_rules(str(tmp_path / "mine.py"), "uwm", TREE.mesh_rules)
    assert rules.params == (("*/kernel", (("fsdp",), ())), ("*", ()))
    assert rules.find("a/b/kernel")[0] == "*/kernel" and rules.find("a/b/bias")[0] == "*"
    for name in ("umw", str(tmp_path / "none.py")):
        with pytest.raises(UserError, match=r"config.mesh.rules=.*there is no such file.*\(uwm\)"):
            sharding.load_rules(name, "uwm", TREE.mesh_rules)
    (tmp_path / "long.py").write_text(GOOD.replace('"*/kernel", ("fsdp", None)', '"*/bias", (None,) * 9'))
    with pytest.raises(UserError, match=r"'\*/bias' has 9 entries, but .* has the shape"):
        sharding.state_sharding(
            abstract(fsdp=2), sharding.load_rules(str(tmp_path / "long.py"), "uwm", TREE.mesh_rules), droid
        )


def constraints(mesh, rules, *shape_and_names):
    """The layout that a traced constraint asks for; None where it is left out."""
    shape, *names = shape_and_names

    def f(x):
        with sharding.activations(mesh, rules):
            return constrain(x, *names)

    (equation, *_) = jax.make_jaxpr(f)(jnp.zeros(shape)).eqns or [None]
    return equation and equation.params["sharding"].spec


def test_logical_axes_follow_the_rules(rules):
    mesh = abstract(data=2, fsdp=2, tensor=4)
    assert constraints(mesh, rules, (8, 5, 3, 4, 7), "batch", "length", None, "heads") == PartitionSpec(
        ("data", "fsdp"), None, None, "tensor"
    )
    # six heads do not divide over four devices, and a batch of one row over none
    assert constraints(mesh, rules, (1, 5, 3, 6, 7), "batch", "length", None, "heads") == PartitionSpec(
        None, None, None, None
    )
    assert constraints(abstract(data=8), rules, (8, 4), "batch", "hidden") == PartitionSpec("data", None)
    assert constraints(abstract(), rules, (8, 4), "batch", "hidden") is None
    assert not jax.make_jaxpr(lambda x: constrain(x, "batch"))(jnp.zeros((8,))).eqns, "nothing without a mesh"
