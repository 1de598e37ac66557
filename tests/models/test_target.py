"""Programs for devices of another platform take that platform's forms."""

from __future__ import annotations

import jax

from uwm_jax.models import layers, target
from uwm_jax.models.activations import on_one_cpu


def test_devices_are_this_process_s_unless_others_are_named():
    assert (target.platform(), target.device_count()) == ("cpu", jax.device_count())
    assert on_one_cpu()
    with target.tracing_for("tpu", 1):
        assert not on_one_cpu() and layers.scans_by_default()
        with target.tracing_for("cpu", 8):
            assert on_one_cpu() and layers.scans_by_default()
        assert target.platform() == "tpu"
    assert target.platform() == "cpu"
