"""The `.pt` of a checkpoint: the bits of the `.safetensors`, of the parameters that were asked for, and back."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden import reference
from uwm_jax import cli, convert
from uwm_jax.data.normalize import Normalizer
from uwm_jax.synthetic import synthetic_system
from uwm_jax.torch_bridge import official_pt, weights
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, make_assets
from uwm_jax.training.state import create, make_optimizer
from uwm_jax.training.workdir import write_config

pytestmark = pytest.mark.torch

# gr1_small has GR1's full vision tower: 500 MB
GOLDEN = [*reference.NAMES, *reference.DP_NAMES, "gr1_tiny", "pad_small", "pad_libero_small"]
GOLDEN += [pytest.param("gr1_small", marks=pytest.mark.slow)]
PAIR = (np.float32([0.1]), np.float32([1 / 3]))


def command(*arguments: str) -> int:
    """Runs the command in this process; returns its exit status."""
    return cli.call(convert.main, ["convert", *arguments], convert.define_flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_tiny_config) -> Path:
    """A run of 4 steps with an average that differs from the parameters in every number."""
    config = make_tiny_config()
    config.optimizer.ema_decay = 0.99
    config.diffusion.prediction.action = "sample"
    system, frozen = synthetic_system(config, 10)
    rng = np.random.default_rng(0)
    pairs = {
        key: tuple(rng.uniform(0.5, 2, (2, width)).astype(np.float32)) for key, width in system.spec.widths.items()
    }
    spec = dataclasses.replace(system.spec, normalizer=Normalizer(pairs))
    params = jax.jit(system.init)(jax.random.key(1))
    averaged = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    state = create(config, params, make_optimizer(config))
    workdir = tmp_path_factory.mktemp("run") / "run"
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir)
    state = dataclasses.replace(state, step=jnp.int32(4), ema_params=averaged)
    checkpoints.save(state, {}, frozen, make_assets(config, spec))
    checkpoints.close()
    return workdir


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape, found[name].tobytes()) == (value.dtype, value.shape, value.tobytes())
        for name, value in expected.items()
    )


def test_the_parameters_that_were_asked_for_come_back_bit_equal(run: Path, tmp_path: Path) -> None:
    written = {}
    for parameters in ("average", "raw"):
        pt, safe = tmp_path / f"{parameters}.pt", tmp_path / f"{parameters}.safetensors"
        for file in (safe, pt):
            assert command("to-torch", f"--workdir={run}", f"--output={file}", f"--parameters={parameters}") == 0
            described = json.loads(file.with_suffix(".json").read_text())
            assert (described["parameters"], described["step"]) == (parameters, 4)
        written[parameters], found = load_file(safe), weights.read_weights(pt)
        assert same(found.tensors, written[parameters])
        assert found.normalizers.keys() == described["normalizers"].keys() != set()
        for key, pair in described["normalizers"].items():
            expected = {part: np.float32(pair[part]) for part in ("scale", "offset")}
            assert same(dict(zip(expected, found.normalizers[key], strict=True)), expected)
        assert official_pt.read(pt).step == 3
    assert not same(written["average"], written["raw"])

    given = f"--input={tmp_path / 'average.pt'}", f"--official-config={tmp_path / 'average.json'}"
    assert command("from-torch", *given, f"--workdir={tmp_path / 'back'}") == 0
    assert command("to-torch", f"--workdir={tmp_path / 'back'}", f"--output={tmp_path / 'again.pt'}") == 0
    assert same(weights.read_weights(tmp_path / "again.pt").tensors, written["average"])


def test_what_the_official_code_would_misread_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ending, times in ((".pt", 1), (".safetensors", 0)):
        assert command("to-torch", f"--workdir={run}", f"--output={tmp_path / 'x'}{ending}") == 0
        said = capsys.readouterr().err
        assert said.count("config.model.codec.name='pca': the official code has the VAE alone") == times
        assert said.count("config.diffusion.prediction.action='sample': the official code takes") == times
        assert "prediction.next_obs" not in said


@pytest.mark.parametrize("name", GOLDEN)
def test_official_weights_keep_their_bits(tmp_path: Path, name: str) -> None:
    tensors = reference.weights(name)
    official_pt.write(tmp_path / "models.pt", tensors, {"action": PAIR}, 1)
    assert same(weights.read_weights(tmp_path / "models.pt").tensors, tensors)


def test_without_torch_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes the import fail
    assert command("to-torch", f"--workdir={run}", f"--output={tmp_path / 'models.pt'}") == 2
    said = capsys.readouterr().err
    assert "writing" in said and "pip install 'uwm-jax[torch]', or name a .safetensors file" in said
    assert list(tmp_path.iterdir()) == []
