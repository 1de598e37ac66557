"""Trains on TPUs of Google Cloud: creates them, installs this commit on all workers, starts a run there, shows it.

    python -m launch.tpu create NAME --zone=ZONE --topology=v5e-16 -- python -m uwm_jax.train --config=... --workdir=gs://...
    python -m launch.tpu install NAME --zone=ZONE
    python -m launch.tpu start NAME --zone=ZONE --restart_on_preemption=NAME -- python -m uwm_jax.train --config=... --workdir=gs://...
    python -m launch.tpu status NAME --zone=ZONE
    python -m launch.tpu tail NAME --zone=ZONE
    python -m launch.tpu delete NAME --zone=ZONE

Each takes --dry_run, which prints the commands that would run and runs none. TPUs are queued resources of one or more
slices, or with --vm a TPU VM. `create` and `start` show the plan of the run first (docs/scale.md) and refuse one that
does not fit. What is started outlives this command; with --restart_on_preemption it stays, and replaces the TPU NAME,
which must have been created from here, whenever the cloud takes it away. Needs gcloud, logged in.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from launch import actions, plan_row, regions, training_command, variables
from launch.bundle import Bundle, bundle
from launch.gcloud import Gcloud
from launch.tpu_resource import QUEUED, REACH_SECONDS, VM, Order, Resource, order, remembered
from launch.tpu_watch import Watch
from launch.training_command import with_slices
from uwm_jax import cli
from uwm_jax.errors import UserError
from uwm_jax.files import place
from uwm_jax.training.checkpoints.steps import latest_step

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parents[1]
INSTALL_SECONDS = 1800.0
COPY_SECONDS = 1800.0
START_SECONDS = 300.0
TAIL_HOURS = 24.0


def define_flags() -> None:
    flags.DEFINE_string("zone", None, "of the TPU, such as us-west4-a")
    flags.DEFINE_string("project", "", "of the TPU; by default the one that gcloud is configured with")
    flags.DEFINE_bool("dry_run", False, "print the commands that would run, and run none")
    flags.DEFINE_bool("vm", False, "a TPU VM, which is there at once or not at all, instead of a queued resource")
    flags.DEFINE_string("topology", None, "create: of a slice, such as v5e-16, as uwm_jax.plan names it")
    flags.DEFINE_integer("slices", 1, "create: slices that the data-centre network connects", lower_bound=1)
    flags.DEFINE_bool("spot", False, "create: cheaper machines that the cloud may take away")
    flags.DEFINE_string("runtime_version", "", "create: software of the machines, by default the one for the topology")
    flags.DEFINE_multi_string("create_flag", [], "create: a further flag of gcloud, such as network=mtu9k; repeatable")
    flags.DEFINE_float("queue_hours", 24.0, "the longest wait in the queue", 0.01, 168.0)
    flags.DEFINE_bool("no_plan", False, "create, start: without the plan of the run")
    flags.DEFINE_string("extras", "tpu", "install: extras of uwm-jax on the workers")
    flags.DEFINE_string("restart_on_preemption", None, "start: stay, and replace the TPU of this name, NAME itself")
    flags.DEFINE_float("watch_hours", 336.0, "start: with --restart_on_preemption, the longest stay", 0.01)
    flags.DEFINE_float("poll_seconds", 60.0, "between looks at what is waited for", 0.1)
    variables.define_flags()
    cli.accept_arguments()
    cli.pass_on()


def main(call: cli.Call) -> None:
    action, name = actions.read(call.arguments, ACTIONS, "TPU")
    zone = cli.required("zone")
    gcloud = Gcloud(FLAGS.dry_run, FLAGS.project)
    known = remembered(name, zone)
    resource = Resource(gcloud, name, zone, known, VM if FLAGS.vm else QUEUED, poll_seconds=FLAGS.poll_seconds)
    ACTIONS[action](resource, list(call.passed_on))


def create(resource: Resource, command: list[str]) -> None:
    extra = [*FLAGS.create_flag, *(["spot"] if FLAGS.spot else [])]
    asked = order(cli.required("topology"), FLAGS.slices, FLAGS.vm, FLAGS.runtime_version, FLAGS.queue_hours, extra)
    if resource.order is not None and not FLAGS.dry_run and (state := resource.state()):
        raise UserError(
            f"{resource.name}: it exists already ({state}), created from here. Go on with `launch.tpu install`, delete "
            "it first, or take another name."
        )
    if command:
        _look_ahead(resource, asked, with_slices(command, asked.slices))
    resource = Resource(resource.gcloud, resource.name, resource.zone, asked, poll_seconds=FLAGS.poll_seconds)
    resource.create()
    resource.wait(FLAGS.queue_hours)


def install(resource: Resource, command: list[str]) -> None:
    actions.refuse_command(command, "install")
    _install(resource, bundle(ROOT, build=not FLAGS.dry_run))


def start(resource: Resource, command: list[str]) -> None:
    asked, replaced = resource.order, FLAGS.restart_on_preemption
    if replaced and replaced != resource.name:
        raise UserError(
            f"--restart_on_preemption={replaced}: expected {resource.name}, the TPU that the run is started on; "
            "nothing else is ever replaced."
        )
    if replaced and asked is None:
        refusal = (
            f"--restart_on_preemption={replaced}: not created from here (`launch.tpu create`), so it is not replaced."
        )
        if not FLAGS.dry_run:
            raise UserError(refusal)
        resource.gcloud.remark(f"would be refused now: {refusal}")
    if asked is None and FLAGS.topology:
        asked = order(FLAGS.topology, FLAGS.slices, FLAGS.vm, "", FLAGS.queue_hours, [])
    command = with_slices(command, asked.slices if asked else 1)
    found = bundle(ROOT, build=not FLAGS.dry_run)
    secrets = variables.secrets()
    for secret in secrets:
        if secret.name is None and not FLAGS.dry_run:
            secret.value()  # before anything runs
    _look_ahead(resource, asked, command)
    if not replaced or FLAGS.dry_run or resource.state() == resource.api.ready:  # else the watch does it
        _start(resource, found, command, secrets, again=bool(replaced))
    if not replaced:
        return
    workdir = training_command.read(command).workdir
    if not workdir:
        raise UserError("--restart_on_preemption: the command has no --workdir to continue from.")
    watch = Watch(
        resource,
        install=lambda: _install(resource, found),
        start=lambda: _start(resource, found, command, secrets, again=True),
        newest_step=lambda: latest_step(place(workdir, "--workdir")),
        hours=FLAGS.queue_hours,
        limit_hours=FLAGS.watch_hours,
        poll_seconds=FLAGS.poll_seconds,
    )
    if FLAGS.dry_run:
        resource.gcloud.remark(
            f"then, every {FLAGS.poll_seconds:g} s, until the run has ended or {FLAGS.watch_hours:g} h are over:"
        )
        resource.describe()
        resource.workers()
        return
    watch.run()


def status(resource: Resource, command: list[str]) -> None:
    actions.refuse_command(command, "status")
    state = resource.state()
    print(
        f"{resource.name}: {state or 'there is none'}" if not FLAGS.dry_run else "", end="" if FLAGS.dry_run else "\n"
    )
    if FLAGS.dry_run or state == resource.api.ready:
        for number, said in enumerate(resource.workers()):
            print(f"worker {number}: {said}")


def tail(resource: Resource, command: list[str]) -> None:
    actions.refuse_command(command, "tail")
    resource.first("tail -n 100 -F uwm_jax/run.log", seconds=3600 * TAIL_HOURS)


def delete(resource: Resource, command: list[str]) -> None:
    actions.refuse_command(command, "delete")
    resource.delete(force=True)
    resource.forget()


ACTIONS: dict[str, Callable[[Resource, list[str]], None]] = {
    "create": create,
    "install": install,
    "start": start,
    "status": status,
    "tail": tail,
    "delete": delete,
}


def _look_ahead(resource: Resource, asked: Order | None, command: Sequence[str]) -> None:
    """The plan of the run, and warnings about its buckets."""
    if asked is None:
        resource.gcloud.remark(f"no plan: {resource.name} was not created from here, so give its --topology")
    else:
        plan_row.check(asked.planned, command, no_plan=FLAGS.no_plan, dry_run=FLAGS.dry_run, say=resource.gcloud.remark)
    regions.check(resource.gcloud, regions.buckets(command, variables.plain()), resource.zone)


def _install(resource: Resource, found: Bundle) -> None:
    folder = _folder(found)
    resource.ssh(f"umask 077 && mkdir -p {folder}", seconds=REACH_SECONDS, retry_seconds=REACH_SECONDS)
    resource.copy([str(file) for file in found.files], folder, seconds=COPY_SECONDS)
    wheel = shlex.join([found.wheel.name, found.python, FLAGS.extras])
    resource.ssh(
        f"cd {folder} && tar -xzf {found.archive.name} && bash launch/worker.sh install {wheel}",
        seconds=INSTALL_SECONDS,
    )


def _start(
    resource: Resource, found: Bundle, command: Sequence[str], secrets: Sequence[variables.Secret], again: bool
) -> None:
    of_here = [secret for secret in secrets if secret.name is None]
    if of_here and resource.gcloud.dry_run:
        names = ", ".join(secret.variable for secret in of_here)
        resource.gcloud.remark(f"secrets: a temporary file with the values of {names}, which no command line shows")
        resource.copy(["secrets"], "uwm_jax", seconds=COPY_SECONDS)
    elif of_here:
        with tempfile.TemporaryDirectory(prefix="uwm_launch_") as folder:  # of this user alone
            file = Path(folder) / "secrets"
            file.touch(mode=0o600)
            file.write_text("".join(f"{s.variable}={shlex.quote(s.value())}\n" for s in of_here))
            resource.copy([str(file)], "uwm_jax", seconds=COPY_SECONDS)
    told = ["--again"] if again else []
    for secret in secrets:
        if secret.name is not None:
            told += ["--secret", f"{secret.variable}={secret.name}:{secret.version}"]
    told += [f"{name}={value}" for name, value in variables.plain().items()]
    line = shlex.join(["bash", "launch/worker.sh", "start", *told, "--", *command])
    resource.ssh(f"cd {_folder(found)} && {line}", seconds=START_SECONDS)


def _folder(found: Bundle) -> str:
    """Of a bundle, in the workers' home directory."""
    return f"uwm_jax/{found.commit[:12]}"


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
