r"""Trains on TPUs of a GKE cluster: a JobSet that starts this commit's image on all hosts of one or more slices.

    python -m launch.image --image=REGISTRY/uwm_jax
    python -m launch.jobset create NAME --image=REGISTRY/uwm_jax --topology=v5e-16 -- \
        python -m uwm_jax.train --config=... --workdir=gs://...
    python -m launch.jobset status NAME
    python -m launch.jobset tail NAME
    python -m launch.jobset delete NAME

Each takes --dry_run, which prints the commands and the manifest, and runs nothing. `create` shows the plan of the run
first (docs/scale.md) and refuses one that does not fit. The cluster needs JobSet's controller
(https://jobset.sigs.k8s.io), which restarts pods that were lost; the supervisor in each pod restarts its process. Needs
kubectl, with the cluster's credentials (`gcloud container clusters get-credentials CLUSTER`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from absl import flags

from launch import actions, manifest, plan_row, regions, variables
from launch.bundle import bundle
from launch.gcloud import Gcloud
from launch.image import tagged
from launch.program import Program
from launch.tpu_resource import order
from launch.training_command import with_slices
from uwm_jax import cli

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parents[1]
TAIL_HOURS = 24.0


def define_flags() -> None:
    flags.DEFINE_string("topology", None, "create: of a slice, such as v5e-16, as uwm_jax.plan names it")
    flags.DEFINE_integer("slices", 1, "create: slices that the data-centre network connects", lower_bound=1)
    flags.DEFINE_bool("spot", False, "create: on nodes that the cloud may take away")
    flags.DEFINE_string("image", None, "create: the image that launch.image pushed, without its tag")
    flags.DEFINE_string("service_account", "", "create: of the pods, with access to the buckets; by default, default")
    flags.DEFINE_string("zone", "", "create: of the cluster; buckets of another region are warned about")
    flags.DEFINE_bool("no_plan", False, "create: without the plan of the run")
    flags.DEFINE_string("namespace", "", "of the JobSet; by default that of kubectl's context")
    flags.DEFINE_string("context", "", "of kubectl; by default its current one")
    flags.DEFINE_bool("dry_run", False, "print the commands that would run, and run none")
    variables.define_flags()
    cli.accept_arguments()
    cli.pass_on()


def main(call: cli.Call) -> None:
    action, name = actions.read(call.arguments, ACTIONS, "JobSet")
    chosen = [f"--{flag}={FLAGS[flag].value}" for flag in ("context", "namespace") if FLAGS[flag].value]
    advice = "Install it from https://kubernetes.io/docs/tasks/tools/;"
    kubectl = Program("kubectl", advice, FLAGS.dry_run, chosen)
    ACTIONS[action](kubectl, manifest.check_name(name), list(call.passed_on))


def create(kubectl: Program, name: str, command: list[str]) -> None:
    asked = order(cli.required("topology"), FLAGS.slices, False, "", 24.0, [])
    command = with_slices(command, asked.slices)
    found = bundle(ROOT, build=False)
    made = manifest.jobset(
        name,
        asked.topology,
        asked.slices,
        tagged(cli.required("image"), found),
        command,
        env=variables.plain(),
        secrets=variables.secrets(),
        service_account=FLAGS.service_account,
        spot=FLAGS.spot,
    )
    plan_row.check(asked.planned, command, no_plan=FLAGS.no_plan, dry_run=FLAGS.dry_run, say=kubectl.remark)
    if FLAGS.zone:
        regions.check(Gcloud(FLAGS.dry_run), regions.buckets(command, variables.plain()), FLAGS.zone)
    kubectl.run("create", "--filename=-", text=yaml.safe_dump(made, sort_keys=False, width=1_000))


def status(kubectl: Program, name: str, command: list[str]) -> None:
    actions.refuse_command(command, "status")
    kubectl.run("get", "jobset", name)
    kubectl.run("get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={name}", "--output=wide")


def tail(kubectl: Program, name: str, command: list[str]) -> None:
    actions.refuse_command(command, "tail")
    first = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0"
    first += ",batch.kubernetes.io/job-completion-index=0"
    kubectl.run("logs", f"--selector={first}", "--follow", "--tail=100", seconds=3600 * TAIL_HOURS)


def delete(kubectl: Program, name: str, command: list[str]) -> None:
    actions.refuse_command(command, "delete")
    kubectl.run("delete", "jobset", name)


ACTIONS: dict[str, Callable[[Program, str, list[str]], None]] = {
    "create": create,
    "status": status,
    "tail": tail,
    "delete": delete,
}

command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
