"""Rehearses `launch.tpu` on this machine: a run whose TPU is taken away half-way goes on and gives the same losses.

    python -m launch.rehearse_tpu
    python -m launch.rehearse_tpu -- python -m uwm_jax.train --config=FILE.py --config.checkpoint.every=3

A stand-in for gcloud (launch/gcloud_stub.py) starts real processes for the workers of a pretended TPU. They train
configs/quickstart.py in tiny form, or what the command after -- says, with their workdir in an emulator's bucket. One
run is left alone; in the other the TPU is taken away once half of its steps are durable, and the launcher, which was
started with --restart_on_preemption, replaces it. Exits with status 1 unless all losses are equal to the bit. Needs a
commit without changes, as every launch does, and 'uwm-jax[demo,dev]'.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from launch import training_command
from launch.gcloud_stub import Cloud
from launch.rehearse import MAKE_DATA, SHORT, TINY, one_device
from uwm_jax import cli
from uwm_jax import config as config_lib
from uwm_jax.benchmarking.emulator import emulator
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import Place, data_dir, place
from uwm_jax.training.checkpoints.steps import latest_step

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parents[1]
BUCKET, ZONE, SECRET = "rehearsal", "us-central2-b", "WANDB_API_KEY"
RUN_SECONDS = 1200.0  # for one run, with all that is installed and compiled

# What stands for the image of the machines: nothing is fetched, and what the package needs is what is installed here.
_IMAGE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PYTHONPATH": sysconfig.get_path("purelib")}
_KEPT = ("JAX_COMPILATION_", "JAX_PERSISTENT_", "JAX_DISABLE_", "XLA_FLAGS", "LANG", "LC_ALL")  # of this environment


def define_flags() -> None:
    flags.DEFINE_string("topology", "v4-16", "of a slice: v4-16 has two workers")
    flags.DEFINE_integer("slices", 1, "how many of them", lower_bound=1)
    cli.pass_on()


def main(call: cli.Call) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending what it has started
    with tempfile.TemporaryDirectory(prefix="uwm_rehearsal_") as temporary, emulator(BUCKET) as storage:
        os.environ.update(storage.environ)
        # Compiling takes most of the time: a few steps need no fast program.
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
        rehearsal = Rehearsal(
            Path(temporary),
            storage.environ,
            call.passed_on or _quickstart(Path(temporary)),
            FLAGS.topology,
            FLAGS.slices,
        )
        try:
            rehearsal.train("alone", preempt=False)
            rehearsal.train("preempted", preempt=True)
            rehearsal.check("preempted")
            rehearsal.compare("alone", "preempted")
        finally:
            rehearsal.cloud.end()


class Rehearsal:
    """Runs of `launch.tpu` in a pretended cloud.

    Args:
      folder: of all that is made.
      storage: the variables that lead to a bucket.
      training: the command of a run, without its workdir.
      topology, slices: of the TPUs.
    """

    def __init__(
        self, folder: Path, storage: Mapping[str, str], training: Sequence[str], topology: str, slices: int = 1
    ):
        asked = training_command.read(training)
        if asked.workdir or not asked.config:
            raise UserError("the command after -- has a --config and no --workdir: that is the rehearsal's bucket.")
        self._size = [f"--topology={topology}", f"--slices={slices}"]
        self._training, self._steps = training, config_lib.load(asked.config, asked.overrides).total_steps
        kept = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
        self.cloud = Cloud(folder / "cloud", {**one_device(kept), **_IMAGE, **storage})
        (self.cloud.folder / "buckets.json").write_text(
            json.dumps({BUCKET: {"location": "US-CENTRAL2", "locationType": "region"}})
        )
        self._secret, self._said = secrets.token_hex(16), ""
        own = {"XDG_STATE_HOME": str(folder / "state"), "XDG_CACHE_HOME": str(folder / "cache"), SECRET: self._secret}
        self._env = {**os.environ, **self.cloud.environ, **own, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def train(self, name: str, preempt: bool) -> None:
        """Trains on a TPU of this name, which is taken away half-way if `preempt`."""
        training = [*self._training, f"--workdir={self.workdir(name)}"]
        self._launch("create", name, "--no_plan", "--spot", *self._size, "--", *training)
        self._launch("install", name)
        start = ["start", name, "--no_plan", f"--restart_on_preemption={name}", f"--secret={SECRET}", "--", *training]
        launcher = subprocess.Popen(
            self._command(*start), cwd=ROOT, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        reader = threading.Thread(target=self._follow, args=(launcher,), daemon=True)
        reader.start()
        try:
            if preempt:
                self._preempt(name, launcher)
            launcher.wait(RUN_SECONDS)
        finally:
            launcher.kill()
            reader.join()
        if launcher.returncode:
            raise RunError(
                f"launch.tpu start: status {launcher.returncode}; the last lines of its run:\n{self._log(name)}"
            )
        self._launch("delete", name)

    def _preempt(self, name: str, launcher: subprocess.Popen) -> None:
        """Takes the TPU away as soon as half of the steps are durable."""
        deadline = time.monotonic() + RUN_SECONDS
        while (latest_step(self.workdir(name)) or 0) < self._steps // 2:
            if launcher.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"{name}: it ended before it could be taken away:\n{self._log(name)}")
            time.sleep(0.3)
        self.cloud.preempt(name)
        step = latest_step(self.workdir(name))
        if step == self._steps:
            raise RunError(f"{name}: all {step} steps were durable before it could be taken away: give it more steps.")
        print(f"{name}: taken away; step {step} is durable", flush=True)

    def compare(self, one: str, other: str) -> None:
        """Raises RunError unless the losses of two runs are equal."""
        losses = {name: self.losses(name) for name in (one, other)}
        if losses[one] != losses[other] or len(losses[one]) != self._steps:
            raise RunError(f"the losses differ: {losses}")
        print(f"rehearsed: the losses of {self._steps} steps are equal to the bit", flush=True)

    def check(self, name: str) -> None:
        """Raises RunError unless a TPU was created twice, and the secret is nowhere to be seen."""
        created = [words[3:5] for words in self.cloud.calls() if words[3] == "create"]
        if created.count(["create", name]) != 2:
            raise RunError(f"expected {name} to be created twice, found {created}")
        seen = [self._said, *map(str, self.cloud.calls())]
        seen += [file.read_text(errors="replace") for file in self.workdir(name).glob("*.json*")]
        if any(self._secret in text for text in seen):
            raise RunError(f"the value of {SECRET} can be read where it should not be.")

    def workdir(self, name: str) -> Place:
        return place(f"gs://{BUCKET}/runs/{name}", "--workdir")

    def losses(self, name: str) -> list[tuple[int, float]]:
        """(step, loss) of each line of a run's log."""
        lines = (self.workdir(name) / "metrics.jsonl").read_text().splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    def _launch(self, *arguments: str) -> None:
        """One call of `launch.tpu`."""
        command = self._command(*arguments)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_SECONDS,
        )
        self._tell(done.stdout)
        if done.returncode:
            raise RunError(f"launch.tpu {arguments[0]}: status {done.returncode}")

    def _follow(self, launcher: subprocess.Popen) -> None:
        for line in launcher.stdout or ():
            self._tell(line)

    def _command(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "launch.tpu",
            *arguments[:2],
            f"--zone={ZONE}",
            "--poll_seconds=0.5",
            *arguments[2:],
        ]

    def _tell(self, text: str) -> None:
        self._said += text
        print(text, end="", flush=True)

    def _log(self, name: str) -> str:
        logs = [home / "uwm_jax" / "run.log" for home in (self.cloud.folder / "homes" / name).glob("*")]
        return "\n".join("\n".join(log.read_text().splitlines()[-20:]) for log in logs if log.exists())


def _quickstart(folder: Path) -> list[str]:
    """A tiny run of the quickstart; a few demonstrations are made where its dataset is absent."""
    data = data_dir() / "pusht"
    if not data.is_dir():
        data = folder / "pusht"
        if subprocess.run([*MAKE_DATA, f"--output={data}"], cwd=ROOT, env=one_device(os.environ)).returncode:
            raise RunError("data_prep.demo failed; it needs pip install -e '.[demo]'.")
    fields = (*SHORT, *TINY, "total_steps=12", f"data.path={data.absolute()}")
    return [
        "python",
        "-m",
        "uwm_jax.train",
        "--config=configs/quickstart.py",
        *(f"--config.{field}" for field in fields),
    ]


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
