"""The processes that share a run, found in this order:

1. the flags --coordinator-address, --num-processes, --process-id;
2. the environment JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID;
3. SLURM, in a job step of several tasks (`srun python -m uwm_jax.train ...`);
4. a TPU pod (the same command on every host).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from uwm_jax import host_tpu
from uwm_jax.errors import UserError

LAUNCH_FLAGS = ("coordinator_address", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process joins: `arguments` of `jax.distributed.initialize`, and a name for messages."""

    arguments: dict[str, Any]
    described: str


def find_launch(given: Mapping[str, Any], environ: Mapping[str, str]) -> Launch | None:
    """The processes of the run, from flags and environment; None if this one is alone.

    Args:
        given: values of the flags `coordinator_address`, `num_processes`, `process_id`, None where absent.

    Raises:
        UserError: some of the three are given and others not, or they contradict each other.
    """
    environment = {name: environ.get(f"JAX_{name.upper()}") for name in LAUNCH_FLAGS}
    if any(value is not None for value in given.values()):
        return _explicit(given, {name: f"--{name.replace('_', '-')}" for name in LAUNCH_FLAGS})
    if environment["num_processes"] is not None or environment["process_id"] is not None:
        return _explicit(environment, {name: f"JAX_{name.upper()}" for name in LAUNCH_FLAGS})
    # Without a step, SLURM_NTASKS counts the tasks that a script may start, not those that run it.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ and int(tasks) > 1:
        return Launch(_slurm_devices(environ), f"SLURM task {environ['SLURM_PROCID']} of {tasks}")
    if _on_tpu_host(environ):
        return Launch({}, "this TPU host")
    if environment["coordinator_address"] is not None:
        return _explicit(environment, {name: f"JAX_{name.upper()}" for name in LAUNCH_FLAGS})
    return None


def _explicit(given: Mapping[str, Any], names: Mapping[str, str]) -> Launch | None:
    missing = [names[name] for name in LAUNCH_FLAGS if given[name] is None]
    if missing:
        found = ", ".join(f"{names[name]}={given[name]}" for name in LAUNCH_FLAGS if given[name] is not None)
        raise UserError(f"{' and '.join(missing)} missing beside {found}: a run of several processes needs all three.")
    address = str(given["coordinator_address"])
    try:
        count, index = int(given["num_processes"]), int(given["process_id"])
    except ValueError as e:
        raise UserError(f"{names['num_processes']} and {names['process_id']}: expected integers ({e}).") from e
    if not 0 <= index < count:
        raise UserError(
            f"{names['process_id']}={index}: expected 0 to {count - 1}, as {names['num_processes']}={count}."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{names['coordinator_address']}={address}: expected HOST:PORT of process 0.")
    if count == 1:
        return None
    arguments = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",  # else jax lets a batch system around us decide the devices
    }
    if host in ("localhost", "127.0.0.1", "[::1]"):  # then only this machine can be meant
        arguments["coordinator_bind_address"] = address
    return Launch(arguments, f"process {index} of {count} (coordinator {address})")


def _slurm_devices(environ: Mapping[str, str]) -> dict[str, Any]:
    """JAX gives each SLURM task one GPU of its node; a task that has the node for itself takes all of them."""
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if alone and gpus.isdigit() and int(gpus) > 0 and "JAX_LOCAL_DEVICE_IDS" not in environ:
        return {"local_device_ids": list(range(int(gpus))), "cluster_detection_method": "slurm"}
    return {"cluster_detection_method": "slurm"}


def _on_tpu_host(environ: Mapping[str, str]) -> bool:
    platforms = environ.get("JAX_PLATFORMS", "")
    return (not platforms or "tpu" in platforms) and host_tpu.attached()
