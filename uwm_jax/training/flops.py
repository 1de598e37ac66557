"""Floating-point operations of a training step, counted from shapes, and the share of the hardware's peak in use.

Only products count (a multiplication and an addition are two operations), as in every published MFU; norms,
activations, softmax, the optimizer and image preprocessing are left out. For one sample:

  linear layer, n positions       2 n in out
  convolution k x k               2 k k in out rows columns   (of the output, padding included)
  attention, L tokens of width D  4 L L D                     (logits and weighted sum)

A trained part costs its forward pass three times: the backward pass makes the gradients of inputs and of weights.
Recomputation (`config.model.remat`) is executed but is no part of the model's operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from uwm_jax.systems.base import System

# Peak TFLOP/s of dense bfloat16 products with float32 sums, of one device as jax counts them, by the beginning of
# `device_kind`; the longest that fits counts. Sources: Google Cloud's "TPU architecture" pages for each version
# (TPU v2, v3 and 7x chips are two devices each; v4 and v5p chips are one); NVIDIA's data sheets of A100, H100, H200,
# HGX B200, L4, L40S, A10 and RTX 4090 (the Ada white paper), whose figures "with sparsity" are halved. The second
# number is float32 outside of the tensor cores, which is what exact float32 products run on; on TPUs they are six
# bfloat16 passes.
_PEAKS: dict[str, tuple[float, float]] = {
    "TPU v2": (22.5, 22.5 / 6),
    "TPU v3": (61.5, 61.5 / 6),
    "TPU v4": (275.0, 275.0 / 6),
    "TPU v4 lite": (138.0, 138.0 / 6),
    "TPU v5": (459.0, 459.0 / 6),  # v5p
    "TPU v5p": (459.0, 459.0 / 6),
    "TPU v5 lite": (197.0, 197.0 / 6),  # v5e
    "TPU v5e": (197.0, 197.0 / 6),
    "TPU v6 lite": (918.0, 918.0 / 6),  # v6e
    "TPU v6e": (918.0, 918.0 / 6),
    "TPU7x": (1153.5, 1153.5 / 6),
    "NVIDIA A100": (312.0, 19.5),
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 PCIe": (756.0, 51.0),
    "NVIDIA H100 NVL": (835.0, 60.0),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA H200 NVL": (835.0, 60.0),
    "NVIDIA GH200": (989.4, 66.9),
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA A10": (125.0, 31.2),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations a second that one device can reach in `dtype` (bfloat16, float32); None for an unknown device.

    A slice of a GPU (MIG) is unknown: its share of the chip is not in its name in a form that can be trusted. So are
    the smaller chips that are sold under the name of a larger one ("... Laptop GPU", "RTX 4090 D").
    """
    kinds = [k for k in _PEAKS if device_kind == k or device_kind.startswith((k + " ", k + "-"))]
    if not kinds or " MIG " in device_kind or " Laptop" in device_kind or device_kind.endswith(" D"):
        return None
    bfloat16, float32 = _PEAKS[max(kinds, key=len)]
    return 1e12 * {"bfloat16": bfloat16, "float32": float32}[dtype]


class Mfu:
    """Model FLOPs utilisation (Chowdhery et al., 2022, "PaLM", appendix B) of a training run.

    The time in which the devices at their peak could do the operations of a step, over the time that it took. The
    frozen codec's operations count: for `configs/droid.py` they are 89 % of them. Each part is held against the peak
    of its own dtype (`config.model.dtype`, `config.model.codec.dtype`); recomputation does not count.

    Args:
      system: the model.
      devices: all devices of the run.
      members: how many runs train on each sample, whose frozen codec runs once for all.

    Attributes:
      note: a line for people on a device that is not in the table; "" otherwise.
    """

    def __init__(self, system: System, devices: Sequence[jax.Device], members: int = 1):
        self.note = ""
        self._seconds: float | None = None  # at peak, per sample
        kind = devices[0].device_kind
        if devices[0].platform == "cpu":
            return
        sample = system.flops()
        ideal = seconds_at_peak(system, members * (sample.training - sample.frozen), sample.frozen, kind)
        if ideal is None:
            self.note = f"mfu is not logged: the peak of {kind!r} is not in the table of uwm_jax/training/flops.py"
        else:
            self._seconds = ideal / len(devices)

    def __call__(self, samples_per_second: float) -> dict[str, float]:
        """`{"mfu": ...}`, a share; `{}` on CPUs and on devices whose peak is not known."""
        return {} if self._seconds is None else {"mfu": samples_per_second * self._seconds}


def seconds_at_peak(system: System, trained: float, frozen: float, device_kind: str) -> float | None:
    """How long a device at its peak takes for operations of the trained parts and of the frozen codec, each in its own
    dtype; None for an unknown device."""
    dtypes = system.config.model.dtype, str(system.codec.dtype) if system.codec else "float32"
    peak, codec_peak = (peak_flops(device_kind, dtype) for dtype in dtypes)
    if peak is None or codec_peak is None:
        return None
    return trained / peak + frozen / codec_peak
