"""The sample command: the official code's numbers, and what it says about unfit inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden import reference
from uwm_jax import cli, convert, sample
from uwm_jax import config as config_lib
from uwm_jax.codecs import PixelsCodec
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.systems.uwm import official
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.torch_bridge import layout
from uwm_jax.training import inference
from uwm_jax.training import workdir as workdir_lib

MODES = ("policy", "video", "forward", "inverse", "joint")


def command(module: ModuleType, *arguments: str) -> int:
    """Runs a command in this process; returns its exit status."""
    return cli.call(module.main, [module.__name__, *arguments], module.define_flags)


# --- the golden numbers -------------------------------------------------------------------------


class Golden:
    """A golden set, converted by the real command, and how to run commands on it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.numbers = name, folder, reference.numbers(name)
        self.workdir = folder / "run"
        weights, normalizer = folder / "official.safetensors", folder / "normalizer.npz"
        save_file(reference.weights(name), weights)
        pair = {f"action/{part}": self.numbers[f"action_{part}"] for part in ("scale", "offset")}
        np.savez(normalizer, **pair)
        self.run(
            convert,
            "from-torch",
            f"--input={weights}",
            f"--official-config={reference.official_yaml(name)}",
            f"--normalizer={normalizer}",
            f"--workdir={self.workdir}",
        )

    def run(self, module: ModuleType, *arguments: str) -> None:
        if self.name == "uwm_libero_small":
            assert command(module, *arguments) == 0
        else:  # one of the two sets goes through processes of its own, as a user runs them
            line = [sys.executable, "-m", module.__name__, *arguments]
            result = subprocess.run(line, capture_output=True, text=True, timeout=600)
            assert result.returncode == 0, result.stderr

    def sample(self, mode: str, noise: str, extra: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """OUT of the sample command for the golden observations."""
        g, inputs = self.numbers, self.folder / f"{noise}.npz"
        arrays = {k: v for k, v in g.items() if k.startswith(("obs/", "next_obs/"))}
        arrays |= {
            "action": g["action"],
            "noise/action": g[f"{noise}/action"],
            "noise/next_obs": reference.channels_last(g[f"{noise}/next_obs"]),
        }
        np.savez(inputs, **arrays, **extra)
        output = self.folder / f"{noise}.out.npz"
        self.run(sample, f"--workdir={self.workdir}", f"--mode={mode}", f"--inputs={inputs}", f"--output={output}")
        with np.load(output, allow_pickle=False) as file:
            return dict(file)

    def expected(self, key: str) -> np.ndarray:
        value = self.numbers[key]
        return reference.channels_last(value) if value.ndim == 6 else value


@pytest.fixture(scope="module", params=["uwm_libero_small", pytest.param("uwm_droid_small", marks=pytest.mark.slow)])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


def test_one_evaluation_matches_the_official_code(golden: Golden) -> None:
    timestep = {k: v for k, v in golden.numbers.items() if k.startswith("timestep/")}
    out = golden.sample("denoise", "noise", timestep)
    keys = {"noise_pred/action", "noise_pred/next_obs", "loss/action", "loss/next_obs", "obs_feat", "next_obs_latent"}
    assert out.keys() == keys
    for key in keys:
        np.testing.assert_allclose(out[key], golden.expected(key), rtol=0, atol=2e-5, err_msg=key)


@pytest.mark.slow
def test_five_modes_match_the_official_code(golden: Golden) -> None:
    out = golden.sample(",".join(MODES), "init_noise", {})
    cameras = sorted(k.removeprefix("obs/") for k, v in golden.numbers.items() if k.startswith("obs/") and v.ndim == 5)
    for mode in MODES:
        made = {k.removeprefix(f"{mode}/") for k in out if k.startswith(f"{mode}/")}
        actions = {"action", "action_normalized"} if mode in ("policy", "inverse", "joint") else set()
        video = (
            {"next_obs_latent", *(f"next_obs/{c}" for c in cameras)} if mode in ("video", "forward", "joint") else set()
        )
        assert made == actions | video, mode
        for key in sorted(made & {"action", "action_normalized", "next_obs_latent"}):
            name = f"{mode}/{key}"
            np.testing.assert_allclose(out[name], golden.expected(name), rtol=0, atol=1e-4, err_msg=name)
    frames = np.clip(golden.expected("forward/next_obs_image"), 0, 1) * 255  # (B, V, T, h, w, 3)
    for view, camera in enumerate(cameras):
        decoded = out[f"forward/next_obs/{camera}"]
        assert decoded.dtype == np.uint8
        assert np.abs(decoded - frames[:, view]).max() <= 1.0


@pytest.mark.slow
def test_images_and_gradients_match_the_official_code(golden: Golden) -> None:
    system, params, frozen, _ = inference.load_for_inference(golden.workdir)
    g = golden.numbers
    batch = {k: v for k, v in g.items() if k.startswith("obs/")}
    current, following = system.images(batch)
    assert following is None
    np.testing.assert_allclose(current, golden.expected("enc/curr_imgs"), rtol=0, atol=2e-5)

    batch |= {"action": g["action_normalized"], "next_obs_latent": golden.expected("next_obs_latent")}
    noise = {m: golden.expected(f"noise/{m}") for m in ("action", "next_obs")}
    timestep = {m: g[f"timestep/{m}"].astype(np.int32) for m in ("action", "next_obs")}

    def loss(params: dict) -> jax.Array:
        found = system.losses(params, system.encode(frozen, batch), {"noise": noise, "timestep": timestep})
        return sum(x.mean() for x in found.parts.values())

    gradients = layout.to_official(jax.jit(jax.grad(loss))(params), official.entry_of(system.config.model.patch))
    names = [k.removeprefix("grad/") for k in g if k.startswith("grad/")]
    assert len(names) == 7
    for name in names:
        expected = g[f"grad/{name}"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(gradients[name] / scale, expected / scale, rtol=0, atol=1e-3, err_msg=name)


# --- behaviour, on a tiny model -----------------------------------------------------------------

CAMERAS = {"front": (12, 16), "wrist": (16, 16)}


def tiny_system() -> UWM:
    config = config_lib.base()
    config.model.update(embed_dim=16, depth=1, num_heads=2, num_registers=1, timestep_embed_dim=8)
    config.model.encoder.update(stage_sizes=(1,), width=16, use_low_dim=True)
    config.model.codec.name = "pixels"
    config.diffusion.num_inference_steps = 2
    config.data.update(cameras=tuple(CAMERAS), low_dim=("state",), resize=(10, 10), crop=(8, 8))
    config.data.window.update(obs=(0, 1), action=(1, 2, 3), next_obs=(4, 5))
    pairs = {"action": (np.float32([2, 4]), np.float32([1, -1])), "state": (np.float32([2]), np.float32([3]))}
    spec = DataSpec(
        WindowSpec.from_config(config.data.window),
        CAMERAS,
        {"state": 1},
        action_dim=2,
        text_dim=0,
        normalizer=Normalizer(pairs),
    )
    return UWM(config, spec, PixelsCodec())


def perturbed(params: dict) -> dict:
    """Parameters without the zeros of the initialisation, which would make every prediction zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    system, workdir = tiny_system(), tmp_path_factory.mktemp("tiny") / "run"
    params = perturbed(jax.jit(system.init)(jax.random.key(0)))
    workdir_lib.save_params_only(workdir, system.config, system.spec, params, step=7)
    return workdir


def tiny_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        f"{group}/{camera}": rng.integers(0, 256, (2, 2, *size, 3), np.uint8)
        for group in ("obs", "next_obs")
        for camera, size in CAMERAS.items()
    }
    arrays["obs/state"] = rng.standard_normal((2, 2, 1)).astype(np.float32)
    arrays["action"] = rng.standard_normal((2, 3, 2)).astype(np.float32)
    return arrays


def run_tiny(workdir: Path, tmp_path: Path, arrays: dict[str, np.ndarray], *arguments: str) -> dict[str, np.ndarray]:
    np.savez(tmp_path / "in.npz", **arrays)
    paths = [f"--workdir={workdir}", f"--inputs={tmp_path / 'in.npz'}", f"--output={tmp_path / 'out' / 'out.npz'}"]
    assert command(sample, *paths, *arguments) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["out.npz"]
    with np.load(tmp_path / "out" / "out.npz", allow_pickle=False) as file:
        return dict(file)


def test_output_keys_units_and_seed(tiny: Path, tmp_path: Path) -> None:
    arrays = tiny_inputs()
    out = run_tiny(tiny, tmp_path, arrays, "--mode=joint")
    shapes = {key: (value.shape, value.dtype.name) for key, value in out.items()}
    assert shapes == {
        "action": ((2, 3, 2), "float32"),
        "action_normalized": ((2, 3, 2), "float32"),
        "next_obs_latent": ((2, 2, 2, 8, 8, 3), "float32"),
        "next_obs/front": ((2, 2, 8, 8, 3), "uint8"),
        "next_obs/wrist": ((2, 2, 8, 8, 3), "uint8"),
    }
    np.testing.assert_allclose(out["action"], out["action_normalized"] * [2, 4] + [1, -1], rtol=1e-6)
    again = run_tiny(tiny, tmp_path, arrays, "--mode=joint", "--seed=0", "--step=7")
    assert all(np.array_equal(out[key], again[key]) for key in out)
    other = run_tiny(tiny, tmp_path, arrays, "--mode=joint", "--seed=1")
    assert not np.array_equal(out["action"], other["action"])
    # A row's noise is a function of the seed and its index, so a prefix of the batch gives the same rows.
    alone = run_tiny(tiny, tmp_path, {k: v[:1] for k, v in arrays.items()}, "--mode=joint")
    np.testing.assert_allclose(alone["action"], out["action"][:1], atol=1e-5)


@pytest.mark.slow
def test_given_noise_units_of_inputs_and_overrides(tiny: Path, tmp_path: Path) -> None:
    arrays = tiny_inputs()
    drawn = run_tiny(tiny, tmp_path, arrays, "--mode=policy,forward")
    system = inference.load_for_inference(tiny)[0]
    noise = system.noise(jax.random.key(0), jnp.arange(2), "policy")
    given = arrays | {f"noise/{m}": np.asarray(v) for m, v in noise.items()}
    same = run_tiny(tiny, tmp_path, given, "--mode=policy,forward", "--seed=5")
    assert same.keys() == drawn.keys()
    for key in drawn:
        np.testing.assert_allclose(same[key].astype(float), drawn[key], atol=1e-5, err_msg=key)
    # `action` is in raw units: the model sees (action - offset) / scale.
    shifted = run_tiny(tiny, tmp_path, given | {"action": arrays["action"] + 1}, "--mode=policy,forward")
    np.testing.assert_array_equal(shifted["policy/action"], same["policy/action"])
    assert not np.array_equal(shifted["forward/next_obs_latent"], same["forward/next_obs_latent"])
    more_steps = run_tiny(tiny, tmp_path, given, "--mode=policy", "--config.diffusion.num_inference_steps=5")
    assert not np.allclose(more_steps["action"], same["policy/action"], atol=1e-3)


@pytest.mark.slow
def test_latents_stand_in_for_frames(tiny: Path, tmp_path: Path) -> None:
    arrays = tiny_inputs()
    system = inference.load_for_inference(tiny)[0]
    latents = jax.jit(lambda batch: system.codec.encode({}, system.images(batch)[1], None))(arrays)
    frames = run_tiny(tiny, tmp_path, arrays, "--mode=inverse")
    arrays = {k: v for k, v in arrays.items() if not k.startswith("next_obs/")}
    instead = run_tiny(tiny, tmp_path, arrays | {"next_obs_latent": np.asarray(latents)}, "--mode=inverse")
    np.testing.assert_allclose(instead["action"], frames["action"], atol=1e-4)


def test_unused_keys_are_ignored() -> None:
    system, arrays = tiny_system(), tiny_inputs()
    unused = {
        "action": np.zeros(3, "U5"),
        "next_obs/front": np.zeros(1),
        "noise/next_obs": np.zeros((2, 2, 2, 8, 8, 3)),
    }
    unused |= {"timestep/action": np.zeros(2), "obs/pose": np.zeros(1), "action_mask": np.zeros(1)}
    inputs = sample.check_inputs(system, ["policy"], arrays | unused, data_keys={"pose"})
    assert inputs.batch.keys() == {"obs/front", "obs/wrist", "obs/state"}
    assert inputs.noise.keys() == {"next_obs"}  # it hides the modality that the policy does not see
    given_actions = sample.check_inputs(system, ["forward"], arrays | {"noise/action": np.zeros(1)})
    assert given_actions.noise == {} and "action" in given_actions.batch


def test_unknown_keys_are_refused_with_a_suggestion() -> None:
    system, arrays = tiny_system(), tiny_inputs()
    typos = ("noise/actoin", "timestep/nextobs", "obs/frnt", "next_obs/wrst", "actions", "obs/xyzzy", "notes")
    with pytest.raises(UserError) as error:
        sample.check_inputs(system, ["policy"], arrays | dict.fromkeys(typos, np.zeros(1)), "IN.npz", {"pose"})
    for line in (
        "IN.npz, for mode policy:",
        "unknown key noise/actoin: did you mean noise/action?",
        "unknown key timestep/nextobs: did you mean timestep/next_obs?",
        "unknown key obs/frnt: did you mean obs/front?",
        "unknown key next_obs/wrst: did you mean next_obs/wrist?",
        "unknown key actions: did you mean action?",
        "unknown key obs/xyzzy: known are obs/front, obs/pose, obs/state, obs/text, obs/wrist.",
        "unknown key notes: known are action, action_mask, next_obs/front,",
    ):
        assert line in str(error.value)


def test_observations_that_the_model_does_not_read_pass_where_the_data_is_not_known() -> None:
    """That of a converted checkpoint; but not what seems to be a key of the model that is missing."""
    system, arrays = tiny_system(), tiny_inputs()
    more = {"obs/cartesian_position": np.zeros(1), "next_obs/gripper": np.zeros(1), "obs/wrist_2": np.zeros(1)}
    assert sample.check_inputs(system, ["policy"], arrays | more, data_keys=None).batch_size == 2
    for key, message in (("obs/wrsit", "obs/wrsit: did you mean obs/wrist"), ("noise/acton", "noise/acton: did you")):
        given = {name: value for name, value in arrays.items() if name != "obs/wrist"} | {key: np.zeros(1)}
        with pytest.raises(UserError, match=message):
            sample.check_inputs(system, ["policy"], given, data_keys=None)


def test_inputs_far_out_of_the_normalisers_range_are_told() -> None:
    """Given actions and observations; those of the tiny model are of -1 to 3 and -5 to 3, the state of 1 to 5."""
    system, arrays = tiny_system(), tiny_inputs()
    arrays["action"] = np.float32([[[-1, 3], [3, -5], [1, 3.9]]] * 2)
    arrays["obs/state"] = np.full((2, 2, 1), 5, np.float32)
    assert sample.far_out_inputs(system, sample.check_inputs(system, ["forward"], arrays)) == []
    arrays["action"][0, :2, 1] = 300
    arrays["obs/state"][:, 0] = 7
    action, state = sample.far_out_inputs(system, sample.check_inputs(system, ["forward"], arrays))[::-1]
    assert "action is far outside the range that the model was trained on: column 1 (33.3% of its values)." in action
    assert "Column 1 was within about -5 to 3 there." in action and "column 0" not in action
    assert "state is far out" in state and "column 0 (50.0% of its values)" in state
    assert len(sample.far_out_inputs(system, sample.check_inputs(system, ["policy"], arrays))) == 1, (
        "it reads no action"
    )


def test_every_unfit_key_is_named() -> None:
    system, arrays = tiny_system(), tiny_inputs()
    del arrays["obs/front"]
    arrays["obs/wrist"] = arrays["obs/wrist"].astype(np.float32)
    arrays["obs/state"] = arrays["obs/state"][:, :1]
    arrays["action"][0, 0, 0] = np.nan
    arrays["noise/action"] = np.zeros((3, 3, 2), np.float32)
    arrays["timestep/action"] = np.array([0, 100])
    arrays["noise/next_obs"] = np.full((2, 2, 2, 8, 8, 3), 1e300)  # finite, but not in float32
    with pytest.raises(UserError) as error:
        sample.check_inputs(system, ["denoise"], arrays, "IN.npz")
    for part in (
        "IN.npz, for mode denoise",
        "missing obs/front: expected uint8 (B, 2, 12, 16, 3)",
        "obs/wrist: expected uint8 (B, 2, 16, 16, 3), found float32 (2, 2, 16, 16, 3)",
        "obs/state: expected float32 (B, 2, 1), found float32 (2, 1, 1)",
        "action: holds values that are not finite",
        "noise/action: expected B = 2 rows like the keys before it, found 3",
        "noise/next_obs: holds values that are not finite",
        "timestep/action: expected 0 to 99, found 0 to 100",
        "missing timestep/next_obs: expected integer (B)",
    ):
        assert part in str(error.value)
    del arrays["noise/next_obs"]
    with pytest.raises(UserError, match=r"missing noise/next_obs: expected float32 \(B, 2, 2, 8, 8, 3\)"):
        sample.check_inputs(system, ["denoise"], arrays)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode=policies"], "policies"),
        (["--mode="], "--mode is required"),
        (["--mode=policy,policy"], "different modes"),
        (["--mode=policy", "--step=3"], "[7]"),
        (["--mode=policy", "--inputs=none.npz"], "none.npz"),
        (["--mode=policy", "--workdir=nowhere"], "nowhere"),
        (["--mode=policy", "extra"], "extra"),
        (["--mode=policy", "--config.model.dept=3"], "model.depth"),
        (["--mode=policy", "--output=."], "folder"),
        (["--mode=policy", "--output={tmp}/in.npz/out.npz"], "in.npz' is not a folder"),
        (["--mode=policy", "--seed=-1"], "seed"),
        (["--mode=policy", "--seed=4294967296"], "seed"),
    ],
)
def test_unusable_flags_end_with_status_2(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    np.savez(tmp_path / "in.npz", **tiny_inputs())
    given = [f"--workdir={tiny}", f"--inputs={tmp_path / 'in.npz'}", f"--output={tmp_path / 'out.npz'}"]
    assert command(sample, *given, *(a.format(tmp=tmp_path) for a in arguments)) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "out.npz").exists()


def test_unreadable_inputs_end_with_status_2(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", **{"obs/front": np.array([{}], dtype=object)})
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("one.npy", "objects.npz", "text.npz"):
        paths = [f"--workdir={tiny}", f"--inputs={tmp_path / name}", f"--output={tmp_path / 'out.npz'}"]
        assert command(sample, *paths, "--mode=policy") == 2
        assert name in capsys.readouterr().err


def test_only_used_keys_are_read(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unreadable = np.array([{"a": 1}], dtype=object)
    unused = {"action": unreadable, "next_obs_latent": unreadable, "noise/action": unreadable}
    unused["timestep/action"] = unreadable
    out = run_tiny(
        tiny, tmp_path, tiny_inputs() | {k: v for k, v in unused.items() if k != "noise/action"}, "--mode=policy"
    )
    assert np.isfinite(out["action"]).all()
    np.savez(tmp_path / "bad.npz", **(tiny_inputs() | unused | {"obs/state": unreadable}))
    paths = [f"--workdir={tiny}", f"--inputs={tmp_path / 'bad.npz'}", f"--output={tmp_path / 'none.npz'}"]
    assert command(sample, *paths, "--mode=policy") == 2
    message = capsys.readouterr().err
    for key in ("obs/state", "noise/action"):
        assert f"bad.npz: {key} is not a readable plain array" in message
    for key in ("next_obs_latent", "notes"):
        assert key not in message


def test_results_that_are_not_finite_are_not_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = tiny_inputs()
    arrays["obs/state"] = np.full((2, 2, 1), 3e38, np.float32)  # finite, and too large for any product
    np.savez(tmp_path / "in.npz", **arrays)
    paths = [f"--workdir={tiny}", f"--inputs={tmp_path / 'in.npz'}", f"--output={tmp_path / 'out.npz'}"]
    for modes, keys in (("policy", "action, action_normalized"), ("policy,video", "policy/action, ")):
        assert command(sample, *paths, f"--mode={modes}") == 2
        message = capsys.readouterr().err
        assert f"--mode={modes}: the results {keys}" in message and "not finite" in message
    assert not (tmp_path / "out.npz").exists()
