"""The options that programs of TPU meshes are compiled with."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.parallel.compiling import FSDP_ON_TPU, compile_lowered, compiler_options


def mesh(platform, data=1, fsdp=1, tensor=1):
    """As much of a mesh as options depend on."""
    devices = np.array([SimpleNamespace(platform=platform)] * (data * fsdp * tensor)).reshape(data, fsdp, tensor)
    return SimpleNamespace(devices=devices, shape={"data": data, "fsdp": fsdp, "tensor": tensor})


class Lowered:
    """A compiler that knows all options, none, or fails for another reason."""

    def __init__(self, error=""):
        self.error, self.calls = error, []

    def compile(self, compiler_options=None):
        self.calls.append(compiler_options)
        if compiler_options and self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return "program"


@pytest.mark.parametrize(
    "where, options",
    [
        (mesh("tpu", data=2, fsdp=4), FSDP_ON_TPU),
        (mesh("tpu", data=4, tensor=2), {}),
        (mesh("cpu", fsdp=8), {}),
        (mesh("gpu", fsdp=8), {}),
    ],
)
def test_tpu_compilers_alone_get_the_option_and_under_fsdp_alone(where, options, capsys):
    assert compiler_options(where) == options
    lowered = Lowered()
    assert compile_lowered(where, lowered) == "program"
    assert lowered.calls == [options or None]
    assert not capsys.readouterr().out


def test_a_compiler_that_does_not_know_the_option_compiles_without(capsys):
    """The compiler of CPUs is one, so the message that is looked for is XLA's own."""
    (name,) = FSDP_ON_TPU
    lowered = jax.jit(lambda x: 2 * x).lower(jnp.ones(3))
    program = compile_lowered(mesh("tpu", fsdp=2), lowered)
    np.testing.assert_array_equal(program(jnp.ones(3)), 2 * np.ones(3))
    assert f"does not know {name}=1000000: compiled without" in capsys.readouterr().out


def test_other_errors_of_the_compiler_are_not_swallowed():
    lowered = Lowered("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of memory"):
        compile_lowered(mesh("tpu", fsdp=2), lowered)
    assert len(lowered.calls) == 1
