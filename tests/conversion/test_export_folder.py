"""Export folders: what is in them, that they run with nothing else, and that they come back to the bit."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conversion import standalone
from tests.golden import reference
from tests.systems.small import on_tiny_dataset, small_config
from uwm_jax import cli, convert, systems
from uwm_jax.backend import JaxBackend
from uwm_jax.codecs import PixelsCodec
from uwm_jax.conversion import probe as probe_lib
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.policy import Policy
from uwm_jax.systems.base import System
from uwm_jax.torch_bridge import description
from uwm_jax.torch_bridge.torch_backend import load_program
from uwm_jax.train import train
from uwm_jax.training import inference
from uwm_jax.training import workdir as workdir_lib

FILES = ["model.json", "model.safetensors", "probe.npz", "uwm_torch.py"]
FAST = "dp_unet_fourier"  # the smallest golden set
PAD_NAMES = ("pad_small", "pad_libero_small")
# All golden sets but the largest of GR1, whose round trip tests/systems/gr1 has.
ALL = (*reference.NAMES, *reference.DP_NAMES, *PAD_NAMES, reference.GR1_NAMES[0])
TRAINED = "uwm"  # a variant of `small_config`
STEPS = 12  # of its training, large ones: it should not act as if it saw nothing

Run = Callable[[str], Path]
Export = Callable[..., Path]


def command(*arguments: str) -> int:
    return cli.call(convert.main, ["convert", *map(str, arguments)], convert.define_flags)


def slow_unless(name: str, *fast: str) -> object:
    return pytest.param(name, marks=() if name in fast else pytest.mark.slow)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Run:
    """A function: name of a golden set, or `TRAINED` -> its workdir."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if name == TRAINED:
            config = on_tiny_dataset(small_config(name), tiny_dataset)
            config.total_steps = config.checkpoint.every = STEPS
            config.optimizer.learning_rate, config.optimizer.ema_decay, config.eval.every = 1e-2, 0.5, 0
            train(config, folder / "run")
            return folder / "run"
        save_file(reference.weights(name), folder / "source.safetensors")
        numbers = reference.numbers(name)
        given = ["--no_normalizer"]
        if "action_scale" in numbers:
            pair = {f"action/{part}": numbers[f"action_{part}"] for part in ("scale", "offset")}
            np.savez(folder / "normalizer.npz", **pair)
            given = [f"--normalizer={folder / 'normalizer.npz'}"]
        source = [f"--input={folder / 'source.safetensors'}", f"--official-config={reference.official_yaml(name)}"]
        assert command("from-torch", *source, *given, f"--workdir={folder / 'run'}") == 0
        return folder / "run"

    return make


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Export:
    """A function: name, flags of to-torch -> the export folder, which is not to be changed."""

    @functools.cache
    def make(name: str, *flags: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}_out") / "DIR"
        assert command("to-torch", f"--workdir={run(name)}", f"--output={folder}/", *flags) == 0
        return folder

    return make


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def loaded(workdir: Path) -> JaxBackend:
    """The model in float32, as JAX runs it."""
    system, params, frozen, step = inference.load_for_inference(workdir)
    return JaxBackend(probe_lib.in_float32(system), params, frozen, step=step)


# --- what is in a folder --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_run_as_a_folder(run: Run, export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = run(TRAINED)
    capsys.readouterr()
    folder = export(TRAINED)
    assert (
        "tensors of step 12, uses policy, video, forward, inverse, joint; a probe of 2 rows" in capsys.readouterr().out
    )
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one may read all
    package = Path(description.__file__).parent
    assert (folder / "uwm_torch.py").read_bytes() == (package / "uwm_torch.py").read_bytes()
    described = json.loads((folder / "model.json").read_text())
    stored = json.loads((workdir / "checkpoints/12/assets/metadata").read_text())
    prints = described["fingerprints"]
    assert prints["weights"] == sha256(folder / "model.safetensors")
    assert prints["data"] == stored["learned_from"] and len(prints["data"][0]["fingerprint"]) == 64
    assert len(prints["run"]) == 64
    assert (described["parameters"], described["step"]) == ("average", STEPS)
    assert list(described["uses"]) == ["policy", "video", "forward", "inverse", "joint"]
    assert described["uses"]["forward"] == {"makes": ["next_obs"], "given": ["action"]}
    assert (described["acting"], described["system"], described["camera_order"]) == ("policy", "uwm", ["wrist"])
    assert described["noise"] == {"action": [4, 10], "next_obs": described["shapes"]["next_obs_latent"]}
    assert described["limits"] is None
    (robot,) = described["robots"].values()
    assert [part["transform"] for part in robot["parts"]] == ["xyz_euler_to_rot6d", "identity"]
    d = described["diffusion"]
    assert d["previous_timesteps"] == [*d["timesteps"][1:], -1]
    assert described["probe"] == {
        "rows": 2,
        "source": "held-out windows of the run",
        "dtype": "float32",
        "largest_difference": 1e-4,
    }
    with np.load(folder / "probe.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert {key for key in arrays if key.startswith("inputs/")} == {
        f"inputs/{key}" for key in ("obs/wrist", "obs/state", "action", "next_obs/wrist")
    }
    assert (folder / "probe.npz").stat().st_size < 1e6
    backend = loaded(workdir)  # the average, which the export took
    inputs = {key.removeprefix("inputs/"): x for key, x in arrays.items() if key.startswith("inputs/")}
    noise = {key.removeprefix("noise/"): x for key, x in arrays.items() if key.startswith("noise/")}
    for key, x in backend.sample("policy", inputs, noise).items():
        np.testing.assert_allclose(arrays[f"policy/{key}"], x, atol=1e-5)


@pytest.mark.slow
def test_raw_parameters_and_the_average_differ(export: Export) -> None:
    raw, average = export(TRAINED, "--parameters=raw", "--uses=policy"), export(TRAINED, "--uses=policy")
    told = [json.loads((folder / "model.json").read_text()) for folder in (raw, average)]
    assert [d["parameters"] for d in told] == ["raw", "average"]
    assert told[0]["fingerprints"]["weights"] != told[1]["fingerprints"]["weights"]
    assert told[0]["fingerprints"]["run"] == told[1]["fingerprints"]["run"]


@pytest.mark.parametrize("name", [slow_unless(n, FAST) for n in (PAD_NAMES[1], reference.GR1_NAMES[0], FAST)])
def test_what_pytorch_does_not_run_is_weights_and_description(
    run: Run, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["to-torch", f"--workdir={run(name)}", f"--output={tmp_path / 'out'}/"]
    if name == FAST:
        assert command(*line) == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
        return
    assert command(*line, "--uses=policy") == 2
    assert "uwm_torch.py does not run a" in capsys.readouterr().err
    assert command(*line) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES[:2]
    assert "weights and description only, since uwm_torch.py does not run" in capsys.readouterr().out
    assert command("check", tmp_path / "out") == 2
    assert "there is no uwm_torch.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output={full}/"], "is not empty"),
        (["--output={full}/notes.txt/"], "is not empty"),
        (["--output={tmp}/out.onnx"], "ends in .safetensors"),
        (["--output={tmp}/a.safetensors", "--uses=policy"], "--uses: only for a folder"),
        (["--output={tmp}/a.safetensors", "--limits=0:1"], "--limits: only for a folder"),
        (["--output={tmp}/out", "--uses=policy,vidio"], "has no use 'vidio': policy"),
        (["--output={tmp}/out", "--limits=1:0"], "LOW:HIGH for all 3 columns"),
        (["--output={tmp}/out", "--limits=0:1,0:1"], "or 3 such pairs"),
        (["--output={tmp}/out", "--device=cuda"], "--device is a flag of check; to-torch does not take it"),
    ],
)
def test_unusable_outputs_end_with_status_2(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    flags = [flag.format(tmp=tmp_path, full=tmp_path / "full") for flag in flags]
    assert command("to-torch", f"--workdir={run(FAST)}", *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_limits_are_stated(export: Export) -> None:
    limits = json.loads((export(FAST, "--limits=-1:0.1,0:,:2") / "model.json").read_text())["limits"]
    assert limits == {"low": [-1, 0, None], "high": [float(np.float32(0.1)), None, 2]}


def save_zeros(workdir: Path, system: System) -> None:
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    workdir_lib.save_params_only(workdir, system.config, system.spec, params)


def test_an_adaln_that_official_checkpoints_lack_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config("dp")
    config.model.adaln, config.data.cameras, config.data.low_dim = "shared", ("a",), ("state",)
    window = WindowSpec.from_config(config.data.window)
    system = systems.make(config, DataSpec(window, {"a": (16, 16)}, {"state": 3}, 2, 0, Normalizer()))
    save_zeros(tmp_path / "run", system)
    assert command("to-torch", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}/") == 2
    assert "config.model.adaln='shared'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_codec_without_tensors_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_lib, "make", lambda *_: probe_lib.Probe({"inputs/x": np.zeros(2)}, "left out"))
    config = small_config("uwm")
    config.model.codec.name, config.data.cameras, config.data.low_dim = "pixels", ("a",), ("state",)
    spec = DataSpec(WindowSpec.from_config(config.data.window), {"a": (16, 16)}, {"state": 3}, 2, 0, Normalizer())
    save_zeros(tmp_path / "run", systems.make(config, spec, PixelsCodec()))
    folder = tmp_path / "DIR"
    assert command("to-torch", f"--workdir={tmp_path / 'run'}", f"--output={folder}/", "--uses=policy") == 0
    source = f"--input={folder / 'model.safetensors'}", f"--official-config={folder / 'model.json'}"
    assert command("from-torch", *source, f"--workdir={tmp_path / 'back'}") == 0


@pytest.mark.slow
def test_without_its_data_a_run_has_a_synthetic_probe(run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run(TRAINED), workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (workdir / "config.json").write_text(json.dumps(config))
    system, *_ = inference.load_for_inference(workdir)
    with pytest.raises(probe_lib.UserError):
        probe_lib.held_out_inputs(system, workdir, STEPS)
    inputs = probe_lib.synthetic_inputs(system)
    like = system.spec.batch_like(probe_lib.ROWS)
    assert {key: (x.shape, x.dtype) for key, x in inputs.items()} == {
        key: (x.shape, x.dtype) for key, x in like.items() if key not in ("action_mask", "row")
    }
    low, offset = system.spec.normalizer.entries["action"]
    assert np.abs((inputs["action"] - offset) / low).max() <= 1 + 1e-5
    assert inputs["obs/wrist"].std() > 20


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [slow_unless(n, FAST, PAD_NAMES[1]) for n in (*ALL, TRAINED)])
def test_the_round_trip_is_bit_exact(run: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Official weights, or an average, through workdir and folder: equal files; from the folder, once more."""
    monkeypatch.setattr(probe_lib, "make", lambda *_: probe_lib.Probe({"inputs/x": np.zeros(2)}, "left out"))
    workdir, folders = run(name), [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        assert command("to-torch", f"--workdir={workdir}", f"--output={folder}/") == 0
        workdir = tmp_path / "run"
        source = [f"--input={folder / 'model.safetensors'}", f"--official-config={folder / 'model.json'}"]
        if folder is folders[0]:
            assert command("from-torch", *source, f"--workdir={workdir}") == 0
    if name != TRAINED:
        official = load_file(run(name).parent / "source.safetensors")
        for key, found in load_file(folders[0] / "model.safetensors").items():
            assert (found.dtype, found.shape) == (official[key].dtype, official[key].shape)
            assert found.tobytes() == official.pop(key).tobytes(), key
        assert not official
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
    first, second = (json.loads((folder / "model.json").read_text()) for folder in folders)
    assert (
        first["fingerprints"]["weights"]
        == second["fingerprints"]["weights"]
        == sha256(folders[0] / "model.safetensors")
    )
    differing = {key for key in first | second if first.get(key) != second.get(key)}
    learned = first["fingerprints"]["data"]
    assert learned == second["fingerprints"]["data"] and (learned is not None) == (name == TRAINED)
    taken_from = ("parameters", "share_of_start") if name == TRAINED else ()  # it is the new workdir's own parameters
    assert differing <= {"code_version", "fingerprints", *taken_from}


# --- it runs with nothing else --------------------------------------------------------------------------------------


def alone(folder: Path, tmp_path: Path, steps: dict[str, np.ndarray], *refused: str) -> dict[str, np.ndarray]:
    """What `standalone.py` writes, run in an empty folder that holds a copy of `folder` only."""
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(folder, empty / "DIR")
    np.savez(tmp_path / "steps.npz", **steps)
    script = [sys.executable, "-I", standalone.__file__, str(tmp_path / "steps.npz"), str(tmp_path / "out.npz")]
    result = subprocess.run([*script, *refused], cwd=empty, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in empty.iterdir()] == ["DIR"]
    with np.load(tmp_path / "out.npz") as file:
        return dict(file)


def steps_of_two_episodes(backend: JaxBackend, count: int) -> dict[str, np.ndarray]:
    """Raw observations (count, 2, ...) and the noise that a chunk which begins there would start from."""
    rng, spec = np.random.default_rng(5), backend.spec
    steps: dict[str, np.ndarray] = {}
    for key, like in spec.observation_like(2).items():
        shape = (count, *like.shape)
        if like.dtype == np.uint8:
            steps[f"obs/{key}"] = probe_lib.smooth_frames(rng, shape)
        else:
            values = spec.normalizer.unnormalize(key, rng.uniform(-1, 1, shape).astype(np.float32))
            steps[f"obs/{key}"] = np.asarray(values, np.float32)
    drawn = [backend.noise("policy", 0, np.arange(2), np.full(2, decision)) for decision in range(count)]
    return steps | {f"noise/{m}": np.stack([np.asarray(d[m]) for d in drawn]) for m in drawn[0]}


@pytest.mark.torch
@pytest.mark.parametrize("name", [slow_unless(n, FAST) for n in (FAST, TRAINED, "uwm_libero_small")])
def test_it_runs_where_nothing_else_can_be_imported(run: Run, export: Export, tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    folder, backend = export(name), loaded(run(name))
    steps = steps_of_two_episodes(backend, 5)
    found = alone(folder, tmp_path, steps)
    scale = backend.spec.normalizer.entries["action"][0]
    with np.load(folder / "probe.npz") as file:
        for key in (key for key in file if not key.startswith(("inputs/", "noise/"))):
            difference = np.abs(found[key].astype(np.float64) - file[key])
            if file[key].dtype == np.uint8:
                assert difference.max() <= 1, key
            else:
                unit = scale if key.endswith("/action") else 1.0
                assert (difference / unit).max() < 1e-4 * max(1.0, np.abs(file[key] / unit).max()), key
    policy = Policy(backend, execute=2, batch_size=2)
    policy.reset(range(2))
    expected = [
        policy.act(
            {key[4:]: x[step] for key, x in steps.items() if key.startswith("obs/")},
            noise={key[6:]: x[step] for key, x in steps.items() if key.startswith("noise/")},
        )
        for step in range(5)
    ]
    np.testing.assert_allclose(found["acted"], expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
    assert np.abs(np.diff(np.stack(expected), axis=0)).max() > 1e-3  # they act, and two decisions follow the first


@pytest.mark.slow
@pytest.mark.torch
def test_one_evaluation_of_a_trained_network(run: Run, export: Export) -> None:
    torch = pytest.importorskip("torch")
    folder = export(TRAINED)
    system, params, frozen, _ = inference.load_for_inference(run(TRAINED))
    exact, spec = probe_lib.in_float32(system), system.spec
    module = load_program(folder / "uwm_torch.py", "DIR").load(folder).model
    with np.load(folder / "probe.npz") as file:
        inputs = {key.removeprefix("inputs/"): x for key, x in file.items() if key.startswith("inputs/")}
        noisy = {key.removeprefix("noise/"): x for key, x in file.items() if key.startswith("noise/")}
    encoded = exact.encode(frozen, spec.normalized(inputs))
    features = jax.jit(exact.encode_obs)(params, encoded)
    with torch.no_grad():
        found = module.encode_obs({key: torch.from_numpy(x) for key, x in inputs.items()})
        np.testing.assert_allclose(found, features, atol=2e-5 * max(1, np.abs(features).max()))
        latents = module.codec.encode(module.images({"wrist": torch.from_numpy(inputs["next_obs/wrist"])}))
        np.testing.assert_allclose(latents, encoded["next_obs_latent"], atol=2e-5 * np.abs(latents).max())
        for at in ({"action": 90, "next_obs": 0}, {"action": 17, "next_obs": 63}):
            timestep = {m: np.full(2, t, np.int32) for m, t in at.items()}
            expected = jax.jit(exact.predict)(params, features, noisy, timestep)
            net, steps = module.noise_pred_net, {m: torch.tensor([t]) for m, t in at.items()}
            (modulation,) = net.modulation(torch.tensor(np.asarray(features)), steps)
            embedded = {m: net.embed(m, torch.from_numpy(x)) for m, x in noisy.items()}
            for m, made in net(embedded, modulation, tuple(noisy)).items():
                assert np.abs(expected[m]).max() > 0.05
                np.testing.assert_allclose(made, expected[m], atol=2e-5 * max(1, np.abs(expected[m]).max()))


@pytest.mark.slow
@pytest.mark.torch
def test_uses_leave_out_what_they_do_not_need(
    export: Export, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    whole, folder = export(TRAINED), export(TRAINED, "--uses=policy")
    names = {name for name in load_file(whole / "model.safetensors")} - set(load_file(folder / "model.safetensors"))
    assert names == {f"obs_encoder.pca.{part}" for part in ("mean", "components", "scale")}
    described = json.loads((folder / "model.json").read_text())
    assert list(described["uses"]) == ["policy"] and described["codec"]["included"] is False
    assert not names & described["tensors"].keys()
    backend = loaded(run(TRAINED))
    found = alone(folder, tmp_path, steps_of_two_episodes(backend, 2), "forward", "joint")
    for use, message in zip(("forward", "joint"), found["refused"], strict=True):
        assert f"'{use}'" in message and "policy" in message
    assert {key.partition("/")[0] for key in found} == {"refused", "acted", "policy"}
    with np.load(whole / "probe.npz") as file:
        assert np.abs(found["policy/action_normalized"] - file["policy/action_normalized"]).max() < 1e-4
    capsys.readouterr()
    source = [f"--input={folder / 'model.safetensors'}", f"--official-config={folder / 'model.json'}"]
    assert command("from-torch", *source, f"--workdir={tmp_path / 'back'}") == 2
    message = capsys.readouterr().err
    assert "was exported for policy only, without the codec" in message and not (tmp_path / "back").exists()
