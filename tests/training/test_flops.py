"""Peaks of devices by the names that jax reports, and the share of them in use."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from uwm_jax import codecs, synthetic
from uwm_jax import config as config_lib
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.training import flops


def droid() -> UWM:
    config = config_lib.load("configs/droid.py")
    return UWM(
        config, synthetic.synthetic_spec(config, action_dim=10, frame_size=(180, 320)), codecs.from_config(config)
    )


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275, 275 / 6),
        ("TPU v5 lite", 197, 197 / 6),
        ("TPU v5", 459, 459 / 6),
        ("TPU v5p", 459, 459 / 6),
        ("TPU v6 lite", 918, 918 / 6),
        ("TPU7x", 1153.5, 1153.5 / 6),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_peaks_by_the_names_that_jax_reports(kind, bfloat16, float32):
    assert flops.peak_flops(kind, "bfloat16") == pytest.approx(bfloat16 * 1e12)
    assert flops.peak_flops(kind, "float32") == pytest.approx(float32 * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        *("cpu", "TPU v9", "Tesla V100-SXM2-16GB", "NVIDIA A10G", "NVIDIA H20", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
    ],
)
def test_unknown_peaks_are_unknown(kind):
    assert flops.peak_flops(kind, "bfloat16") is None


def device(kind, platform="gpu"):
    return SimpleNamespace(device_kind=kind, platform=platform)


def test_mfu_is_the_time_at_peak_over_the_time():
    system = droid()  # everything in bfloat16
    mfu = flops.Mfu(system, [device("NVIDIA A100-SXM4-80GB")] * 4)
    assert mfu.note == ""
    assert mfu(167.0)["mfu"] == pytest.approx(0.189, abs=0.001)  # the paper's run: about 19 %
    system.config.model.dtype = "float32"  # the codec stays
    sample = system.flops()
    seconds = (sample.training - sample.frozen) / 19.5e12 + sample.frozen / 312e12
    assert flops.Mfu(system, [device("NVIDIA A100-SXM4-80GB")])(2.0)["mfu"] == pytest.approx(2 * seconds)
    seconds += 7 * (sample.training - sample.frozen) / 19.5e12  # eight members, one codec
    assert flops.Mfu(system, [device("NVIDIA A100-SXM4-80GB")], members=8)(2.0)["mfu"] == pytest.approx(2 * seconds)


def test_no_mfu_where_the_peak_is_not_known():
    system = droid()
    mfu = flops.Mfu(system, [device("NVIDIA Z1")])
    assert mfu(100.0) == {} and "'NVIDIA Z1'" in mfu.note
    mfu = flops.Mfu(system, jax.devices("cpu"))
    assert mfu(100.0) == {} and mfu.note == ""
