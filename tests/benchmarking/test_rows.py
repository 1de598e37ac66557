"""The benchmark's rows compute what training and sampling compute, and count how much of it there is."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from uwm_jax.benchmarking import names, rows
from uwm_jax.benchmarking.rows import Model
from uwm_jax.errors import UserError
from uwm_jax.training import flops


def test_gradients_are_results_of_their_row(tiny: ConfigDict) -> None:
    # What a compiled function does not return is not computed.
    names = ["latents/forward_backward", "network/forward_backward", "encoder/forward_backward"]
    model = Model(tiny, 3, names, initialize=False)
    features = {"global_cond": model.inputs("network/forward_backward")["global_cond"]}
    encoder, network = ({name: model.params[name]} for name in ("obs_encoder", "noise_pred_net"))
    for name, params, wanted in zip(
        names, (model.params, network, encoder), (model.params, network | features, encoder), strict=True
    ):
        (loss, _), grads = jax.eval_shape(model.function(name), params, {}, model.inputs(name))
        assert loss.shape == ()
        assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(lambda x: x.shape, wanted)


def test_mfu_is_the_time_at_peak_over_the_time_taken(tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model.dtype = "bfloat16"
    model = Model(tiny, 3, ["network/forward"], initialize=False)
    monkeypatch.setattr(flops, "peak_flops", lambda kind, dtype: {"bfloat16": 2e12, "float32": 1e12}[dtype])
    counted = model.system.flops()
    network, encoder, frozen = counted.trained["network"], counted.trained["encoder"], counted.frozen
    whole, samples = network + encoder, 2 * network + encoder
    for row, trained, codec in (
        ("pixels/forward", whole, frozen), ("pixels/forward_backward", 3 * whole, frozen),
        ("pixels/step", 3 * whole, frozen), ("latents/step", 3 * whole, 0), ("codec", 0, frozen),
        ("network/forward", network, 0), ("network/forward_backward", 3 * network, 0),
        ("encoder/forward", encoder, 0), ("encoder/forward_backward", 3 * encoder, 0),
        ("policy", samples, 0), ("forward_dynamics", samples, 0), ("preprocessing", 0, 0),
    ):  # fmt: skip
        operations, seconds = model.operations(row)
        assert operations == pytest.approx(trained + codec)
        assert seconds == pytest.approx(trained / 2e12 + codec / 1e12)


def test_a_row_that_does_not_fit_says_what_to_change() -> None:
    with pytest.raises(UserError, match=r"latents/step does not fit.*config.batch_size.*config.model.remat"):
        with rows.fitting("latents/step"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes")
    with pytest.raises(jax.errors.JaxRuntimeError):
        with rows.fitting("latents/step"):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_only_what_the_rows_need_is_made(tiny: ConfigDict) -> None:
    for row, trees, codec, state in (
        ("network/forward", {"noise_pred_net"}, False, False), ("encoder/forward", {"obs_encoder"}, False, False),
        ("codec", set(), True, False), ("preprocessing", set(), False, False),
        ("policy", {"noise_pred_net", "obs_encoder"}, False, False),
        ("pixels/step", {"noise_pred_net", "obs_encoder"}, True, True),
    ):  # fmt: skip
        model = Model(tiny, 3, [row], initialize=False)
        assert set(model.params) == trees
        assert bool(model.frozen) == codec
        assert (model.state is not None) == state
        assert model.parameters["network"] > model.parameters["encoder"] > 0


def test_arrays_without_initialization_have_the_shapes_of_the_others(tiny: ConfigDict) -> None:
    fresh, filled = (Model(tiny, 3, ["pixels/step"], initialize=initialize) for initialize in (True, False))
    for a, b in ((fresh.state, filled.state), (fresh.frozen, filled.frozen)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), a) == jax.tree.map(lambda x: (x.shape, x.dtype), b)


def test_inputs_are_those_of_the_system(tiny: ConfigDict) -> None:
    model = Model(tiny, 3, [], frame_size=(10, 12))
    inputs = {row: model.inputs(row) for row in names.ROWS}
    assert inputs["preprocessing"].keys() == {"obs/a", "obs/b", "next_obs/a", "next_obs/b", "row"}
    assert inputs["preprocessing"]["obs/a"].shape == (2, 2, 10, 12, 3)
    assert inputs["pixels/step"].keys() == model.system.spec.batch_like(2).keys()
    assert inputs["policy"]["obs/a"].shape == (1, 2, 10, 12, 3)
    for row in ("latents/step", "policy", "forward_dynamics"):  # next frames would be preprocessed in vain
        assert not [name for name in inputs[row] if name.startswith("next_obs/")]
    assert inputs["codec"]["images"].shape == inputs["encoder/forward"]["images"].shape == (2, 2, 2, 16, 16, 3)
    width = 2 * 2 * 16 + 2 * model.system.spec.low_dim["state"]  # views, frames, channels; frames, columns
    assert inputs["network/forward"]["global_cond"].shape == (2, width)
    assert inputs["network/forward"]["noisy/next_obs"].shape == (2, *model.system.latent_shape)
    assert model.inputs("network/forward") is model.inputs("network/forward_backward")


@pytest.mark.slow
def test_a_step_gives_its_parameters_to_the_other_rows(tiny: ConfigDict) -> None:
    tiny.optimizer.learning_rate = 0.1
    model = Model(tiny, 3, ["latents/step", "encoder/forward"], initialize=False)
    step, features = model.runner("latents/step"), model.runner("encoder/forward")
    before = np.asarray(features.call())
    step.repeat(2)
    assert np.abs(np.asarray(features.call()) - before).max() > 1e-3
    assert model.state is not None and int(model.state.step) == 2 and np.isfinite(float(model.loss))
