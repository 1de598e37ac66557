r"""Trains on GPUs of a SLURM cluster: a batch job with one process on each node, which takes all of the node's GPUs.

    python -m launch.slurm install
    python -m launch.slurm create NAME --nodes=2 --gpus_per_node=8 --hours=24 -- \
        python -m uwm_jax.train --config=... --workdir=...
    python -m launch.slurm status NAME
    python -m launch.slurm tail NAME
    python -m launch.slurm delete NAME

Each takes --dry_run, which prints the commands and the batch script, and runs nothing. Run it on a login node:
`install` makes an environment for this commit below --folder, which all nodes must see; `create` submits the job. The
mesh of the config must fit the GPUs. Two minutes before its time is over the run is told to save; the same command goes
on from there.
"""

from __future__ import annotations

import getpass
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags

from launch import actions, training_command, variables
from launch.bundle import Bundle, bundle
from launch.manifest import supervised
from launch.program import Program
from launch.variables import Secret
from uwm_jax import cli
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.files import local_path
from uwm_jax.parallel.mesh import find_sizes
from uwm_jax.planning.programs import programs

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parents[1]
INSTALL_SECONDS = 3600.0
TAIL_HOURS = 24.0
SAVE_SECONDS = 120  # before the end of a job's time, for its run to save

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OPTION = re.compile(r"[a-z][a-z-]*(=\S+)?")


def define_flags() -> None:
    flags.DEFINE_string("folder", "~/uwm_jax", "on a file system that all nodes share: environments, scripts, logs")
    flags.DEFINE_string("extras", "cuda", "install: extras of uwm-jax in the environment")
    flags.DEFINE_integer("nodes", 1, "create: nodes", lower_bound=1)
    flags.DEFINE_integer("gpus_per_node", None, "create: GPUs of each", lower_bound=1)
    flags.DEFINE_float("hours", 24.0, "create: the longest that the job runs", 0.05)
    flags.DEFINE_multi_string("sbatch_flag", [], "create: a further flag, such as partition=gpu; may be repeated")
    flags.DEFINE_bool("dry_run", False, "print the commands that would run, and run none")
    variables.define_flags()
    cli.accept_arguments()
    cli.pass_on()


def main(call: cli.Call) -> None:
    if list(call.arguments) == ["install"]:
        actions.refuse_command(call.passed_on, "install")
        return install(bundle(ROOT, build=not FLAGS.dry_run))
    action, name = actions.read(call.arguments, ["install", *ACTIONS], "job")
    if action == "install":
        raise UserError(f"install: expected no name, found {name}: it is of the commit that is checked out.")
    if not _NAME.fullmatch(name):
        raise UserError(f"{name}: expected a name of letters, digits, dots, hyphens and underscores.")
    ACTIONS[action](name, list(call.passed_on))


def install(found: Bundle) -> None:
    folder = _folder(found)
    names = " ".join(shlex.quote(str(file)) for file in found.files)
    wheel = shlex.join([found.wheel.name, found.python, FLAGS.extras])
    bash = Program("bash", "", FLAGS.dry_run)
    quoted = shlex.quote(str(folder))
    bash.run("-c", f"umask 077 && mkdir -p {quoted} && cp {names} {quoted}")
    bash.run(
        "-c",
        f"cd {quoted} && tar -xzf {found.archive.name} && bash launch/worker.sh install {wheel}",
        seconds=INSTALL_SECONDS,
    )


def create(name: str, command: list[str]) -> None:
    if FLAGS.gpus_per_node is None:
        raise UserError("--gpus_per_node is required. Run with --help to see the flags.")
    found, sbatch = bundle(ROOT, build=False), _slurm("sbatch")
    refuse_unfit(command, FLAGS.nodes * FLAGS.gpus_per_node, sbatch.remark)
    folder = _folder(found)
    if not FLAGS.dry_run and not (folder / "env" / "installed").exists():
        raise UserError(f"--folder: {folder} has no environment of this commit: run `python -m launch.slurm install`.")
    secrets = variables.secrets()
    for secret in secrets:
        if secret.name is None and not FLAGS.dry_run:
            secret.value()  # which sbatch takes from this environment
    text = script(
        name,
        command,
        folder=folder,
        log=_log(name),
        nodes=FLAGS.nodes,
        gpus=FLAGS.gpus_per_node,
        minutes=round(60 * FLAGS.hours),
        options=FLAGS.sbatch_flag,
        env=variables.plain(),
        secrets=secrets,
    )
    sbatch.run(text=text)


def status(name: str, command: list[str]) -> None:
    actions.refuse_command(command, "status")
    _slurm("squeue").run(f"--user={getpass.getuser()}", f"--name={name}")


def tail(name: str, command: list[str]) -> None:
    actions.refuse_command(command, "tail")
    Program("tail", "", FLAGS.dry_run).run("-n", "100", "-F", str(_log(name)), seconds=3600 * TAIL_HOURS)


def delete(name: str, command: list[str]) -> None:
    actions.refuse_command(command, "delete")
    _slurm("scancel").run(f"--user={getpass.getuser()}", f"--name={name}")


ACTIONS: dict[str, Callable[[str, list[str]], None]] = {
    "create": create,
    "status": status,
    "tail": tail,
    "delete": delete,
}


def script(
    name: str,
    command: Sequence[str],
    *,
    folder: Path,
    log: Path,
    nodes: int,
    gpus: int,
    minutes: int,
    options: Sequence[str] = (),
    env: Mapping[str, str],
    secrets: Sequence[Secret] = (),
) -> str:
    """The batch script of a job.

    Args:
      command: `python -m uwm_jax.train ...`, for each node.
      folder: of the commit's bundle and environment, where the command runs.
      gpus: of each node.
      options: further ones of sbatch, such as `partition=gpu`.
      secrets: those without a name come from the environment in which the job is submitted, the others from the cloud's
        secret manager when it starts.

    Raises:
      UserError: an option is none.
    """
    for option in options:
        if not _OPTION.fullmatch(option.removeprefix("--")):
            raise UserError(f"--sbatch_flag={option}: expected an option of sbatch such as partition=gpu.")
    of_here = [secret.variable for secret in secrets if secret.name is None]
    lines = [
        f"job-name={name}",
        f"nodes={nodes}",
        "ntasks-per-node=1",
        f"gpus-per-node={gpus}",
        f"time={minutes}",
        f"signal=TERM@{SAVE_SECONDS}",
        "requeue",
        "open-mode=append",
        f"output={shlex.quote(str(log).replace('%', '%%'))}",
        f"export={','.join(['HOME', 'USER', 'PATH', *of_here])}",
        *(option.removeprefix("--") for option in options),
    ]
    set_here = [f"export {key}={shlex.quote(value)}" for key, value in env.items()]
    for secret in secrets:
        if secret.name is not None:
            read = f"gcloud secrets versions access {secret.version} --secret={secret.name} --quiet"
            set_here += [f'{secret.variable}="$({read})"', f"export {secret.variable}"]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH --{line}" for line in lines),
            "set -euo pipefail",
            f"cd {shlex.quote(str(folder))}",
            'export PATH="$PWD/env/bin:$PATH"',
            *set_here,
            # A process that ends is its supervisor's business; SLURM starts the job again where a node is lost.
            f"exec srun --kill-on-bad-exit=0 --export=ALL {shlex.join(supervised(command))}",
            "",
        ]
    )


def refuse_unfit(command: Sequence[str], devices: int, say: Callable[[str], None]) -> None:
    """Raises UserError where the mesh of a run, or of a program of a sweep, does not fit so many GPUs."""
    asked = training_command.read(command)
    if asked.module not in training_command.TRAINS or not asked.config:
        return say(f"mesh: {asked.module} has no --config that trains, so nothing is known of it")
    config = config_lib.load(asked.config, asked.overrides)
    for one, names in programs(asked.config, config, asked.grid, say):
        sweep, data, fsdp, tensor = find_sizes(one, devices, "gpu", len(names))
        members = f"sweep {sweep} x " if names else ""
        say(f"mesh: {members}data {data} x fsdp {fsdp} x tensor {tensor} = {devices} GPUs")


def _slurm(name: str) -> Program:
    return Program(name, "It is SLURM's: run this on a login node of the cluster;", FLAGS.dry_run)


def _folder(found: Bundle) -> Path:
    return local_path(FLAGS.folder, "--folder").absolute() / found.commit[:12]


def _log(name: str) -> Path:
    return local_path(FLAGS.folder, "--folder").absolute() / f"{name}.log"


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
