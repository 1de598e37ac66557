"""The file that runs an export by itself: official numbers, those of our JAX model, and clear refusals."""

from __future__ import annotations

import ast
import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.golden import reference
from tests.torch_bridge.exports import ARM, CAMERAS, export
from uwm_jax.conversion.from_torch import from_torch
from uwm_jax.conversion.to_torch import to_torch

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from uwm_jax.torch_bridge import uwm_torch  # noqa: E402

EVALUATION, USE = 2e-5, 1e-4  # differences of float32 that are allowed, relative to the largest value
# One small set stays among the fast tests.
FAST = "dp_unet_fourier"
GOLDEN = [pytest.param(n, marks=() if n == FAST else pytest.mark.slow) for n in (*reference.NAMES, *reference.DP_NAMES)]


def relative(found, wanted) -> float:
    """Largest difference relative to the largest value."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# --- official numbers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A function: name of a golden set -> the policy of its export, and its numbers with channels last."""

    @functools.cache
    def load(name: str):
        folder = tmp_path_factory.mktemp(name)
        g = reference.numbers(name)
        save_file(reference.weights(name), folder / "source.safetensors")
        np.savez(folder / "n.npz", **{"action/scale": g["action_scale"], "action/offset": g["action_offset"]})
        run = folder / "run"
        from_torch(folder / "source.safetensors", reference.official_yaml(name), run, folder / "n.npz")
        numbers = {key: reference.channels_last(x) if x.ndim == 6 else x for key, x in g.items()}
        to_torch(run, folder / "out" / "model.safetensors")
        return uwm_torch.load(folder / "out"), numbers

    return load


@pytest.mark.parametrize("name", GOLDEN)
def test_official_features_and_predictions(official, name):
    policy, g = official(name)
    model = policy.model
    with torch.no_grad():
        inputs = {key: torch.from_numpy(x) for key, x in g.items() if key.startswith("obs/")}
        features = model.encode_obs(inputs)
        assert relative(features, g["obs_feat"]) < EVALUATION
        if "noisy/action" in g:
            noisy = {"action": torch.from_numpy(g["noisy/action"])}
        else:
            clean = {"action": g["action_normalized"], "next_obs": g["next_obs_latent"]}
            abar = np.float32(policy.description["diffusion"]["alphas_cumprod"])
            noisy = {}
            for m, x in clean.items():
                a = abar[g[f"timestep/{m}"]].reshape(-1, *[1] * (x.ndim - 1))
                noisy[m] = torch.from_numpy(np.sqrt(a) * x + np.sqrt(1 - a) * g[f"noise/{m}"])
        for row in range(len(features)):  # each has timesteps of its own
            own = slice(row, row + 1)
            timesteps = {m: torch.from_numpy(g[f"timestep/{m}"][own]) for m in noisy}
            (modulation,) = model.noise_pred_net.modulation(features[own], timesteps)
            embedded = {m: model.noise_pred_net.embed(m, x[own]) for m, x in noisy.items()}
            for m, found in model.noise_pred_net(embedded, modulation, tuple(noisy)).items():
                assert relative(found, g[f"noise_pred/{m}"][own]) < EVALUATION


@pytest.mark.parametrize("name", GOLDEN)
def test_official_samples_of_every_use(official, name):
    policy, g = official(name)
    inputs = {key: x for key, x in g.items() if key.startswith(("obs/", "next_obs/"))} | {"action": g["action"]}
    noise = {m: g[f"init_noise/{m}"] for m in ("action", "next_obs") if f"init_noise/{m}" in g}
    compared = 0
    for use in policy.uses:
        made = policy.sample(use, inputs, noise, float_frames=True)
        for key, x in made.items():
            if f"{use}/{key}" in g:
                assert relative(x, g[f"{use}/{key}"]) < USE, (use, key)
                compared += 1
        if (key := f"{use}/next_obs_image") in g:
            frames = np.stack([made[f"next_obs_float/{camera}"] for camera in sorted(policy.description["cameras"])], 1)
            wanted = g[key]
            assert np.abs(np.clip(frames, 0, 1) - np.clip(wanted, 0, 1)).max() < USE
            compared += 1
    assert compared == (10 if "next_obs" in noise else 2)


# --- our JAX model --------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict]] = {
    "uwm": ("uwm", {"robot": ARM}),
    "uwm of pixels, reads text, predicts velocities": (
        "uwm",
        {
            "model__codec__name": "pixels", "model__encoder__use_language": True, "data__text": "text",
            "model__encoder__pool": "average", "model__encoder__use_low_dim": False, "model__num_registers": 0,
            "model__qkv_bias": False, "diffusion__prediction__action": "v", "diffusion__prediction__next_obs": "sample",
            "diffusion__spacing": "trailing", "diffusion__hide_at": "train", "diffusion__clip__action": 0,
        },
    ),
    "dp": ("dp", {"robot": ARM}),
    "dp by U-Net, reads text": (
        "dp_unet",
        {"model__encoder__use_language": True, "data__text": "text", "model__unet__fourier": True},
    ),
    "dp by flow": ("dp_flow", {"diffusion__timeshift": 2.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function: name of a variant -> its export."""

    @functools.cache
    def make(name: str):
        variant, fields = VARIANTS[name]
        return export(tmp_path_factory.mktemp("export") / "DIR", variant, **fields)

    return make


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "pixels" in n else ()) for n in VARIANTS])
def test_every_use_equals_jax(tiny, name):
    it = tiny(name)
    policy, inputs, noise = uwm_torch.load(it.folder), it.inputs(3), it.noise(3)
    expected = it.answers(inputs, noise)
    assert policy.uses == {use: about.makes for use, about in it.system.uses.items()}
    for use, wanted in expected.items():
        made = policy.sample(use, inputs, noise, float_frames=True)
        frames = {f"next_obs/{camera}" for camera in CAMERAS} if "next_obs" in policy.uses[use] else set()
        assert made.keys() == wanted.keys() | frames
        for key, x in wanted.items():
            assert relative(made[key], x) < USE, (use, key)
        for key in frames:
            x = wanted[key.replace("next_obs/", "next_obs_float/")]
            assert made[key].dtype == np.uint8
            assert np.abs(made[key] - np.clip(x, 0, 1) * 255).max() < 0.51  # it is rounded


def test_latents_stand_in_for_next_frames(tiny):
    it = tiny("uwm")
    policy, inputs, noise = uwm_torch.load(it.folder), it.inputs(2), it.noise(2)
    frames = {camera: torch.from_numpy(inputs[f"next_obs/{camera}"]) for camera in CAMERAS}
    latents = policy.model.codec.encode(policy.model.images(frames)).numpy()
    wanted = policy.sample("inverse", inputs, noise)["action"]
    given = {key: x for key, x in inputs.items() if not key.startswith("next_obs/")} | {"next_obs_latent": latents}
    np.testing.assert_array_equal(policy.sample("inverse", given, noise)["action"], wanted)


def promise(it, count: int):
    """Random actions, of which the first `count` rows are promised."""
    rows, (length, columns) = 3, it.system.action_shape
    mask = np.zeros((rows, length), bool)
    mask[:, :count] = True
    return np.random.default_rng(8).uniform(-1, 1, (rows, length, columns)).astype(np.float32), mask


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("name", "use"),
    [pytest.param("uwm", "joint", marks=pytest.mark.slow), ("dp", "policy"), ("dp by flow", "policy")],
)
def test_promised_rows_equal_jax(tiny, name, use, guided):
    it = tiny(name)
    policy, inputs, noise = uwm_torch.load(it.folder), it.inputs(3), it.noise(3)
    promised = promise(it, 2)
    made = policy.sample(use, inputs, noise, promised, guided)
    (wanted,) = it.answers(inputs, noise, (use,), promised, guided).values()
    plain = policy.sample(use, inputs, noise)
    np.testing.assert_array_equal(made["action_normalized"][:, :2], promised[0][:, :2])
    assert np.abs(made["action_normalized"] - plain["action_normalized"])[:, 2:].max() > 1e-3
    for key in ("action_normalized", "next_obs_latent"):
        assert (key in made) == (key in wanted)
        if key in made:
            assert relative(made[key], wanted[key]) < USE, key
    nothing = policy.sample(use, inputs, noise, promise(it, 0))
    np.testing.assert_array_equal(nothing["action"], plain["action"])  # bit by bit


def test_a_row_is_a_function_of_its_own_inputs_and_noise(tiny):
    it = tiny("uwm")
    policy, inputs, noise = uwm_torch.load(it.folder), it.inputs(4), it.noise(4)
    together = policy.sample("policy", inputs, noise)["action"]
    for row in range(4):
        own = slice(row, row + 1)
        alone = policy.sample("policy", {k: x[own] for k, x in inputs.items()}, {m: x[own] for m, x in noise.items()})
        np.testing.assert_allclose(alone["action"], together[own], atol=1e-5)
    drawn = policy.sample("policy", inputs, seed=3)["action"]
    np.testing.assert_array_equal(policy.sample("policy", inputs, seed=3)["action"], drawn)
    assert (np.abs(policy.sample("policy", inputs, seed=4)["action"] - drawn).max(axis=(1, 2)) > 0.1).all()


def test_modulations_are_made_once_a_sample(tiny, monkeypatch):
    it = tiny("dp")
    policy = uwm_torch.load(it.folder)
    products = []
    original = uwm_torch.of_all_steps
    monkeypatch.setattr(uwm_torch, "of_all_steps", lambda *args, **kw: products.append(1) or original(*args, **kw))
    policy.sample("policy", it.inputs(1), it.noise(1))
    assert len(products) == it.system.config.model.depth + 1  # of the blocks and the head, for all steps


@pytest.mark.parametrize("name", ["uwm", "dp by U-Net, reads text", "dp by flow"])
def test_nothing_of_a_sample_passes_through_the_hosts_memory(tiny, name):
    # What a CUDA graph cannot record, said by a machine without one.
    it = tiny(name)
    model, crossed = uwm_torch.load(it.folder).model, []
    between = {"tensor", "as_tensor", "from_numpy", "new_tensor", "item", "tolist", "numpy", "cpu", "nonzero"}

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in between:
                crossed.append(func.__name__)
            return func(*args, **(kwargs or {}))

    inputs, noise = ({k: torch.tensor(x) for k, x in arrays.items()} for arrays in (it.inputs(3), it.noise(3)))
    rows = uwm_torch.Promised(*map(torch.from_numpy, promise(it, 2)))
    with torch.no_grad(), Watch():
        for use, roles in model.roles.items():
            model(use, inputs, noise, rows if roles["action"] == "generate" else None, guided=True)
    assert not crossed


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_near_and_keeps_float32_where_it_must(tiny, name):
    it = tiny(name)
    exact, half = uwm_torch.load(it.folder), uwm_torch.load(it.folder, dtype=torch.bfloat16)
    inputs, noise = it.inputs(3), it.noise(3)
    wanted = exact.sample("policy", inputs, noise)["action_normalized"]
    found = half.sample("policy", inputs, noise)["action_normalized"]
    assert found.dtype == np.float32
    error = np.sqrt(np.mean(np.square(found - wanted)) / np.mean(np.square(wanted)))
    assert 0 < error < 0.05
    dtypes = {key: x.dtype for key, x in half.model.state_dict().items()}
    assert {dtypes[key] for key in dtypes if "bn1" in key or "pos_embed" in key or ".fc." in key} == {torch.float32}
    large = [key for key in dtypes if key.endswith(("attn.qkv.weight", "conv1.weight", "block.0.weight"))]
    assert large and {dtypes[key] for key in large} == {torch.bfloat16}


@pytest.mark.slow
def test_compiled_networks_agree(tiny, monkeypatch):
    it = tiny("dp")
    compiler = torch.nn.Module.compile
    # Each network is one program, without a way back to Python; what makes machine code of it is torch's business.
    traced = functools.partial(compiler, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: traced(module, **options))
    eager, compiled = uwm_torch.load(it.folder), uwm_torch.load(it.folder, compile=True)
    inputs, noise = it.inputs(3), it.noise(3)  # filled up to 4 rows
    for guided in (False, True):
        found = compiled.sample("policy", inputs, noise, promise(it, 2), guided)["action"]
        wanted = eager.sample("policy", inputs, noise, promise(it, 2), guided)["action"]
        assert len(found) == 3 and relative(found, wanted) < USE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("guided", [False, True])
def test_cuda_graphs_agree(tiny, guided):
    it = tiny("uwm")
    eager, graphs = uwm_torch.load(it.folder, "cuda"), uwm_torch.load(it.folder, "cuda", cuda_graphs=True)
    for rows in (3, 1, 3):
        inputs, noise = it.inputs(rows, seed=rows), it.noise(rows)
        for use in eager.uses:
            rows_of = (promise(it, 2)[0][:rows], promise(it, 2)[1][:rows]) if use == "policy" else None
            wanted = eager.sample(use, inputs, noise, rows_of, guided)
            for key, x in graphs.sample(use, inputs, noise, rows_of, guided).items():
                np.testing.assert_allclose(x.astype(np.float32), wanted[key].astype(np.float32), atol=1e-4)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "change", "told"),
    [
        ("policy", {"obs/a": None}, r"missing obs/a: expected uint8 \(B, 2, 14, 18, 3\)"),
        ("policy", {"obs/a": np.zeros((2, 2, 14, 18, 3))}, r"obs/a: .* found float64 \(2, 2, 14, 18, 3\)"),
        ("policy", {"obs/b": np.zeros((2, 2, 14, 18, 3), np.uint8)}, r"obs/b: .* \(B, 2, 20, 24, 3\), found uint8"),
        ("policy", {"obs/state": np.full((2, 2, 4), np.nan)}, "obs/state: .*found values that are not finite"),
        ("policy", {"obs/state": np.zeros((3, 2, 4))}, "obs/state: expected 2 rows like the keys before it, found 3"),
        ("policy", {"obs/state": None, "obs/stat": np.zeros((2, 2, 4))}, "key obs/stat: did you mean obs/state"),
        ("policy", {"act": np.zeros(3)}, "unknown key act"),
        ("policy", {"obs/state": [[1, 2], [3]]}, "obs/state: .* found what is no array"),
        ("policy", {"obs/state": np.full((2, 2, 4), "x")}, "obs/state: .* found <U1"),
        ("forward", {"action": None}, r"missing action: expected float32 \(B, 4, 10\)"),
        ("inverse", {"next_obs/a": None}, "missing next_obs/a"),
        ("dream", {}, "use 'dream': this export answers policy, video, forward, inverse, joint"),
    ],
)  # fmt: skip
def test_unfit_inputs_are_named(tiny, use, change, told):
    it = tiny("uwm")
    inputs = {k: x for k, x in {**it.inputs(2), "obs/other": np.zeros(3), **change}.items() if x is not None}
    with pytest.raises(uwm_torch.UserError, match=told):
        uwm_torch.load(it.folder).sample(use, inputs)


def test_promised_rows_need_a_use_that_makes_actions(tiny):
    it = tiny("uwm")
    policy, inputs = uwm_torch.load(it.folder), it.inputs(3)
    with pytest.raises(uwm_torch.UserError, match="promised: forward makes no actions"):
        policy.sample("forward", inputs, promised=promise(it, 1))
    with pytest.raises(uwm_torch.UserError, match=r"promised/mask: expected bool \(B, 4\), found float32"):
        policy.sample("policy", inputs, promised=(promise(it, 1)[0], np.ones((3, 4), np.float32)))


def described(**changes):
    """Changes fields of `model.json`."""

    def change(folder: Path) -> None:
        path = folder / "model.json"
        stored = json.loads(path.read_text())
        for name, value in changes.items():
            *parents, last = name.split("__")
            node = functools.reduce(lambda at, key: at[key], parents, stored)
            node[last] = value
        path.write_text(json.dumps(stored))

    return change


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["extra.bias"] = tensors.pop("noise_pred_net.pos_embed")
    tensors["noise_pred_net.head.linear.bias"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "arguments", "told"),
    [
        (lambda d: (d / "model.json").unlink(), {}, "model.json: cannot be read"),
        (lambda d: (d / "model.json").write_text("{"), {}, "model.json: is not JSON"),
        (lambda d: (d / "model.json").write_text("[]"), {}, "model.json: expected format 'uwm_jax.torch'"),
        (described(config__system="pad"), {}, "a pad model is exported as weights alone"),
        (described(window={}), {}, r"model.json: a field is missing or not as .* \(KeyError: 'obs'\)"),
        (described(images__crop=[16, "16"]), {}, "model.json: a field is missing or not as .*TypeError"),
        (described(config=None), {}, "model.json: a field is missing or not as .*TypeError"),
        (lambda d: (d / "model.safetensors").unlink(), {}, "model.safetensors: there is no such file"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x"), {}, "model.safetensors: is not a readable"),
        (without_a_tensor, {}, r"(?s)missing tensor noise_pred_net.pos_embed \(1, 4, 32\).*extra tensor extra.bias.*"
         r"noise_pred_net.head.linear.bias has shape \(3,\), expected \(32,\)"),
        (described(robots={"arm": {"parts": [{"transform": "spin", "width": 3}], "states": {}}}), {},
         "the action transform 'spin' is unknown"),
        (None, {"cuda_graphs": True}, "cuda_graphs=True needs a CUDA device, found device='cpu'"),
        (None, {"device": "quantum"}, "device='quantum': "),
        (None, {"dtype": torch.float16}, "expected torch.float32 or torch.bfloat16, found torch.float16"),
        (None, {"execute": 5}, "execute=5: expected 1 to 4"),
        (None, {"execute": 3, "delay": 2, "switch": "naive"}, "delay=2 with switch=naive: expected at most 4"),
        (None, {"execute": 1, "delay": 2, "switch": "guided"}, "switch=guided: expected at most execute=1"),
        (None, {"switch": "later"}, "switch='later': expected one of wait, naive, replacement, guided"),
        (None, {"source": "leg"}, "source='leg': the model was trained on actions of arm"),
        (None, {"limits": ([0] * 3, [1] * 7)}, "limits: expected .* 7, one for each column"),
        (None, {"limits": (1, 0)}, "limits: expected low <= high"),
        (None, {"seed": -1}, "seed: expected integers from 0 on, found -1"),
    ],
)  # fmt: skip
def test_unfit_folders_and_arguments_are_named(tiny, tmp_path, damage, arguments, told):
    folder = Path(shutil.copytree(tiny("dp").folder, tmp_path / "DIR"))
    if damage is not None:
        damage(folder)
    with pytest.raises(uwm_torch.UserError, match=told):
        uwm_torch.load(folder, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there_is_named(tiny):
    with pytest.raises(uwm_torch.UserError, match=r"device='cuda': .*(CUDA|NVIDIA)"):
        uwm_torch.load(tiny("dp").folder, "cuda")


def test_a_folder_without_the_codec_answers_what_needs_none(tiny, tmp_path):
    it = tiny("uwm")
    folder = Path(shutil.copytree(it.folder, tmp_path / "DIR"))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: x for k, x in tensors.items() if ".pca." not in k}, folder / "model.safetensors")
    described(uses={"policy": {}, "inverse": {}}, codec__included=False)(folder)
    policy, whole = uwm_torch.load(folder), uwm_torch.load(it.folder)
    inputs, noise = it.inputs(2), it.noise(2)
    assert list(policy.uses) == ["policy", "inverse"]
    wanted = whole.sample("policy", inputs, noise)["action"]
    np.testing.assert_array_equal(policy.sample("policy", inputs, noise)["action"], wanted)
    with pytest.raises(uwm_torch.UserError, match="next_obs_latent: this folder was exported without the image codec"):
        policy.sample("inverse", inputs, noise)


def test_it_imports_torch_numpy_and_safetensors_only():
    tree = ast.parse(Path(uwm_torch.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"numpy", "safetensors", "torch"}
