"""What is planned is what runs: the text and the memory of the step of real runs, and steps compiled for TPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.planning import children, compiling, rows, sizes, topology
from uwm_jax.planning.rows import Question

LINUX = sys.platform == "linux"


@pytest.fixture(scope="module")
def trained(make_tiny_config, tmp_path_factory):
    """{mesh: what `tests.planning.trained` found}."""
    folder = tmp_path_factory.mktemp("trained")
    config = make_tiny_config()
    config.total_steps = config.checkpoint.every = 1
    config.batch_size, config.eval.num_windows = 16, 4
    (folder / "config.json").write_text(config_lib.to_json(config))
    command = [sys.executable, "-m", "tests.planning.trained", "config.json", "runs", "found.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp", "accumulated"])
def test_the_step_that_ran_is_the_one_that_is_planned(trained, mesh):
    found = trained[mesh]
    ran = found["ran"].get(found["planned"])
    assert ran is not None, "the run compiled no program of the planned text"
    for part, size in ran.items():
        assert found["memory"][part] == pytest.approx(size, rel=0.01), part
    assert found["row"]["peak_hbm_bytes"] == pytest.approx(ran["total"], rel=0.01)


@pytest.mark.slow
def test_the_gradients_are_reduced_once_with_four_bytes_for_each_parameter(trained):
    row = trained["data"]["row"]
    key = "collective_bytes/all-reduce"
    parameters, metrics, merged = (row[f"gradient_bytes/{part}"] for part in ("parameters", "metrics", "merged"))
    assert parameters == 4 * row["parameters"] and row[key] == parameters + metrics + merged
    assert abs(row[key] - metrics - parameters) <= 1e-4 * parameters
    assert not row["warnings"] and "collective_bytes/all-gather" not in row
    assert trained["fsdp"]["row"]["collective_bytes/all-gather"]
    assert trained["accumulated"]["row"]["collective_bytes/all-gather"]


@pytest.fixture(scope="module")
def on_tpus(make_tiny_config):
    """{mesh: row of v5e-4}; libtpu is among the requirements of `dev` on Linux, so there is no way around it there."""
    if not LINUX:
        pytest.skip("libtpu is for Linux alone")
    found = {}
    for mesh, fsdp in (("data", 1), ("fsdp", 4)):
        config = make_tiny_config()
        config.batch_size, config.mesh.fsdp = 8, fsdp
        config.model.dtype = "bfloat16"
        found[mesh] = rows.row("v5e-4", config, Question(sizes.of_data(config, "none.py")), print)
    return found


@pytest.mark.slow
def test_a_step_compiles_for_tpus(on_tpus):
    for mesh, row in on_tpus.items():
        assert row["failure"] is None, row["failure"]
        assert row["fits"] and row["chips"] == row["cores"] == 4
        assert 0 < row["step_seconds_lower_bound"] < row["step_seconds_estimate"] < 0.1
        assert row["peak_hbm_bytes"] > row["parameter_bytes"] + row["optimizer_bytes"]
        assert row["flops_per_step"] == on_tpus["data"]["flops_per_step"] and not row["warnings"], mesh
    data, fsdp = on_tpus["data"], on_tpus["fsdp"]
    assert data["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1} and fsdp["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    parameters = data["gradient_bytes/parameters"]
    assert parameters == 4 * data["parameters"]
    assert data["collective_bytes/all-reduce"] == pytest.approx(parameters, rel=0.01)
    assert "collective_bytes/all-gather" not in data and fsdp["collective_bytes/all-gather"]
    assert fsdp["parameter_bytes"] < data["parameter_bytes"]


def test_what_train_refuses_is_refused_before_anything_is_lowered(make_tiny_config):
    config = make_tiny_config()
    question = Question(sizes.of_data(config, "none.py"))
    config.checkpoint.keep_best = "loss"
    with pytest.raises(UserError, match="config.checkpoint.keep_best='loss': expected a metric"):
        compiling.prepare(rows.request(config, None, question))


def test_a_step_of_latents_encodes_no_frames(make_tiny_config):
    config = make_tiny_config()
    config.data.latents = config.model.codec.name
    question = Question(sizes.of_data(config, "none.py"))
    prepared = compiling.prepare(rows.request(config, None, question))
    system, held = prepared.program.system, sum(map(compiling.bytes_on_device, jax.tree.leaves(prepared.frozen)))
    assert not [name for name in prepared.batch if name.startswith("next_obs/")]
    latent = prepared.batch["next_obs_latent"]
    assert latent.shape == (config.batch_size, *system.latent_shape) and latent.dtype == np.float16
    found = compiling.facts_before(prepared)
    assert found["flops"]["frozen"] == 0.0 < found["flops"]["trained"]
    signature = re.search(r"func.func public @main\((.*?)\) ->", prepared.lowered.as_text(), re.DOTALL)
    read = len(re.findall(r"%arg\d+:", signature[1]))
    assert held and read <= len(jax.tree.leaves((prepared.state, prepared.batch))), "the step reads no codec"
    unread = jax.tree.map(lambda _: None, prepared.frozen)
    of_batch = {name: x.sharding for name, x in prepared.batch.items()}
    step = SimpleNamespace(input_shardings=((prepared.state, unread, of_batch),))
    assert compiling.unused_bytes(step, prepared.frozen, prepared.batch) == {"frozen": held, "batch": 0}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("install it"), "config", "install it"),
        (KeyError("x"), "process", "KeyError: 'x'"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"), "memory", "RESOURCE_EXHAUSTED: no room"),
    ],
)
def test_evaluations_that_fail_are_a_fact_among_others(monkeypatch, error, kind, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(compiling.in_training, "InTraining", fail)
    program = SimpleNamespace(system=SimpleNamespace(spec=None), mesh=mesh_lib.data_mesh(jax.devices()))
    found = compiling.evaluations(SimpleNamespace(program=program, frozen={}))
    assert found == {"evaluation": None, "evaluation_failure": message, "evaluation_failure_kind": kind}


def test_the_verdict_of_the_compiler_has_its_numbers():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.06G of "
        "15.75G hbm. Exceeded hbm capacity by 2.31G.\n\nTotal hbm usage >= 18.57G:\n    reserved  ..."
    )
    found = compiling.verdict(message)
    assert found["peak_bytes"] == int(18.06 * 2**30) and found["limit_bytes"] == int(15.75 * 2**30)
    assert found["message"] == "Used 18.06G of 15.75G hbm. Exceeded hbm capacity by 2.31G."
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (317.44G) exceeds "
        "available HBM (15.75G)."
    )
    found = compiling.verdict(message)
    assert found["temporary_bytes"] == int(317.44 * 2**30) and found["limit_bytes"] == int(15.75 * 2**30)
    assert compiling.verdict("RESOURCE_EXHAUSTED: no memory\nmore") == {"message": "RESOURCE_EXHAUSTED: no memory"}


def test_children_compile_with_libtpu_alone():
    assert children.TPU_ENVIRONMENT["JAX_PLATFORMS"] == "cpu"
    for name in ("v5e-1", "2xv5e-1"):  # a slice of one chip
        assert topology.find(name).description()["chips_per_host_bounds"] == (1, 1, 1)
