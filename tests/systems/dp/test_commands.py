"""Official Diffusion Policies through convert and sample: the official code's numbers, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.golden import reference
from tests.golden.commands import Converted
from uwm_jax import cli, convert, sample
from uwm_jax import config as config_lib
from uwm_jax.conversion.from_torch import read_official
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.official_yaml import OfficialYaml


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.DP_NAMES)
def test_official_numbers_by_the_commands(name, tmp_path, capsys):
    it = Converted.make(name, tmp_path)
    g, is_flow = it.g, "timestep/continuous" in it.g
    time = g["timestep/continuous" if is_flow else "timestep/action"]
    out = it.sample("denoise", {"noise/action": g["noise/action"], "timestep/action": time})
    assert out.keys() == {"noise_pred/action", "loss/action", "obs_feat"}
    for key, value in out.items():
        np.testing.assert_allclose(value, g[key], rtol=2e-5, atol=2e-5, err_msg=key)
    out = it.sample("policy", {"noise/action": g["init_noise/action"]})
    assert out.keys() == {"action", "action_normalized"}
    np.testing.assert_allclose(out["action_normalized"], g["policy/action_normalized"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out["action"], g["policy/action"], rtol=0, atol=1e-4 * g["action_scale"].max())
    if is_flow:
        walk = "--config.diffusion.num_inference_steps=5", "--config.diffusion.timeshift=3"
        out = it.sample("policy", {"noise/action": g["init_noise/action"]}, *walk)
        np.testing.assert_allclose(out["action_normalized"], g["policy_shift3/action_normalized"], rtol=0, atol=1e-4)
    it.assert_round_trip()

    paths = [f"--workdir={tmp_path / 'run'}", f"--inputs={tmp_path / 'in.npz'}", f"--output={tmp_path / 'no.npz'}"]
    assert cli.call(sample.main, ["sample", *paths, "--mode=policy,video"], sample.define_flags) == 2
    assert "--mode=video: this workdir is a dp run, whose modes are policy, denoise." in capsys.readouterr().err


def read(name: str, path: Path, *changes: tuple[str, str], tensors: dict[str, tuple[int, ...]] | None = None):
    """The run of a golden set's configuration with texts of it replaced."""
    text = reference.official_yaml(name).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = path / "config.yaml"
    path.write_text(text)
    shapes = {key: x.shape for key, x in reference.weights(name).items()}
    return read_official(OfficialYaml(path), {**shapes, **(tensors or {})})


def test_fields_of_the_official_configurations(tmp_path):
    run = read("dp_transformer_small", tmp_path)
    m, data = run.config.model, run.config.data
    assert run.cameras == {"exterior_image_1_left": (45, 80), "wrist_image_left": (45, 80)} and run.action_dim == 10
    assert (m.predictor, m.embed_dim, m.depth, m.num_heads, m.timestep_embed_dim) == ("transformer", 64, 3, 4, 32)
    assert (data.window.obs, data.window.action, data.window.next_obs) == ((0, 1), tuple(range(1, 17)), ())
    assert (data.resize, data.crop, data.augment.draw) == ((56, 88), (48, 48), "batch")
    assert run.normalized == {"action": True} and run.conflicts == ()

    run = read(
        "dp_unet_fourier", tmp_path, ("num_train_steps: 100", "num_train_steps: 100\n  num_train_noise_samples: 2")
    )
    u = run.config.model.unet
    assert run.config.model.predictor == "unet" and run.config.diffusion.num_train_noise_samples == 2
    assert (u.down_dims, u.kernel_size, u.groups, u.fourier) == ((16, 24), 3, 8, True)
    assert run.config.data.window.action == tuple(range(8))

    d = read("dp_flow_small", tmp_path, ("timeshift: 1.0", "timeshift: 2.5")).config.diffusion
    assert (d.kind, d.timeshift, d.num_inference_steps) == ("flow", 2.5, 10)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("dp_flow_small", [("imagenet_norm: true", "imagenet_norm: false")], "imagenet_norm is false, which we do not"),
        (
            "dp_flow_small",
            [("imagenet_norm: true", "imagenet_norm: true\n    vision_backbone: clip")],
            "vision_backbone is 'clip', which we do not model",
        ),
        ("dp_unet_small", [("local_cond_dim: null", "local_cond_dim: 4")], "local_cond_dim is set"),
        ("dp_unet_small", [("UnetNoise", "MlpNoise")], "MlpNoisePredictionNet'; only"),
        ("dp_flow_small", [("ImageFlowPolicy", "ImageScorePolicy")], "models.dp.ImageScorePolicy'; only 'models.uwm"),
        ("dp_flow_small", [("num_frames: 17\n", "num_frames: 19\n")], "reads no frame after its actions, so it should"),
        (
            "dp_flow_small",
            [("    embed_dim: 48\n    resize", "    embed_dim: 64\n    resize")],
            "networks of one width",
        ),
    ],
)
def test_what_we_do_not_model_is_refused_by_name(tmp_path, name, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        read(name, tmp_path, *changes)


@pytest.mark.parametrize(
    "name, changes, field",
    [
        (
            "dp_transformer_small",
            ("    depth: 3", "    depth: 4"),
            "model.noise_pred_net.depth is 4, but the tensors say 3",
        ),
        ("dp_transformer_small", ("timestep_embed_dim: 32", "timestep_embed_dim: 64"), "timestep_embed_dim is 64"),
        (
            "dp_transformer_small",
            ("use_low_dim: false", "use_low_dim: true"),
            "the condition (2 cameras x 2 frames x 64",
        ),
        (
            "dp_unet_small",
            ("    - 64\n    kernel", "    kernel"),
            "down_dims is (16, 32), but the tensors say (16, 32, 64)",
        ),
        ("dp_unet_small", ("kernel_size: 3", "kernel_size: 5"), "model.noise_pred_net.kernel_size is 5"),
        (
            "dp_unet_fourier",
            ("step: true", "step: false"),
            "continuous_diffusion_step is False, but the tensors say True",
        ),
    ],
)
def test_fields_that_the_tensors_contradict(tmp_path, name, changes, field):
    lines = read(name, tmp_path, changes).conflicts
    assert any(field in line for line in lines), lines


def test_system_flag_tells_where_the_configuration_does_not(tmp_path, capsys):
    text = reference.official_yaml("dp_flow_small").read_text()
    (tmp_path / "c.yaml").write_text(text.replace("_target_: models.dp.ImageFlowPolicy", "_target_: mine.Policy"))
    shapes = {key: x.shape for key, x in reference.weights("dp_flow_small").items()}
    run = read_official(OfficialYaml(tmp_path / "c.yaml"), shapes, "dp")
    config_lib.validate(run.config)
    assert run.config.system == "dp" and run.config.diffusion.kind == "ddim"
    assert cli.call(convert.main, ["convert", "from-torch", "--system=dpp"], convert.define_flags) == 2
    assert "dpp" in capsys.readouterr().err
