"""The JobSet of a run: one job for each slice, one pod for each host, in each pod the supervisor of its process.

`failure_policy` says what the supervisor (`uwm_jax.supervise`) says, about whole pods: a run that has ended for good is
not started again, one that the cloud interrupted always is, and one whose pods were lost otherwise a few times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch import training_command
from launch.variables import Secret
from uwm_jax.errors import UserError
from uwm_jax.planning import topology as topology_lib

API_VERSION = "jobset.x-k8s.io/v1alpha2"
CONTAINER = "train"
RESTARTS = 5  # of pods that were lost in another way than by a disruption
GRACE_SECONDS = 60  # for a run to save after SIGTERM: 25 s on a bucket, and what is in flight

# Statuses of the supervisor that are final: its bound is reached, the command is unusable, Ctrl-C.
FINAL_STATUSES = (1, 2, 130)

# Labels of GKE's nodes, and chips of a host: of a slice of at most `whole` chips one host has all, else it has 4.
# As in XPK 1.16.0 (xpk/core/system_characteristics.py), and cloud.google.com/kubernetes-engine/docs/concepts/tpus.
_ACCELERATORS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 8),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 8),
}
_HOST_CHIPS = 4

# A pod's name has the JobSet's with `-slice-<slice>-<host>-<5 letters>` and must be a label of DNS.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


def check_name(name: str) -> str:
    """The name of a JobSet; raises UserError for one that is none."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name}: expected a name of at most 40 lower-case letters, digits and hyphens.")
    return name


def jobset(
    name: str,
    topology: str,
    slices: int,
    image: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    secrets: Sequence[Secret] = (),
    service_account: str = "",
    spot: bool = False,
) -> dict[str, Any]:
    """The manifest of a JobSet.

    Args:
      topology: of one slice, as `uwm_jax.plan` names it: `v5e-16`.
      command: `python -m uwm_jax.train ...`, for each host.
      env: variables of the containers.
      secrets: further variables, each a key of a Secret of the cluster by the secret's name.
      service_account: of the pods; "" for the namespace's own.
      spot: on nodes that the cloud may take away.

    Raises:
      UserError: a secret has no name in the cluster.
    """
    accelerator, grid, hosts, chips = _hosts(topology)
    nodes = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": grid}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the pod's process is the supervisor's business; podFailurePolicy requires it
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": nodes,
        "containers": [
            {
                "name": CONTAINER,
                "image": image,
                "command": supervised(command),
                "env": [{"name": key, "value": value} for key, value in env.items()] + [_secret(s) for s in secrets],
                "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of libtpu, between hosts and slices
                "resources": {"limits": {"google.com/tpu": chips}},
                # libtpu locks memory for transfers, and talks to its other processes through shared memory.
                "securityContext": {"privileged": True},
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if service_account:
        pod["serviceAccountName"] = service_account
    if spot:
        nodes["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
    job = {
        "backoffLimit": 0,
        "completions": hosts,
        "parallelism": hosts,
        "podFailurePolicy": pod_failure_policy(),
        "template": {"spec": pod},
    }
    return {
        "apiVersion": API_VERSION,
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": failure_policy(),
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def failure_policy() -> dict[str, Any]:
    """When all pods of the run start again, from its newest checkpoint; the first rule that holds."""
    return {
        "maxRestarts": RESTARTS,  # for a job that failed in another way: a host that vanished, memory that ran out
        "rules": [
            {
                "name": "disrupted",  # preempted, evicted or drained, which is no fault of the run
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["has condition DisruptionTarget"],
            },
            {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        ],
    }


def pod_failure_policy() -> dict[str, Any]:
    """The failures of pods that `failure_policy` tells apart by their message."""
    statuses = {"containerName": CONTAINER, "operator": "In", "values": list(FINAL_STATUSES)}
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": statuses},
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }


def supervised(command: Sequence[str]) -> list[str]:
    """A command under the supervisor, where it has the workdir that this needs."""
    return [
        *(["python", "-m", "uwm_jax.supervise", "--"] if training_command.read(command).workdir else []),
        *command,
    ]


def _hosts(topology: str) -> tuple[str, str, int, int]:
    """(accelerator, grid, hosts, chips of a host) of a slice, the first two as labels of nodes."""
    found = topology_lib.find(topology)
    accelerator, whole = _ACCELERATORS[found.chip.name]
    count = math.prod(found.shape)
    chips = count if count <= whole else _HOST_CHIPS
    return accelerator, "x".join(map(str, found.shape)), count // chips, chips


def _secret(secret: Secret) -> dict[str, Any]:
    if secret.name is None:
        raise UserError(
            f"--secret={secret.variable}: a manifest holds no values. Name a Secret of the cluster that has it, "
            f"--secret={secret.variable}=NAME; `kubectl create secret generic NAME --from-literal="
            f'{secret.variable}="${secret.variable}"` makes one.'
        )
    if secret.version != "latest":
        raise UserError(
            f"--secret={secret.variable}={secret.name}:{secret.version}: Secrets of a cluster have no versions."
        )
    return {
        "name": secret.variable,
        "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.variable}},
    }
