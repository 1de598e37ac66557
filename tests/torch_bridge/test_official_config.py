"""Reading the YAML of an official run: references, numbers, agreement with the tensors, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uwm_jax.conversion.from_torch import read_official
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.official_yaml import OfficialYaml

GOLDEN = Path(__file__).parents[1] / "golden"


def _yaml(name: str = "uwm_droid_small") -> str:
    return (GOLDEN / f"{name}.config.yaml").read_text()


def _shapes(name: str = "uwm_droid_small") -> dict[str, tuple[int, ...]]:
    stored = json.loads((GOLDEN / f"{name}.manifest.json").read_text())
    return {tensor: tuple(shape) for tensor, shape, _ in stored["tensors"]}


def _read(tmp_path: Path, text: str, shapes: dict[str, tuple[int, ...]] | None = None):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_official(OfficialYaml(path), _shapes() if shapes is None else shapes)


def test_droid_small(tmp_path: Path) -> None:
    run = _read(tmp_path, _yaml())
    c = run.config
    assert run.cameras == {
        "exterior_image_1_left": (45, 80), "exterior_image_2_left": (45, 80), "wrist_image_left": (45, 80)
    }  # fmt: skip
    assert c.data.cameras == tuple(sorted(run.cameras))
    assert run.low_dim == {} and run.low_dim_seen == {"cartesian_position": 6, "gripper_position": 1}
    assert (run.action_dim, run.text_dim) == (10, 0)
    m = c.model
    assert (m.embed_dim, m.depth, m.num_heads, m.mlp_ratio, m.num_registers) == (64, 3, 4, 4, 8)
    assert (m.timestep_embed_dim, m.patch, m.qkv_bias) == (32, (2, 4, 4), True)
    assert (m.encoder.stage_sizes, m.encoder.width, m.encoder.pool) == ((2, 2, 2, 2), 64, "average")
    w = c.data.window
    assert (w.obs, w.action, w.next_obs) == ((0, 1), tuple(range(1, 17)), (17, 18))
    assert (c.data.resize, c.data.crop, c.data.augment.draw) == ((72, 96), (64, 64), "batch")
    assert (c.data.augment.hue, c.data.augment.brightness) == (0.2, 0.2)
    assert (c.diffusion.num_train_steps, c.diffusion.spacing) == (100, "leading")
    assert c.diffusion.clip.to_dict() == {"action": 1.0, "next_obs": 1.0}


def test_libero_small_and_low_dim(tmp_path: Path) -> None:
    run = _read(tmp_path, _yaml("uwm_libero_small"), _shapes("uwm_libero_small"))
    assert run.config.model.num_registers == 24
    shapes = _shapes()
    for name in [n for n in shapes if n.endswith("adaLN_modulation.1.weight")]:
        shapes[name] = (shapes[name][0], shapes[name][1] + 2 * 7)
    low = _read(tmp_path, _yaml().replace("use_low_dim: false", "use_low_dim: true"), shapes)
    assert low.low_dim == {"cartesian_position": 6, "gripper_position": 1}
    assert low.config.data.low_dim == ("cartesian_position", "gripper_position")


def test_references_and_numbers(tmp_path: Path) -> None:
    text = (
        _yaml()
        .replace("  action_dim: 10\n", "  action_dim: ${dataset.shape_meta.action.shape[0]}\n")
        .replace("    num_frames: 2\n", "    num_frames: ${obs_num_frames}\n")
        .replace("    embed_dim: 64\n", "    embed_dim: ${model.embed_dim}\n")
        .replace("num_frames: 19\n", "num_frames: ${dataset.seq_len}\n", 1)
        .replace("    shape_meta: *id001\n", "    shape_meta: ${dataset.shape_meta}\n")
        .replace("  name: golden\n", "  name: golden_${algo}\n")
        + "logdir: logs/${now:%Y}\n"
        + "optimizer:\n  lr: 1e-4\n  weight_decay: 1.0e-6\n  betas: [0.9, 0.999]\n  eps: 1e-08\n"
    )
    c = _read(tmp_path, text).config
    reference = _read(tmp_path, _yaml()).config
    assert c.data.path == "golden_uwm"
    assert (c.optimizer.learning_rate, c.optimizer.weight_decay, c.optimizer.eps) == (1e-4, 1e-6, 1e-8)
    reference.data.path = c.data.path
    assert c.to_dict() == reference.to_dict()


def test_hydra_s_own_file_holds_resolvers_in_fields_that_are_not_needed(tmp_path: Path) -> None:
    text = (
        _yaml()
        .replace("algo: uwm", "algo: ${hydra:runtime.choices.model}")
        .replace("  name: golden\n", "  name: ${oc.env:DATASET}\n")
        + "optimizer:\n  lr: ${eval:1e-4*2}\n  eps: 1e-7\n  betas: ${betas}\n"
        + "logdir: ${oc.env:LOGS}/${algo}/${now:%Y-%m-%d}\n"
    )
    c, reference = _read(tmp_path, text).config, _read(tmp_path, _yaml()).config
    assert c.data.path == "official" and c.optimizer.eps == 1e-7
    reference.data.path, reference.optimizer.eps = c.data.path, c.optimizer.eps
    assert c.to_dict() == reference.to_dict()


def test_without_a_class_the_name_of_the_algorithm_tells(tmp_path: Path) -> None:
    text = _yaml().replace("  _target_: models.uwm.UnifiedWorldModel\n", "")
    assert _read(tmp_path, text).config.to_dict() == _read(tmp_path, _yaml()).config.to_dict()
    with pytest.raises(UserError, match="algo is 'uva'"):
        _read(tmp_path, text.replace("algo: uwm", "algo: uva"))


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]\n", "an alias that refers to what it is part of"),
        ("a: &a {b: {c: *a}}\n", "an alias that refers to what it is part of"),
        (_bomb(), "unfolds to more than 100000 values"),
        ("a: " + "[" * 80 + "]" * 80, "nested more than 50 levels deep"),
        ("a: " + "[" * 100_000, "nested more than 50 levels deep"),
        ("#" * (5 << 20), "bytes; a saved configuration has at most"),
        ("\n <!DOCTYPE html><html></html>", "an HTML page"),
        ("day: 2026-13-45\n", "not plain YAML"),
        ("defaults:\n- model: uwm\n- _self_\nnum_frames: 19\n", ".hydra/config.yaml"),
        ("num_frames: 19\n", ".hydra/config.yaml"),
    ],
)
def test_files_that_are_no_saved_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        _read(tmp_path, text)
    assert message in str(error.value) and str(tmp_path / "config.yaml") in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="not plain YAML"):
        OfficialYaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(("says", "expected"), [("true", True), ("false", False), (None, None)])
def test_which_keys_the_run_normalised(tmp_path: Path, says: str | None, expected: bool | None) -> None:
    shapes = _shapes()
    for name in [n for n in shapes if n.endswith("adaLN_modulation.1.weight")]:
        shapes[name] = (shapes[name][0], shapes[name][1] + 2 * 7)
    text = _yaml().replace("use_low_dim: false", "use_low_dim: true")
    line = "  normalize_lowdim: true\n"
    assert line in text
    run = _read(tmp_path, text.replace(line, f"  normalize_lowdim: {says}\n" if says else ""), shapes)
    assert run.normalized == {"action": True, "cartesian_position": expected, "gripper_position": expected}
    assert _read(tmp_path, _yaml()).normalized == {"action": True}  # it reads no low-dim key


def test_a_resolved_file_with_other_anchors_reads_the_same(tmp_path: Path) -> None:
    expanded = _yaml().replace("&id001", "").replace("*id001", "${dataset.shape_meta}")
    assert _read(tmp_path, expanded).config.to_dict() == _read(tmp_path, _yaml()).config.to_dict()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("depth: 3", "depth: 4", ["model.depth", "4", "3"]),
        ("num_registers: 8", "num_registers: 9", ["model.num_registers", "9", "8", "noise_pred_net.registers"]),
        ("  action_dim: 10", "  action_dim: 9", ["model.action_dim", "9", "[10]"]),
        ("timestep_embed_dim: 32", "timestep_embed_dim: 64", ["model.timestep_embed_dim", "64", "32"]),
        ("mlp_ratio: 4", "mlp_ratio: 2", ["mlp_ratio", "128", "256"]),
        ("    - 72\n    - 96", "    - 72\n    - 60", ["crop"]),
        ("    - 64\n    - 64", "    - 64\n    - 96", ["model.action_len + video tokens", "42", "36"]),
        ("num_frames: 19", "num_frames: 18", ["num_frames", "18", "19"]),
        ("num_heads: 4", "num_heads: 5", ["num_heads", "5"]),
        ("vision_backbone: resnet", "vision_backbone: vit", ["vision_backbone", "'vit'"]),
        ("use_language: false", "use_language: true", ["use_language", "text_encoder.head"]),
        ("imagenet_norm: false", "imagenet_norm: true", ["imagenet_norm"]),
        ("use_low_dim: false", "use_low_dim: true", ["condition", "430", "416"]),
        (
            "models.uwm.UnifiedWorldModel",
            "models.dp.DiffusionPolicy",
            ["model._target_", "'models.dp.DiffusionPolicy'"],
        ),
        ("  depth: 3", "", ["model.depth", "missing"]),
        ("depth: 3", "depth: three", ["model.depth", "an integer", "three"]),
        ("depth: 3", "depth: ${a.b}", ["model.depth", "${a.b}"]),
        ("depth: 3", "depth: ${model.depth}", ["refers to itself"]),
        ("depth: 3", "depth: ${now:x}", ["resolver"]),
        ("depth: 3", "depth: !!python/object/apply:os.getcwd []", ["not plain YAML"]),
        ("      - -0.2", "      - -0.1", ["hue", "symmetric"]),
        ("    color_jitter:\n", "    color_jitter: true\n    other:\n", ["color_jitter", "map", "True"]),
        ("    color_jitter:\n", "    color_jitter: [0.2, 0.2]\n    other:\n", ["color_jitter", "map", "[0.2, 0.2]"]),
        ("    color_jitter:\n", "    color_jitter: strong\n    other:\n", ["color_jitter", "map", "'strong'"]),
        ("algo: uwm", "algo: uwm\noptimizer: {betas: 0.9}", ["optimizer.betas", "two numbers", "0.9"]),
        ("algo: uwm", "algo: uwm\noptimizer: {betas: [0.9]}", ["optimizer.betas", "two numbers", "[0.9]"]),
        ("algo: uwm", "algo: uwm\noptimizer: {betas: [0.9, x]}", ["optimizer.betas", "number", "'x'"]),
        ("algo: uwm", "algo: uwm\noptimizer: {lr: .nan}", ["optimizer.lr", "finite number", "nan"]),
        ("normalize_action: true", "normalize_action: maybe", ["dataset.normalize_action", "true or false", "'maybe'"]),
        ("imagenet_norm: false", "imagenet_norm: maybe", ["imagenet_norm", "true or false", "'maybe'"]),
        ("      wrist_image_left:\n", "      7:\n", ["shape_meta.obs", "strings", "7"]),
        (
            "      wrist_image_left:\n",
            "      wrist_image_left: {}\n      x:\n",
            ["obs.wrist_image_left", "rgb", "None"],
        ),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    assert old in _yaml()
    try:
        message = "\n".join(_read(tmp_path, _yaml().replace(old, new, 1)).conflicts)
    except UserError as error:
        message = str(error)
    for part in ("config.yaml", *parts):
        assert part in message


def test_a_clip_tower_is_refused_by_name(tmp_path: Path) -> None:
    shapes = _shapes() | {"obs_encoder.text_encoder.text_encoder.logit_scale": ()}
    with pytest.raises(UserError, match="CLIP tower .*text_encoder.logit_scale"):
        _read(tmp_path, _yaml(), shapes)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        OfficialYaml(tmp_path / "none.yaml")


def test_a_camera_key_may_have_a_dot(tmp_path: Path) -> None:
    run = _read(tmp_path, _yaml().replace("wrist_image_left:", "wrist.left:"))
    assert run.cameras["wrist.left"] == (45, 80) and run.conflicts == ()


def test_no_jitter(tmp_path: Path) -> None:
    run = _read(tmp_path, _yaml().replace("    color_jitter:\n", "    color_jitter: null\n    other:\n"))
    assert run.config.data.augment.hue == run.config.data.augment.brightness == 0.0


def test_one_bad_tensor_does_not_hide_the_sizes(tmp_path: Path) -> None:
    shapes = _shapes()
    shapes["obs_encoder.img_encoder.model.conv1.weight"] = (63, 3, 7, 7)
    shapes["obs_encoder.img_encoder.model.layer1.9.extra"] = (1,)
    del shapes["obs_encoder.vae.vae.encoder.down_blocks.1.resnets.0.conv1.weight"]
    run = _read(tmp_path, _yaml(), shapes)
    assert (run.config.model.encoder.stage_sizes, run.config.model.encoder.width) == ((2, 2, 2, 2), 64)
    assert run.conflicts == ()


def test_names_behind_a_wrapper_are_refused(tmp_path: Path) -> None:
    wrapped = {f"policy.{name}": shape for name, shape in _shapes().items()}
    message = r"starts with noise_pred_net\.; its first are policy\.noise_pred_net\..* were taken off; remove any other"
    with pytest.raises(UserError, match=message):
        _read(tmp_path, _yaml(), wrapped)


def test_every_conflict_is_named(tmp_path: Path) -> None:
    text = _yaml().replace("depth: 3", "depth: 4").replace("num_registers: 8", "num_registers: 9")
    conflicts = "\n".join(_read(tmp_path, text).conflicts)
    assert "model.depth is 4" in conflicts and "model.num_registers is 9" in conflicts


@pytest.mark.parametrize(
    ("levels", "each", "message"),
    [
        (40, "{r}{r}", "unfolds to more than 1000000 values"),  # 2**40 of them
        (40, "['{r}', '{r}']", "unfolds to more than 1000000 values"),
        (3000, "{r}", "leads through more than 50 references"),
    ],
)
def test_references_that_unfold_without_end(tmp_path: Path, levels: int, each: str, message: str) -> None:
    lines = ["a0: xx", *(f"a{i}: {each.format(r=f'${{a{i - 1}}}')}" for i in range(1, levels + 1))]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    official = OfficialYaml(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=message):
        official.get(f"a{levels}")
    assert official.get("a3") is not None and official.optional(f"a{levels}", "default") == "default"
