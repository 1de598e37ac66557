"""Facts as a child process gives them, with round numbers, for tests of rows and bounds."""

from __future__ import annotations

from typing import Any

from uwm_jax.planning.compiling import NO_EVALUATION


def facts(**changes: Any) -> dict[str, Any]:
    """16 chips; 1 GB of parameters; 200 MB of gradients that wait, and 10 MB of activations that do not."""

    def collective(kind: str, axes: list[str], size: int, **others: Any) -> dict[str, Any]:
        return {
            **{"kind": kind, "axes": axes, "bytes": size, "sent_bytes": 2 * size, "times": 1},
            **{"asynchronous": False, "activations": False, "source": f"jit(step)/{kind}"},
            **{"in_unknown_loop": False, **others},
        }

    found = {
        "platform": "tpu",
        "device_kind": "TPU v5 lite",
        "chips": 16,
        "members": 0,
        "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
        "limit_bytes": None,
        "parameters": 250_000_000,
        "trained_parameters": 250_000_000,
        "bytes": {
            **{"parameters": 10**9, "average": 0, "optimizer": 2 * 10**9, "counters": 24},
            **{"frozen": 3 * 10**8, "batch": 10**7},
        },
        "unused_bytes": {"frozen": 2 * 10**8, "batch": 100},
        "flops": {"trained": 197e12, "frozen": 197e12},
        "seconds_at_peak": 2.0,
        "memory": {
            **{"arguments": 3 * 10**9, "outputs": 3 * 10**9, "aliased": 3 * 10**9},
            **{"temporaries": 5 * 10**9, "code": 10**8, "peak": 8 * 10**9, "total": 9 * 10**9},
        },
        "collectives": [
            collective("all-reduce", ["data"], 2 * 10**8),
            collective("all-gather", ["fsdp"], 10**7 + 1, asynchronous=True, activations=True),
        ],
        "metrics_bytes": 76,
        "cycles": 450_000_000,
        "hbm_bytes": 819 * 10**8,
        "schedule_failure": None,
        **NO_EVALUATION,
    }
    return found | changes
