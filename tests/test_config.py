"""Loading, overriding, storing and checking configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.systems.fields import about_clip

FILE = """
from uwm_jax.config import base
def get_config(size="large"):
    c = base()
    c.model.depth = {"large": 24, "small": 2}[size]
    return c
"""


def of_uwm(fields):
    """The text of an object of JSON, as a stored config of UWM's."""
    return fields.replace("{", '{"system": "uwm", ', 1)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(FILE)
    return str(file)


def test_load_with_argument_and_overrides(path):
    assert config_lib.load(path).model.depth == 24
    config = config_lib.load(
        f"{path}:small",
        [("batch_size", "48"), ("data.cameras", "a,b"), ("model.patch", "(2,2,2)"), ("optimizer.eps", "1"),
         ("model.scan_blocks", "false"), ("data.low_dim", "")],
    )  # fmt: skip
    assert (config.model.depth, config.batch_size, config.data.cameras) == (2, 48, ("a", "b"))
    assert (config.model.patch, config.model.scan_blocks, config.data.low_dim) == ((2, 2, 2), False, ())
    assert isinstance(config.optimizer.eps, float)


def test_stored_config_comes_back_equal(path, tmp_path):
    config = config_lib.load(f"{path}:small")
    for text, value in (("True", True), ("None", None)):
        config_lib.apply_overrides(config, [("model.scan_blocks", text)])
        assert config.model.scan_blocks is value
        assert config_lib.from_json(config_lib.to_json(config), "there") == config
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    assert config_lib.read(tmp_path, [("seed", "7")]).seed == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("model.dpeth", "3"), "Did you mean model.depth"),
        (("model.depth", "deep"), "expected an integer"),
        (("model.depth", "0"), "at least 1"),
        (("model.scan_blocks", "maybe"), "expected true or false, or None"),
        (("optimizer.learning_rate", "-1"), "at least 0"),
        (("optimizer.learning_rate", "nan"), "at least 0"),
        (("model.remat", "some"), "none, dots, full"),
        (("model.num_heads", "7"), "does not divide"),
        (("model.patch", "(4,4)"), "3 positive integers"),
        (("data.crop", "(300,300)"), "larger than config.data.resize"),
        (("data.window.next_obs", "(17,)"), "same number"),
        (("data.window.obs", "(-1,0)"), "pad='edge'"),
        (("data.val_ratio", "1.0"), "0 <= ratio < 1"),
        (("model.encoder.use_low_dim", "true"), "config.data.low_dim"),
        (("model.encoder.use_language", "true"), "config.data.text"),
        (("diffusion.num_inference_steps", "101"), "exceeds"),
        (("data.action", "action"), "pairs"),
        (("data.cameras", "a,a"), "with config.data.sources.NAME = source(cameras=('image', 'image'))"),
        (("data.low_dim", "a,a"), "named twice"),
        (("seed", "-1"), "at least 0"),
        (("seed", "4294967296"), "less than 2"),
        (("data.seed", "-2"), "expected -1 (as config.seed)"),
        (("model.encoder.width", "24"), "multiple of 16"),
        (("optimizer.b2", "1.0"), "less than 1"),
        (("optimizer.schedule", "wsd"), "config.optimizer.decay_steps: expected the number of steps, at least 1"),
        (("accumulation_steps", "5"), "does not divide"),
        (("mesh.data", "0"), "-1 for all"),
        (
            ("data.action", "3"),
            "such as (('action', 'identity'),), or the name of a preset, bridge, droid, libero; found",
        ),
        (("data.action", "(('action','rot6'),)"), "config.data.action: no transform 'rot6'; there are identity"),
        (("data.action", "(('action[6]','identity'),)"), "expected a step key, or columns of it such as 'action[:6]'"),
        (("data.action", "ab"), "pairs (step key, transform)"),
        (("data.action", "('action','identity')"), "such as (('action', 'identity'),)"),
        (("data.action", "()"), "at least one pair"),
        (("data.low_dim", "((1,2),)"), "a list of strings such as ('one', 'two'), found ((1, 2),)"),
        (("data.cameras", "('a',1)"), "a list of strings"),
        (("init_from_skip", "(3,)"), "a list of strings"),
        (("data.window.obs", "now"), "a list of integers such as (1, 2), found ('now',)"),
        (("data.window.next_obs", ""), "at least one step, since config.system='uwm' reads next_obs"),
        (("data.window.action", "1.5"), "a list of integers"),
        (("data.window.reserve", "(18,)"), "expected () or (first, last) such as (0, 18), found (18,)"),
        (("data.window.reserve", "(18,0)"), "expected () or (first, last)"),
        (("model.patch", "2"), "3 positive integers"),
        (("model.patch", "((1,),2,2)"), "a list of integers"),
        (("data.resize", "large"), "a list of integers"),
        (("data.crop", "224"), "2 positive integers"),
        (("model.encoder.stage_sizes", "(True,)"), "a list of integers"),
        (("eval.action_plane", "wrist,0,1,0,1"), "(camera, x_low, x_high, y_low, y_high) such as ('image', 0.0"),
        (("eval.action_plane", "('wrist',0,1,0)"), "(camera, x_low, x_high, y_low, y_high)"),
        (("eval.action_plane", "('wrist',0,1,2,2)"), "(camera, x_low, x_high, y_low, y_high)"),
        (("eval.action_plane", "('nowhere',0,1,0,1)"), "names the camera 'nowhere', which is not one of"),
    ],
)
def test_bad_values_are_named(path, override, message):
    with pytest.raises(UserError) as error:
        config_lib.load(path, [override])
    assert override[0] in str(error.value) and message in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no Python file"):
        config_lib.load(str(tmp_path / "none.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:")
    with pytest.raises(UserError, match="does not load"):
        config_lib.load(str(broken))
    broken.write_text("def get_config():\n  return undefined_name")
    with pytest.raises(UserError, match="does not load.*undefined_name"):
        config_lib.load(str(broken))
    for code in (
        "import sys\nsys.exit(0)",
        "def get_config():\n  raise SystemExit(0)",
        "def get_config():\n  get_config()",
    ):
        broken.write_text(code)
        with pytest.raises(UserError, match="does not load"):
            config_lib.load(str(broken))
    broken.write_text("def get_config():\n  return None")
    with pytest.raises(UserError, match="returned None"):
        config_lib.load(str(broken))
    with pytest.raises(UserError, match="config.json: expected a JSON object"):
        config_lib.from_json("[1]", "config.json")
    with pytest.raises(UserError, match="config.json: system: expected one of uwm, .*, found none"):
        config_lib.from_json('{"model": {}}', "config.json")
    for text in ('{"model": 3}', '{"data": {"sources": 3}}', '{"data": {"sources": null}}'):
        with pytest.raises(UserError, match="config.json: expected fields under"):
            config_lib.from_json(of_uwm(text), "config.json")
    for text, message in (
        ('{"data": {"action": 3}}', "data.action: expected a list, found 3"),
        ('{"data": {"action": ["grip"]}}', r"config.data.action: expected pairs .* found \('grip',\)"),
        ('{"seed": "one"}', "seed: expected an integer, found 'one'"),
        ('{"model": {"scan_blocks": "x"}}', "model.scan_blocks: expected true or false, or None, found 'x'"),
        ('{"data": {"sources": {"robot": 3}}}', "expected fields under 'data.sources.robot', found 3"),
        ('{"data": {"sources": {"a.b": {}}}}', "unknown field 'data.sources.a.b'"),
    ):
        with pytest.raises(UserError, match=f"^config.json: {message}"):
            config_lib.from_json(of_uwm(text), "config.json")
    with pytest.raises(UserError, match="holds no config.json"):
        config_lib.read(tmp_path)
    with pytest.raises(UserError, match="unknown field 'model.dept'.*Did you mean model.depth"):
        config_lib.from_json('{"system": "uwm", "model": {"dept": 3}}', "config.json")
    extra = tmp_path / "extra.py"
    extra.write_text(
        "from uwm_jax.config import base\ndef get_config():\n  c = base()\n  c.model.dropout = 0.1\n  return c"
    )
    with pytest.raises(UserError, match="model.dropout: there is no such field"):
        config_lib.load(str(extra))
    with pytest.raises(UserError, match="model.codec.name: the system 'gr1' has no such field; it belongs to uwm, pad"):
        config_lib.apply_overrides(config_lib.base("gr1"), [("model.codec.name", "pca")])


def test_texts_that_look_like_numbers_stay_texts(path):
    """`include=2` means the episodes whose path holds a 2."""
    config = config_lib.load(path, [("data.cameras", "0,1_0"), ("data.low_dim", '("state",)')])
    assert (config.data.cameras, config.data.low_dim) == (("0", "1_0"), ("state",))
    config.data.sources.robot = config_lib.source()
    for field in ("include", "exclude", "cameras"):
        config_lib.apply_overrides(config, [(f"data.sources.robot.{field}", "2")])
        assert config.data.sources.robot[field] == ("2",)
    config_lib.apply_overrides(config, [("data.sources.robot.include", "('success',('lab','2'))")])
    assert config.data.sources.robot.include == ("success", ("lab", "2"))


def test_lists_in_a_file_are_stored_as_they_come_back(tmp_path):
    file = tmp_path / "lists.py"
    file.write_text(
        "from uwm_jax.config import base\n"
        "def get_config():\n  c = base()\n  c.data.action = [['action', 'identity']]\n  return c"
    )
    config = config_lib.load(str(file))
    assert config_lib.from_json(config_lib.to_json(config), "there") == config


def test_actions_have_presets_by_name_and_relative_ones_a_present_step(path, tmp_path):
    config = config_lib.load(path, [("data.action", "bridge")])
    assert config.data.action == config_lib.preset("bridge")
    config.data.sources.arm = config_lib.source(action=(("action", "relative:pose"),))
    config_lib.apply_overrides(config, [("data.sources.arm.action", "libero")])
    assert config.data.sources.arm.action == config_lib.preset("libero")
    config.data.sources.arm.action = (("action", "gripper_scaled:1"),)
    with pytest.raises(UserError, match="config.data.sources.arm.action: expected 'gripper_scaled:LOW:HIGH'"):
        config_lib.validate(config)
    config.data.sources.arm.action = (("action", "relative:pose"),)
    config_lib.validate(config)
    config.data.window.obs = ()
    with pytest.raises(UserError, match="config.data.action: relative:pose refers to the present step, the last of"):
        config_lib.validate(config)
    relative = [("data.action", "(('action','relative:agent_pos:position'),)"), ("data.cameras", "image")]
    with pytest.raises(UserError, match="config.eval.action_plane draws positions, but .* relative to the present"):
        config_lib.load(path, [*relative, ("eval.action_plane", "('image',0,1,0,1)")])
    # Where sources have actions of their own, theirs are drawn.
    config = config_lib.load(path, relative)
    config.data.sources.arm = config_lib.source(action=(("action", "identity"),))
    config.eval.action_plane = ("image", 0, 1, 0, 1)
    config_lib.validate(config)
    config.data.action, config.data.sources.arm.action = (("action", "identity"),), (("action", "relative:pose"),)
    with pytest.raises(UserError, match="numbers of the action .*relative:pose.* are relative to the present"):
        config_lib.validate(config)


def test_sources_are_checked_and_survive_storage():
    def config_with(**sources):
        c = config_lib.base()
        for name, fields in sources.items():
            c.data.sources[name] = config_lib.source(**fields)
        return c

    c = config_with(robot={"include": ("WEIRD",)}, video={"use_actions": False, "weight": 3})
    config_lib.validate(c)
    again = config_lib.from_json(config_lib.to_json(c), "config.json")
    assert again == c
    config_lib.apply_overrides(again, [("data.sources.video.weight", "0.5")])
    assert again.data.sources.video.weight == 0.5
    with pytest.raises(UserError, match="data.sources.vidio.weight.*Did you mean data.sources.video.weight"):
        config_lib.apply_overrides(again, [("data.sources.vidio.weight", "0.5")])
    for sources, message in (
        ({"video": {"use_actions": False}}, "at least one source with use_actions"),
        ({"robot": {"weight": -1}}, "data.sources.robot.weight: expected a number of at least 0"),
        ({"robot": {"fill_views": "black"}}, "data.sources.robot.fill_views: expected one of same, none, random"),
        ({"robot": {"path": "mine"}}, "config.data.path='droid' is unused"),
        ({"robot": {"cameras": ("one",)}}, "one key for each of"),
        ({"robot": {"exclude": (("key", "a", "b"),)}}, r"robot.exclude: expected .* pairs \(key, text\) .*, found"),
        ({"robot": {"max_episodes": -1}}, "robot.max_episodes: expected a number of at least 0"),
        ({"robot": {"include": (2,)}}, r"data.sources.robot.include: expected a list of strings .* found \(2,\)"),
        ({"robot": {"action": ("action", "identity")}}, r"robot.action: expected pairs .* such as \(\('action', 'ide"),
        ({"robot": {"wieght": 1.0}}, "robot.wieght: there is no such field. Did you mean data.sources.robot.weight"),
    ):
        with pytest.raises(UserError, match=message):
            config_lib.validate(config_with(**sources))
    for made, message in (
        (3, r"data.sources.video: expected what uwm_jax.config.source\(...\) gives, found 3"),
        ({"path": "mine"}, r"data.sources.video.\w+ is missing: make every source with uwm_jax.config.source\(...\)"),
    ):
        c = config_lib.base()
        c.data.sources.video = made
        with pytest.raises(UserError, match=message):
            config_lib.validate(c)


def test_a_field_without_effect_may_differ():
    now, before = config_lib.base(), config_lib.base()
    now.optimizer.ema_decay = before.optimizer.ema_decay = 0.99
    before.optimizer.ema_warmup = "none"
    with pytest.raises(UserError, match="config.optimizer.ema_warmup is 'ramp', but this workdir .* with 'none'"):
        config_lib.refuse_changed(now, before)
    now.optimizer.ema_decay = before.optimizer.ema_decay = 0.0  # nothing is averaged
    config_lib.refuse_changed(now, before)


def test_what_action_free_rows_count_follows_the_prediction_until_it_is_set(path):
    found = {}
    for prediction in ("epsilon", "sample", "v"):
        found[prediction] = config_lib.load(path, [("diffusion.prediction.action", prediction)]).loss.action_free
    assert found == {"epsilon": "kept", "sample": "dropped", "v": "dropped"}
    fields = [("loss.action_free", "kept"), ("diffusion.prediction.action", "sample")]
    kept = config_lib.load(path, fields)
    assert kept.loss.action_free == "kept"
    assert config_lib.from_json(config_lib.to_json(kept), "there").loss.action_free == "kept"
    config_lib.apply_overrides(kept, [("loss.action_free", "dropped")])
    with pytest.raises(UserError, match="loss.action_free"):
        config_lib.load(path, [("loss.action_free", "halved")])


def test_a_run_without_action_free_rows_goes_on_whatever_they_would_count():
    """A run from before the default followed the prediction has `kept` in its config."""
    now, before = config_lib.base(), config_lib.base()
    now.diffusion.prediction.action = before.diffusion.prediction.action = "sample"
    before.loss.action_free = "kept"
    config_lib.refuse_changed(now, before)
    for c in (now, before):
        c.data.sources.robot = config_lib.source()
    config_lib.refuse_changed(now, before)
    for c in (now, before):
        c.data.sources.video = config_lib.source(use_actions=False)
    with pytest.raises(UserError, match="config.loss.action_free is 'dropped', but this workdir was .* with 'kept'"):
        config_lib.refuse_changed(now, before)


def test_the_clip_of_latents_follows_the_codec_until_it_is_set():
    config = config_lib.base()
    assert config.diffusion.clip.next_obs == 1.0
    config.model.codec.name = "pca"
    assert config.diffusion.clip.next_obs == 20.0 and config.diffusion.clip.action == 1.0
    stored = config_lib.from_json(config_lib.to_json(config), "config.json")
    assert stored == config and stored.diffusion.clip.next_obs == 20.0
    config_lib.apply_overrides(config, [("diffusion.clip.next_obs", "3")])
    config.model.codec.name = "vae"
    assert config.diffusion.clip.next_obs == 3.0 and about_clip(config) == []
    config.model.codec.name = "pca"
    (told,) = about_clip(config)
    assert "config.diffusion.clip.next_obs=3 cuts off latents" in told and "--config.diffusion.clip.next_obs=20" in told
    config.diffusion.clip.next_obs = 0.0  # nothing is clipped
    assert about_clip(config) == []


def test_the_commit_of_an_origin_on_the_hub_stays(tmp_path, monkeypatch):
    """The command that started a run names a branch, and continues it; other commits, steps and repositories do not."""
    monkeypatch.chdir(tmp_path)
    commit = "0123456789" * 4
    stored = config_lib.with_origins(config_lib.base(), init_from=f"me/run@{commit}@200")
    for spec in ("me/run", "me/run@main", "me/run@main@200", f"me/run@{commit}", stored.init_from):
        config_lib.refuse_changed(config_lib.with_origins(stored, init_from=spec), stored)
    for spec in ("me/other", "me/run@main@100", f"me/run@{commit[::-1]}", "me/run/there", str(tmp_path)):
        with pytest.raises(UserError, match="config.init_from is .*, but this workdir was started with 'me/run@0123"):
            config_lib.refuse_changed(config_lib.with_origins(stored, init_from=spec), stored)


def test_another_spelling_of_an_origin_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    stored = config_lib.with_origins(config_lib.base(), init_from=f"{tmp_path}/runs/a@200")
    for spec in ("runs/a", "runs/a/", "./runs/../runs/a@200", str(tmp_path / "runs" / "a")):
        config_lib.refuse_changed(config_lib.with_origins(stored, init_from=spec), stored)
    for spec in ("runs/a@100", "runs/b", ""):
        with pytest.raises(UserError, match="config.init_from is .*but this workdir was started with"):
            config_lib.refuse_changed(config_lib.with_origins(stored, init_from=spec), stored)
    stored = config_lib.with_origins(config_lib.base(), branch_from=f"{tmp_path}/runs/a@200")
    config_lib.refuse_changed(config_lib.with_origins(stored, branch_from="runs/a@200"), stored)
    with pytest.raises(UserError, match="config.branch_from is .*but this workdir was started with"):
        config_lib.refuse_changed(config_lib.with_origins(stored, branch_from="runs/a@100"), stored)


def test_a_decay_has_no_effect_without_its_schedule():
    stored, config = config_lib.base(), config_lib.base()
    config.optimizer.decay_steps = 5
    config_lib.refuse_changed(config, stored)
    config.optimizer.schedule = stored.optimizer.schedule = "wsd"
    with pytest.raises(UserError, match="config.optimizer.decay_steps is 5"):
        config_lib.refuse_changed(config, stored)


def test_shipped_configs_are_named_wherever_the_command_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no Python file 'configs/quickstart.py'") as e:
        config_lib.load("configs/quickstart.py")
    named = str(e.value).split("Shipped configs: ")[1].rstrip(".").split(", ")
    assert len(named) > 5 and all(Path(name).is_file() for name in named)
    monkeypatch.chdir(Path(config_lib.__file__).parents[1])
    with pytest.raises(UserError, match="Shipped configs: configs/benchmark_one_camera.py, configs/bridge.py, "):
        config_lib.load("none.py")


@pytest.mark.parametrize(
    "spec", ["gs://bucket/mine.py", "~nobody_of_this_name/mine.py", "gs://bucket/mine.py:small", "a" * 5000 + ".py"]
)
def test_a_config_lies_on_a_local_path(spec):
    with pytest.raises(UserError, match="--config=") as e:
        config_lib.load(spec)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    ("name", "value"), [("total_steps", 10**22), ("data.resize", (10**22, 8)), ("mesh.data", 10**22), ("seed", 2**63)]
)
def test_integers_that_no_array_takes_are_refused(name, value):
    config = config_lib.base()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=f"config.{name}"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_every": 15_000}, "keep_every=15000 is not a multiple of config.checkpoint.every=10000"),
        ({"keep_best_mode": "best"}, "expected one of min, max"),
    ],
)
def test_checkpoints_to_keep_are_saved(fields, message):
    config = config_lib.base()
    config.checkpoint.update(fields)
    with pytest.raises(UserError, match=message):
        config_lib.validate(config)
