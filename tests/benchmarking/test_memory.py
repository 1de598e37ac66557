"""Peak memory of processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from uwm_jax.benchmarking import memory
from uwm_jax.benchmarking.rows import Model
from uwm_jax.errors import RunError, UserError

pytestmark = pytest.mark.skipif(not memory.STATUS.exists(), reason="Linux only")


@pytest.mark.slow
def test_larger_inputs_need_more_by_about_their_size(tiny: ConfigDict) -> None:
    tiny.data.update(resize=(512, 512), crop=(512, 512))
    tiny.batch_size = 1
    small = memory.of_ours(tiny, 3, None, "preprocessing")
    tiny.batch_size = 9
    large = memory.of_ours(tiny, 3, None, "preprocessing")
    images = 8 * 2 * 4 * 512 * 512 * 3 * 4  # rows, views, frames, pixels, colours of four bytes
    assert images < large - small < 8 * images


@pytest.mark.slow
@pytest.mark.torch
def test_torch_is_measured_without_jax(tiny: ConfigDict) -> None:
    pytest.importorskip("torch")
    model = Model(tiny, 3, [])
    inputs = {"obs/a": np.zeros((1, 2, 16, 24, 3), np.uint8), "obs/b": np.zeros((1, 2, 16, 24, 3), np.uint8)}
    small = memory.of_torch(model.description(), inputs, "preprocessing")
    large = memory.of_torch(model.description(), {"a": np.zeros((2**26,), np.float32), **inputs}, "preprocessing")
    assert 2**28 < large - small < 2**30


def test_a_process_is_not_charged_with_its_parents_memory() -> None:
    held = np.ones(2**27, np.uint8)  # 128 MiB
    code = "from uwm_jax.benchmarking import memory; print(memory._peak_bytes())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120).stdout)
    assert 2**23 < found < 2**27 == held.nbytes


def test_the_measuring_module_imports_neither_side() -> None:
    code = "import sys, uwm_jax.benchmarking.memory; assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_process_that_fails_is_named_with_its_last_words(tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"--memory: the process of nothing in JAX ended with status 1: KeyError"):
        memory.of_ours(tiny, 3, None, "nothing")
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(RunError, match=r"of policy in torch ended with status -9, probably because .* full"):
        memory.of_torch({}, {}, "policy")


def test_other_systems_are_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    with pytest.raises(UserError, match="--memory: .*only Linux"):
        memory.check_platform("--memory")
