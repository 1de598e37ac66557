"""The parts of an origin that reach a run starting from it, and the refused ones."""

from __future__ import annotations

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uwm_jax import config as config_lib
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec, TextEncoder
from uwm_jax.errors import UserError
from uwm_jax.synthetic import synthetic_system
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.systems.uwm.tree import TREE
from uwm_jax.training import compatibility
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, make_assets
from uwm_jax.training.codec_store import open_codec
from uwm_jax.training.finetune import open_origin
from uwm_jax.training.state import create, make_optimizer
from uwm_jax.training.workdir import save_params_only, write_config

# Of the dataset that the origin was trained on, and of another one.
OLD = Normalizer(
    {
        "action": (np.full(10, 2.0, np.float32), np.full(10, 0.5, np.float32)),
        "state": (np.full(7, 3.0, np.float32), np.zeros(7, np.float32)),
    }
)
NEW = Normalizer(
    {
        "action": (np.full(10, 2.2, np.float32), np.full(10, 0.1, np.float32)),
        "state": (np.full(7, 5.0, np.float32), np.ones(7, np.float32)),
        "gripper": (np.full(1, 4.0, np.float32), np.ones(1, np.float32)),
    }
)
ACTION_PATTERNS = ("*/action_encoder/*", "*/action_decoder/*")


@pytest.fixture(scope="module")
def origin_run(tmp_path_factory, make_tiny_config):
    """A run with checkpoints of steps 2 (parameters alone) and 4 (with an average), and its state at 4."""
    config = make_tiny_config()
    config.checkpoint.keep = 5
    workdir = tmp_path_factory.mktemp("finetune") / "origin"
    system, frozen = synthetic_system(config, 10)
    spec = dataclasses.replace(system.spec, normalizer=OLD)
    params = jax.jit(system.init)(jax.random.key(1))
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_params(2, jax.tree.map(lambda x: x + 2, params), frozen, make_assets(config, spec))
    state = create(config, params, make_optimizer(config))
    state = state.replace(step=jnp.asarray(4), ema_params=jax.tree.map(lambda x: x + 1, params))
    checkpoints.save(state, {}, frozen, make_assets(config, spec))
    checkpoints.wait()
    checkpoints.close()
    return workdir, state, frozen


@pytest.fixture
def origin(origin_run):
    return open_origin(str(origin_run[0]))


def shapes_of(config, action_dim=10):
    """The new run's parameters, and the spec of its data."""
    system, _ = synthetic_system(config, action_dim)
    return jax.eval_shape(system.init, jax.random.key(0)), dataclasses.replace(system.spec, normalizer=NEW)


def changed_spec(spec, **changed):
    return dataclasses.replace(spec, **changed)


def check(origin, config, spec, ranges=None):
    """Messages about data whose ranges are those that the spec's normaliser, or another, maps onto [-1, 1]."""
    return compatibility.check(origin, config, spec, {"data": ranges_of(ranges or spec.normalizer)})


def ranges_of(normalizer):
    return {key: (offset - scale, offset + scale) for key, (scale, offset) in normalizer.entries.items()}


def skipping(config, *patterns):
    config.init_from_skip = patterns
    return config


def zeros(shapes, sharding=None):
    return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), sharding), shapes)


def test_the_average_of_the_newest_checkpoint_is_what_a_run_starts_from(origin_run, origin, tiny_config):
    _, state, frozen = origin_run
    assert (origin.step, origin.item) == (4, "ema_params")
    params, skipped = origin.params(zeros(shapes_of(tiny_config)[0]), tiny_config)
    assert skipped == []
    jax.tree.map(np.testing.assert_array_equal, params, state.ema_params)
    jax.tree.map(np.testing.assert_array_equal, origin.codec_arrays, frozen)


def test_a_step_may_be_named(origin_run, tiny_config):
    workdir, state, _ = origin_run
    origin = open_origin(f"{workdir}@2")
    assert (origin.step, origin.item) == (2, "params")
    params, _ = origin.params(zeros(shapes_of(tiny_config)[0]), tiny_config)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 2), params, state.params)


def test_raw_parameters_may_be_asked_for(origin_run, tiny_config):
    workdir, state, _ = origin_run
    origin = open_origin(str(workdir), "raw")
    assert (origin.step, origin.parameters) == (4, "raw")
    params, _ = origin.params(zeros(shapes_of(tiny_config)[0]), tiny_config)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    with pytest.raises(UserError, match="init_from_parameters='average': step 2 of .* holds no average"):
        open_origin(f"{workdir}@2", "average")


def test_what_a_checkpoint_says_of_itself_counts_not_the_files_next_to_it(origin_run, tiny_config, tmp_path, capsys):
    """An edited config.json, and an average that was deleted."""
    workdir = shutil.copytree(origin_run[0], tmp_path / "origin")
    tiny_config.diffusion.prediction.action = "sample"
    write_config(workdir, tiny_config)
    origin = open_origin(str(workdir))
    assert origin.config.diffusion.prediction.action == "epsilon"
    assert "diffusion.prediction.action ('sample', there 'epsilon')" in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints" / "4" / "ema_params")
    origin = open_origin(str(workdir))
    assert origin.parameters == "average"
    with pytest.raises(UserError, match=r"ema_params.*"):
        origin.params(zeros(shapes_of(tiny_config)[0]), tiny_config)


def test_an_average_that_is_still_its_start_is_told(origin_run, origin, tiny_config):
    _, spec = shapes_of(tiny_config)
    assert not [line for line in check(origin, tiny_config, spec) if "averaged" in line]  # the ramp: 0.1 %
    slow = origin.config.copy_and_resolve_references()
    slow.optimizer.ema_decay, slow.optimizer.ema_warmup = 0.9999, "none"
    told = "\n".join(check(dataclasses.replace(origin, config=slow), tiny_config, spec))
    assert "warning: 100.0% of the averaged parameters of step 4 are still the random start" in told
    assert "--config.init_from_parameters=raw" in told
    raw = check(dataclasses.replace(origin, config=slow, parameters="raw"), tiny_config, spec)
    assert not [line for line in raw if "averaged" in line]


def test_arrays_get_the_new_runs_shardings(origin, tiny_config):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    sharding = NamedSharding(mesh, PartitionSpec())
    params, _ = origin.params(zeros(shapes_of(tiny_config)[0], sharding), skipping(tiny_config, *ACTION_PATTERNS))
    assert all(x.sharding == sharding for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "holds no config.json. Expected DIR or DIR@STEP"),
        ("origin@3", r"has checkpoints of steps \[2, 4\]"),
        ("origin@last", "expected DIR or DIR@STEP with an integer, or owner.*found 'last'"),
        ("empty", "holds no checkpoint yet"),
    ],
)
def test_an_origin_that_is_not_there(origin_run, make_tiny_config, spec, message):
    parent = origin_run[0].parent
    write_config(parent / "empty", make_tiny_config())
    with pytest.raises(UserError, match="config.init_from=.*" + message):
        open_origin(str(parent / spec))


def test_every_misfit_is_listed_with_both_shapes_and_the_flag_that_helps(origin, tiny_config):
    """A wider action and more registers; the flag of the message lets exactly these arrays start fresh."""
    tiny_config.model.num_registers = 3
    shapes, _ = shapes_of(tiny_config, action_dim=7)
    with pytest.raises(UserError) as caught:
        origin.params(zeros(shapes), tiny_config)
    message = str(caught.value)
    for line in (
        "noise_pred_net/action_encoder/fc1/kernel: (10, 128) in the origin, (7, 128) here",
        "noise_pred_net/action_decoder/fc2/kernel: (128, 10) in the origin, (128, 7) here",
        "noise_pred_net/action_decoder/fc2/bias: (10,) in the origin, (7,) here",
        "noise_pred_net/registers: (1, 2, 32) in the origin, (1, 3, 32) here",
        "noise_pred_net/pos_embed: (1, 7, 32) in the origin, (1, 8, 32) here",
        "5 arrays",
    ):
        assert line in message
    assert "AdaLN" not in message
    flag = re.search(r"--config.init_from_skip='(.*)'", message).group(1)
    config_lib.apply_overrides(tiny_config, [("init_from_skip", flag)])
    fresh = zeros(shapes)
    params, skipped = origin.params(fresh, tiny_config)
    assert len(skipped) == 5
    flat, new = (traverse_util.flatten_dict(t, sep="/") for t in (params, fresh))
    untouched = [name for name in flat if flat[name] is new[name]]
    assert sorted(untouched) == skipped
    frozen = origin.describe_skipped(fresh, skipped, ("*/registers",))
    assert "warning: noise_pred_net/registers start fresh, and config.optimizer.freeze leaves them random" in frozen
    told = origin.describe_skipped(fresh, skipped)
    assert "warning" not in told
    assert all(name in told for name in skipped) and "parameters" in told


def test_more_views_cost_the_adaln_kernels_and_the_message_says_so(origin, tiny_config):
    tiny_config.data.cameras = ("exterior", "wrist")
    with pytest.raises(UserError) as caught:
        origin.skipped(shapes_of(tiny_config)[0], tiny_config)
    message = str(caught.value)
    for name in ("blocks/adaln/kernel", "head/adaln/kernel", "pos_embed"):
        assert f"noise_pred_net/{name}: (" in message
    assert "little of the origin is left" in message


def test_the_refusal_names_the_fields_that_differ(origin, tiny_config):
    """Language, say, is no change of views."""
    tiny_config.data.text, tiny_config.model.encoder.use_language = "language_embedding", True
    shapes, _ = shapes_of(tiny_config)
    with pytest.raises(UserError) as caught:
        origin.skipped(shapes, tiny_config)
    message = str(caught.value)
    assert "config.model.encoder.use_language is True, the origin's is False" in message
    assert "Undo what changed the shapes" in message and "views" not in message.partition("The AdaLN")[0]


@pytest.mark.parametrize("adaln", ["shared", "low_rank"])
def test_another_adaln_is_named_and_its_arrays_may_start_fresh(origin, tiny_config, adaln):
    tiny_config.model.adaln = adaln
    shapes, _ = shapes_of(tiny_config)
    with pytest.raises(UserError) as caught:
        origin.skipped(shapes, tiny_config)
    message = str(caught.value)
    new = {"shared": "noise_pred_net/adaln/kernel", "low_rank": "noise_pred_net/blocks/adaln/down"}[adaln]
    assert f"{new}: absent in the origin, (" in message and "noise_pred_net/blocks/adaln/kernel: (" in message
    assert f"config.model.adaln is {adaln}, the origin's is official" in message
    assert "other ones for each config.model.adaln" in message
    flag = re.search(r"--config.init_from_skip='(.*)'", message).group(1)
    skipped = origin.skipped(shapes, skipping(tiny_config, *flag.split(",")))
    assert skipped == sorted([new, "noise_pred_net/blocks/adaln/kernel"])


def test_a_longer_action_window_costs_the_position_embedding_alone(origin, tiny_config):
    tiny_config.data.window.action, tiny_config.data.window.next_obs = (1, 2, 3, 4, 5, 6), (7, 8)
    shapes, spec = shapes_of(tiny_config)
    with pytest.raises(UserError) as caught:
        origin.skipped(shapes, tiny_config)
    message = str(caught.value)
    assert "noise_pred_net/pos_embed: (1, 7, 32) in the origin, (1, 9, 32) here" in message and "1 arrays" in message
    assert "config.data.window.action is (1, 2, 3, 4, 5, 6), the origin's is (1, 2, 3, 4)" in message
    assert "changes it alone" in message
    flag = re.search(r"--config.init_from_skip='(.*)'", message).group(1)
    params, skipped = origin.params(zeros(shapes), skipping(tiny_config, flag))
    assert skipped == ["noise_pred_net/pos_embed"]
    check(origin, tiny_config, spec)


def test_image_weights_that_are_not_read_are_told(origin, tiny_config):
    _, spec = shapes_of(tiny_config)
    tiny_config.model.encoder.imagenet_weights = "timm/resnet18.tv_in1k"
    assert [x for x in check(origin, tiny_config, spec) if "config.model.encoder.imagenet_weights is not read" in x]
    skipping(tiny_config, "obs_encoder/img_encoder/*")
    assert not [x for x in check(origin, tiny_config, spec) if "imagenet_weights" in x]


def test_arrays_that_only_one_side_has(origin, tiny_config):
    """Without registers and biases, the origin's are not used; named, like the rest."""
    tiny_config.model.num_registers = 0
    tiny_config.model.qkv_bias = False
    shapes, _ = shapes_of(tiny_config)
    with pytest.raises(UserError, match=r"noise_pred_net/registers: \(1, 2, 32\) in the origin, absent here"):
        origin.skipped(shapes, skipping(tiny_config, "*/pos_embed", "*/qkv/bias"))
    skipping(tiny_config, "*/pos_embed", "*/qkv/bias", "*/registers")
    params, skipped = origin.params(zeros(shapes), tiny_config)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert "the origin's noise_pred_net/blocks/qkv/bias, noise_pred_net/registers not used" in origin.describe_skipped(
        shapes, skipped
    )


def test_a_pattern_that_matches_nothing_is_an_error(origin, tiny_config):
    with pytest.raises(UserError, match=r"'\*/action_enc/\*' matches none of the \d+ arrays"):
        origin.skipped(shapes_of(tiny_config)[0], skipping(tiny_config, "*/action_enc/*"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("diffusion.num_train_steps", "1000"),
        ("diffusion.beta_schedule", "linear"),
        ("diffusion.prediction.action", "sample"),
        ("diffusion.prediction.next_obs", "v"),
        ("model.codec.name", "pixels"),
        ("model.patch", "2,1,4"),
    ],
)
def test_fields_that_change_the_meaning_of_parameters_are_refused(origin, tiny_config, field, value):
    _, spec = shapes_of(tiny_config)
    config_lib.apply_overrides(tiny_config, [(field, value)])
    with pytest.raises(UserError, match=rf"config.{re.escape(field)} is .*were trained with .*Use the origin's value"):
        check(origin, tiny_config, spec)


def test_fresh_layers_free_what_belongs_to_them(origin, tiny_config):
    _, spec = shapes_of(tiny_config)
    tiny_config.init_from_skip = TREE.interfaces["action"] + TREE.interfaces["next_obs"]
    tiny_config.diffusion.prediction.action = "sample"
    tiny_config.model.codec.name = "pixels"
    check(origin, tiny_config, spec)
    assert not origin.gives_codec(tiny_config)
    tiny_config.diffusion.beta_schedule = "linear"
    with pytest.raises(UserError, match="beta_schedule"):
        check(origin, tiny_config, spec)


def test_text_of_another_encoder_is_refused_unless_the_layer_that_reads_it_is_fresh(origin, tiny_config):
    tiny_config.data.text, tiny_config.model.encoder.use_language = "text", True
    shapes, spec = shapes_of(tiny_config)
    theirs, ours = TextEncoder("clip", "a" * 64), TextEncoder("another", "b" * 64)
    for trained, found, skip in ((theirs, theirs, ()), (None, ours, ()), (theirs, None, ())):
        known = dataclasses.replace(origin, data_spec=changed_spec(origin.data_spec, text_encoder=trained))
        check(known, skipping(tiny_config, *skip), changed_spec(spec, text_encoder=found))
    known = dataclasses.replace(origin, data_spec=changed_spec(origin.data_spec, text_encoder=theirs))
    with pytest.raises(UserError) as e:
        check(known, tiny_config, changed_spec(spec, text_encoder=ours))
    assert "by another encoder than those of config.init_from=" in str(e.value)
    (flag,) = re.findall(r"--config.init_from_skip='(.*)'", str(e.value))
    assert flag in traverse_util.flatten_dict(shapes, sep="/")
    check(known, skipping(tiny_config, flag), changed_spec(spec, text_encoder=ours))
    tiny_config.model.encoder.use_language = False  # it reads none
    check(known, skipping(tiny_config), changed_spec(spec, text_encoder=ours))


def test_the_normaliser_is_the_origins(origin, tiny_config):
    _, spec = shapes_of(tiny_config)
    found = origin.normalizer_for(tiny_config, changed_spec(spec, low_dim={"state": 7, "gripper": 1}))
    assert found.to_json() == {**OLD.to_json(), "gripper": NEW.to_json()["gripper"]}
    assert origin.normalizer_for(tiny_config, changed_spec(spec, low_dim={})).to_json().keys() == {"action"}


@pytest.mark.parametrize("patterns", [ACTION_PATTERNS, TREE.interfaces["action"], ("noise_pred_net/*",)])
def test_fresh_action_layers_take_the_new_datas_normaliser(origin, tiny_config, patterns):
    _, spec = shapes_of(tiny_config)
    tiny_config.init_from_skip = patterns
    found = origin.normalizer_for(tiny_config, spec).to_json()
    assert found["action"] == NEW.to_json()["action"]
    state = NEW if "noise_pred_net/*" in patterns else OLD  # the AdaLN kernels read the state
    assert found["state"] == state.to_json()["state"]


def test_another_width_takes_the_new_datas_normaliser(origin, tiny_config):
    """Whether the layers are skipped is judged with the arrays; a normaliser of the wrong width would hide that."""
    _, spec = shapes_of(tiny_config)
    narrow = Normalizer({"action": (np.ones(7, np.float32), np.zeros(7, np.float32))})
    found = origin.normalizer_for(tiny_config, changed_spec(spec, action_dim=7, normalizer=narrow))
    assert found.to_json() == {"action": narrow.to_json()["action"], "state": OLD.to_json()["state"]}


def test_what_the_origin_leaves_raw_stays_raw(origin, tiny_config):
    """Official LIBERO checkpoints have no normaliser."""
    raw = dataclasses.replace(origin, data_spec=changed_spec(origin.data_spec, normalizer=Normalizer()))
    _, spec = shapes_of(tiny_config)
    assert raw.normalizer_for(tiny_config, spec).to_json() == {}
    said = "\n".join(check(raw, tiny_config, spec))
    assert "(action, state: none, raw values)" in said
    assert "warning: action of this data reaches 2.3 where the model was trained within about 1" in said  # 0.1 + 2.2


def test_a_person_is_told_of_quiet_differences(origin, tiny_config):
    _, spec = shapes_of(tiny_config)
    assert not [x for x in check(origin, tiny_config, spec) if x.startswith("note: ")]
    tiny_config.data.cameras = ("exterior",)
    tiny_config.data.window.action = (2, 4, 6, 8)
    said = "\n".join(check(origin, tiny_config, spec))
    assert "note: config.data.cameras is ['exterior']; the origin was trained with ['wrist']" in said
    assert "note: config.data.window.action is (2, 4, 6, 8); the origin was trained with (1, 2, 3, 4)" in said
    assert "the origin's pca arrays" in said and "starting from ema_params of step 4" in said


def test_keys_of_sources_are_compared_as_they_are_read(origin, tiny_config):
    """A source's own statistics count, then another run's; video does not act."""
    _, spec = shapes_of(tiny_config)

    def notes() -> list[str]:
        return [x for x in check(origin, tiny_config, spec) if x.startswith("note: ")]

    action = tiny_config.data.action
    tiny_config.data.sources.video = config_lib.source(use_actions=False, cameras=("front",))
    tiny_config.data.sources.robot = config_lib.source(action=action, cameras=("wrist",))
    tiny_config.data.cameras = ("hand",)  # the model's own name for the same view
    assert notes() == []
    tiny_config.data.sources.robot.action = action[::-1]
    tiny_config.data.sources.robot.cameras = ("exterior",)
    tiny_config.data.sources.other = config_lib.source(cameras=("wrist",))
    assert notes() == [
        "note: config.data.sources.robot.cameras is ['exterior']; the origin was trained with ['wrist']",
        f"note: config.data.sources.robot.action is {action[::-1]}; the origin was trained with {action}",
    ]


def test_views_that_change_places_are_noticed(origin, tiny_config):
    _, spec = shapes_of(tiny_config)
    before = origin.config.copy_and_resolve_references()
    before.data.cameras = ("wrist", "exterior")
    origin = dataclasses.replace(origin, config=before, codec_arrays=None)
    tiny_config.data.cameras = ("exterior", "wrist")
    tiny_config.data.sources.robot = config_lib.source()
    assert not [x for x in check(origin, tiny_config, spec) if x.startswith("note: ")]
    tiny_config.data.sources.robot.cameras = ("wrist", "exterior")
    assert (
        "note: config.data.sources.robot.cameras is ['wrist', 'exterior']; "
        "the origin was trained with ['exterior', 'wrist']" in check(origin, tiny_config, spec)
    )


def test_data_that_stays_raw_is_compared_by_its_range(origin, tiny_config):
    """With `normalize` "none" the spec has no normaliser, and the origin's is applied all the same."""
    _, spec = shapes_of(tiny_config)
    tiny_config.data.normalize = "none"
    raw = changed_spec(spec, normalizer=Normalizer())
    wide = Normalizer({"action": (np.full(10, 4.0, np.float32), np.full(10, 0.5, np.float32))})
    said = check(origin, tiny_config, raw, wide)
    assert any(line.startswith("warning: action of this data reaches 2 where") for line in said)
    assert not any(line.startswith("warning") for line in check(origin, tiny_config, raw, OLD))


def test_data_that_reach_far_out_of_the_origins_range_are_noticed(origin, tiny_config):
    """Twice the origin's range is suspicious; data of exactly [-1, 1] are not taken for a constant."""
    _, spec = shapes_of(tiny_config)
    half, middle = np.float32([4.0, *[2.0] * 9]), np.full(10, 0.5, np.float32)
    wide = Normalizer({"action": (half, middle)})
    assert "warning: action of this data reaches 2 where" in "\n".join(check(origin, tiny_config, spec, wide))
    half[0] = 2.0
    assert "warning" not in "\n".join(check(origin, tiny_config, spec, wide))
    narrow = {"action": (np.full(10, 0.05, np.float32), np.zeros(10, np.float32)), "state": OLD.entries["state"]}
    metres = dataclasses.replace(origin, data_spec=changed_spec(origin.data_spec, normalizer=Normalizer(narrow)))
    ones = Normalizer({"action": (np.ones(10, np.float32), np.zeros(10, np.float32))})
    assert "warning: action of this data reaches 20 where" in "\n".join(check(metres, tiny_config, spec, ones))


def test_data_of_a_narrower_range_are_noticed_and_a_fresh_normaliser_is_offered(origin, tiny_config):
    """Metres under a normaliser of pixels, in some columns; a constant column tells nothing of units."""
    _, spec = shapes_of(tiny_config)
    half = np.float32([0.004, 0.19, 0.21, 0.0, *[2.0] * 6])  # of the origin's 2.0
    metres = Normalizer({"action": (half, np.full(10, 0.5, np.float32)), "state": OLD.entries["state"]})
    told = [line for line in check(origin, tiny_config, spec, metres) if line.startswith("warning")]
    assert len(told) == 1 and "--config.init_from_normalizer=fresh" in told[0]
    assert "action of this data uses little of the range" in told[0]
    assert "column 0 (0.20%), column 1 (9.50%)." in told[0]
    two = {"pixels": ranges_of(OLD), "metres": ranges_of(metres)}
    told = [x for x in compatibility.check(origin, tiny_config, spec, two) if x.startswith("warning")]
    assert len(told) == 1 and told[0].startswith("warning: action of 'metres' uses little")
    tiny_config.init_from_normalizer = "fresh"
    said = check(origin, tiny_config, spec, metres)
    assert "normaliser: action, state from this run's data (minmax)" in said
    assert not [line for line in said if line.startswith("warning")]
    assert origin.normalizer_for(tiny_config, spec).to_json().keys() == {"action", "state"}
    jax.tree.map(
        np.testing.assert_array_equal,
        origin.normalizer_for(tiny_config, spec).entries["action"],
        NEW.entries["action"],
    )


def test_the_origins_codec_comes_along(origin_run, origin, tiny_config):
    assert origin.gives_codec(tiny_config)
    codec, frozen = open_codec(tiny_config, origin.codec)
    assert (codec.patch, codec.channels) == (8, 12)
    jax.tree.map(np.testing.assert_array_equal, frozen, origin_run[2])


def test_a_pca_codec_for_other_views_is_refused(origin, tiny_config):
    tiny_config.data.cameras = ("exterior", "wrist")
    system = UWM(tiny_config, *_parts(tiny_config))
    with pytest.raises(UserError, match=r"fitted on 1 views of 16x16, but this run has 2 of 16x16(.|\n)*patch_encoder"):
        check(origin, tiny_config, changed_spec(system.spec, normalizer=NEW))


def _parts(config):
    system, _ = synthetic_system(config, 10)
    return system.spec, system.codec


def test_parameters_alone_serve_as_an_origin(tmp_path, tiny_config):
    """A converted checkpoint has no training state."""
    system, frozen = synthetic_system(tiny_config, 10)
    params = jax.jit(system.init)(jax.random.key(3))
    spec = DataSpec.from_json(system.spec.to_json())
    save_params_only(tmp_path / "run", tiny_config, spec, params, frozen)
    origin = open_origin(str(tmp_path / "run"))
    found, _ = origin.params(zeros(jax.eval_shape(lambda: params)), tiny_config)
    jax.tree.map(np.testing.assert_array_equal, found, params)
