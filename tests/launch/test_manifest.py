"""JobSets: valid by the published definition and by Kubernetes' own, and restarted when a supervisor would restart."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from launch import manifest
from launch.variables import Secret
from uwm_jax import supervision
from uwm_jax.errors import UserError
from uwm_jax.planning import topology as topology_lib

KUBERNETES = "1.33"  # the oldest that JobSet 0.12 is tested with
TRAIN = ["python", "-m", "uwm_jax.train", "--config=configs/droid.py", "--workdir=gs://bkt/runs/x"]


@functools.cache
def definition() -> jsonschema.Draft202012Validator:
    """JobSet's published schema, of which an API server refuses unknown fields (`kubectl create --validate=strict`)."""
    crd = json.loads((Path(__file__).parent / "jobset_crd_v0.12.0.json").read_text())
    assert crd["version"] == "v0.12.0" and crd["licence"] == "Apache-2.0"
    assert manifest.API_VERSION == f"jobset.x-k8s.io/{crd['name']}"

    def close(node: Any) -> Any:
        if isinstance(node, list):
            return [close(part) for part in node]
        if not isinstance(node, dict):
            return node
        closed = {key: close(value) for key, value in node.items()}
        if isinstance(closed.get("properties"), dict) and not closed.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
        if closed.get("x-kubernetes-int-or-string"):
            closed.pop("type", None)
        return closed

    schema = close(crd["schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # checked by Kubernetes itself
    return jsonschema.Draft202012Validator(schema)


def check(made: dict[str, Any]) -> None:
    """Raises where an API server would refuse the JobSet, or the jobs and pods that it makes."""
    definition().validate(made)
    for replicated in made["spec"]["replicatedJobs"]:
        spec = replicated["template"]["spec"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def made(**changed: Any) -> dict[str, Any]:
    arguments = {"name": "my-run", "topology": "v5e-16", "slices": 1, "image": "r/uwm:1", "command": TRAIN, "env": {}}
    return manifest.jobset(**arguments | changed)


def parts(jobset: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The spec of its job, of its pods, and their container."""
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


@pytest.mark.parametrize("topology", topology_lib.known())
def test_every_topology_has_a_valid_jobset_with_all_its_chips(topology):
    jobset = made(topology=topology, slices=2)
    if topology in ("v4-8", "v6e-256"):
        check(jobset)
    job, pod, container = parts(jobset)
    found = topology_lib.find(topology)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert job["completions"] == job["parallelism"]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == found.chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "x".join(map(str, found.shape))


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v4-8", "tpu-v4-podslice", 1, 4),
        ("v5e-1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e-8", "tpu-v5-lite-podslice", 1, 8),
        ("v5e-16", "tpu-v5-lite-podslice", 4, 4),
        ("v5p-128", "tpu-v5p-slice", 16, 4),
        ("v6e-256", "tpu-v6e-slice", 64, 4),
    ],
)
def test_hosts_are_those_of_the_machines(topology, accelerator, hosts, chips):
    job, pod, container = parts(made(topology=topology))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert (job["completions"], container["resources"]["limits"]["google.com/tpu"]) == (hosts, chips)


def test_all_options_are_valid_and_secrets_are_named_only(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-value")
    jobset = made(
        env={"UWM_DATA_DIR": "gs://bkt/data"},
        secrets=[Secret("WANDB_API_KEY", "wandb")],
        service_account="trainer",
        spot=True,
    )
    check(jobset)
    _, pod, container = parts(jobset)
    assert container["command"] == ["python", "-m", "uwm_jax.supervise", "--", *TRAIN]
    assert container["env"] == [
        {"name": "UWM_DATA_DIR", "value": "gs://bkt/data"},
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}},
    ]
    assert pod["serviceAccountName"] == "trainer" and pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "the-value" not in json.dumps(jobset)


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        (Secret("WANDB_API_KEY"), "a manifest holds no values.*kubectl create secret generic"),
        (Secret("WANDB_API_KEY", "wandb", "3"), "Secrets of a cluster have no versions"),
    ],
)
def test_secrets_that_a_manifest_cannot_name_are_refused(secret, message):
    with pytest.raises(UserError, match=message):
        made(secrets=[secret])


def test_a_command_without_a_workdir_runs_without_a_supervisor():
    command = ["python", "-m", "data_prep.copy", "gs://bkt/data", "/data"]
    assert parts(made(command=command))[2]["command"] == command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j: j["spec"]["failurePolicy"]["rules"][0].update(action="RestartAll"), "RestartAll"),
        (lambda j: j["spec"].update(maxRestarts=3), "maxRestarts"),
        (lambda j: parts(j)[2].update(comand=[]), "comand"),
        (lambda j: parts(j)[0].update(completions="four"), "four"),
    ],
)
def test_the_validators_refuse_what_is_wrong(change, message):
    jobset = made()
    change(jobset)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=message):
        check(jobset)


@pytest.mark.parametrize("name", ["", "1st", "A", "a_b", "a-", "a" * 41])
def test_names_that_no_pod_could_have(name):
    with pytest.raises(UserError, match="at most 40 lower-case letters"):
        manifest.check_name(name)
    assert len(f"{manifest.check_name('a' * 40)}-slice-999-9999-abcde") <= 63


# --- What the two controllers do, as their documentation says: the first rule that matches. --------------------------


def end_of_job(jobset: dict[str, Any], exit_code: int, conditions: list[str]) -> tuple[str, str]:
    """(reason, message) of the failed job of a pod that has failed; kubernetes.io/docs/tasks/job/pod-failure-policy."""
    for index, rule in enumerate(parts(jobset)[0]["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        hit = f"Container {manifest.CONTAINER} for pod default/x failed with exit code {exit_code}"
        if codes is None or exit_code not in codes["values"]:
            wanted = [c["type"] for c in rule.get("onPodConditions", []) if c["type"] in conditions]
            if not wanted:
                continue
            hit = f"Pod default/x has condition {wanted[0]}"
        assert rule["action"] == "FailJob"
        return "PodFailurePolicy", f"{hit} matching {rule['action']} rule at index {index}"
    assert parts(jobset)[0]["backoffLimit"] == 0
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def action(jobset: dict[str, Any], reason: str, message: str) -> str:
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"  # up to `maxRestarts`


def test_jobsets_restart_what_a_supervisor_restarts():
    jobset = made()
    for status in range(1, 256):
        told = action(jobset, *end_of_job(jobset, status, []))
        # 1 is the supervisor's own end: its bound, or members of a sweep that have diverged.
        assert told == ("FailJobSet" if status in {1, *supervision.FINAL} else "RestartJobSet"), status
    for status in (137, 143):  # of a pod that was evicted, preempted or drained: as often as it happens
        told = action(jobset, *end_of_job(jobset, status, ["DisruptionTarget"]))
        assert told == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert parts(jobset)[1]["restartPolicy"] == "Never"
    assert parts(jobset)[1]["terminationGracePeriodSeconds"] >= 25 + 30
