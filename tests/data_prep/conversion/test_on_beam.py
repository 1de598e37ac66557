"""The tasks of a job on a Beam pipeline, where Beam is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import reshard
from data_prep.conversion import layout_options, on_beam
from data_prep.conversion.cutting import run_task
from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build
from data_prep.sources.inputs import Corpus, Found, Input
from tests.data_prep.killing import finished_tasks, tree
from uwm_jax import cli
from uwm_jax.data.episodes import feature_tree, serialize_episode
from uwm_jax.data.features import Feature
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import RemotePath, copy_tree, place

ROOT = Path(__file__).parents[3]
HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
NEEDS_BEAM = "needs Apache Beam, in an environment of its own"
BEAM = pytest.mark.skipif(not HAS_BEAM, reason=NEEDS_BEAM)
BEAM_PYTHON = Path(sys.prefix) / "beam/bin/python"  # launch/test.sh makes it
SUBPROCESSES = ("--environment_type=beam:env:harness_subprocess_python:v1",)
SUBPROCESSES += (f"--environment_config={sys.executable} -m apache_beam.runners.worker.sdk_worker_main",)
FEATURES = {"steps/action": Feature((2,), "float32"), "language_instruction": Feature((), "string")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made(Input):
    """Episodes of a seed; a task that has no seed yet fails."""

    seeds: Path

    def episodes(self) -> Iterator[Found]:
        rng = np.random.default_rng(int((self.seeds / self.name).read_text()))
        for length in rng.integers(3, 30, 4):
            values = {"steps/action": rng.normal(size=(length, 2)), "language_instruction": f"of {self.name}"}
            yield Found(serialize_episode(FEATURES, values))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for i in range(5):
        (seeds / f"input{i}").write_text(str(i))
    inputs = [Made(name=f"input{i}", size=100, seeds=seeds) for i in range(5)]
    return Corpus("toy", "1.0.0", seeds, feature_tree(FEATURES), {"train": inputs[:4], "val": inputs[4:]})


@BEAM
def test_a_pipeline_makes_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    build(corpus, tmp_path / "plain", Options(workers=1))
    build(corpus, tmp_path / "beam", Options(beam=()))
    assert tree(tmp_path / "beam") == tree(tmp_path / "plain")


@BEAM
def test_what_a_failed_pipeline_finished_is_kept(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "seeds" / "input4").unlink()
    with pytest.raises(RunError, match=r"a task failed on the Beam pipeline: .*input4"):
        build(corpus, tmp_path / "beam", Options(beam=()))
    assert not (tmp_path / "beam").exists()
    done = finished_tasks(tmp_path / "beam")
    (tmp_path / "seeds" / "input4").write_text("4")
    build(corpus, tmp_path / "beam", Options(workers=1))
    build(corpus, tmp_path / "plain", Options(workers=1))
    assert done <= 4 and tree(tmp_path / "beam") == tree(tmp_path / "plain")


@BEAM
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runner=NoSuchRunner",), "'--runner=NoSuchRunner'"),
        (("--runer=FlinkRunner", "--direct_num_workers", "1"), ".*the DirectRunner does not know --runer$"),
        (
            ("--runner=PortableRunner", "--job_endpoint=localhost:1"),
            ".*no job service answers at localhost:1 .*refused",
        ),
        (("--direct_num_workers=1", "FlinkRunner"), ".*the DirectRunner does not know FlinkRunner$"),
    ],
)
def test_options_that_beam_does_not_know(
    corpus: Corpus, tmp_path: Path, options: tuple, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_beam, "_PATIENCE", 0.1)
    with pytest.raises(UserError, match=f"Beam refuses its options, {message}"):
        build(corpus, tmp_path / "beam", Options(beam=options))


def test_a_job_service_that_is_starting_is_waited_for() -> None:
    with socket.socket() as service:
        service.bind(("localhost", 0))
        later = threading.Timer(0.3, service.listen)
        later.start()
        on_beam._check_reachable(f"localhost:{service.getsockname()[1]}")
        later.join()
    on_beam._check_reachable("dns:///localhost:1")  # which Beam may know how to reach


@pytest.fixture
def job_service(storage_emulator, tmp_path: Path) -> Iterator[str]:
    """Options that lead to Beam's local job service, a process of its own, as those of Flink or Spark are."""
    port = tmp_path / "service" / "port"
    with (tmp_path / "service.log").open("wb") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port_file={port}"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not port.exists():
            assert service.poll() is None and time.monotonic() < deadline, (tmp_path / "service.log").read_text()
            time.sleep(0.02)
        yield f"--job_endpoint=localhost:{port.read_text()}"
    finally:
        service.terminate()
        service.wait(60)


@BEAM
def test_another_runner_makes_the_same_bytes(corpus: Corpus, tmp_path: Path, bucket: str, job_service: str) -> None:
    """The tasks run in this process, in processes of the job service, and there with a bucket as output."""
    build(corpus, tmp_path / "plain", Options(workers=1))
    runner = ("--runner=PortableRunner", job_service)
    build(corpus, tmp_path / "loopback", Options(beam=(*runner, "--environment_type=LOOPBACK")))
    (tmp_path / "seeds" / "input4").unlink()
    with pytest.raises(RunError, match="a task failed on the Beam pipeline"):
        build(corpus, tmp_path / "processes", Options(beam=(*runner, *SUBPROCESSES)))
    (tmp_path / "seeds" / "input4").write_text("4")
    build(corpus, tmp_path / "processes", Options(beam=(*runner, *SUBPROCESSES)))
    output = place(f"{bucket}/toy", "--output")
    build(corpus, output, Options(beam=(*runner, *SUBPROCESSES)))
    copy_tree(output, tmp_path / "bucket")
    for made in ("loopback", "processes", "bucket"):
        assert tree(tmp_path / made) == tree(tmp_path / "plain"), made
    assert "sdk_worker_main" in (tmp_path / "service.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(HAS_BEAM or not BEAM_PYTHON.exists(), reason="no environment with Beam, which launch/test.sh makes")
def test_the_above_in_an_environment_with_beam() -> None:
    command = [str(BEAM_PYTHON), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    tests = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-2, text=True, start_new_session=True)
    try:
        printed, _ = tests.communicate(timeout=600)
    finally:
        if tests.poll() is None:
            os.killpg(tests.pid, signal.SIGKILL)
    assert tests.returncode == 0 and NEEDS_BEAM not in printed, printed


@pytest.mark.skipif(HAS_BEAM, reason="Beam is installed here")
def test_without_beam_the_message_says_how_to_get_it(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Apache Beam is not installed. .*uwm_jax\[beam\]"):
        build(corpus, tmp_path / "beam", Options(beam=()))
    assert not list(tmp_path.glob(".beam*"))


def test_a_dataset_is_made_in_a_bucket(corpus: Corpus, tmp_path: Path, bucket: str, monkeypatch) -> None:
    """The pipeline is pretended: its tasks travel as Beam's do, and the first fails once it has written half."""

    def run_jobs(jobs, arguments, watch=lambda result: None):
        for job in pickle.loads(pickle.dumps(jobs)):
            assert isinstance(job.folder, RemotePath)
            if not job.is_done:
                run_task(job)
        return [job.result() for job in jobs]

    monkeypatch.setattr(on_beam, "run_jobs", run_jobs)
    output = place(f"{bucket}/toy", "--output")
    (tmp_path / "seeds" / "input4").unlink()
    with pytest.raises(FileNotFoundError):
        build(corpus, output, Options(beam=()))
    assert not output.exists()
    [parts] = output.with_name(".toy.building").iterdir()
    assert sorted(p.parent.name for p in parts.glob("*/result.json")) == [f"train.{i:05d}" for i in range(4)]
    (parts / "train.00000" / "result.json").unlink()  # as a task that was killed leaves it
    (tmp_path / "seeds" / "input4").write_text("4")
    build(corpus, output, Options(beam=()))
    build(corpus, tmp_path / "plain", Options(workers=1))
    copy_tree(output, tmp_path / "down")
    assert tree(tmp_path / "down") == tree(tmp_path / "plain")
    assert not output.with_name(".toy.building").exists()
    with pytest.raises(UserError, match="toy exists.*--overwrite"):
        build(corpus, output, Options(beam=()))
    build(corpus, output, Options(beam=(), overwrite=True))
    with pytest.raises(UserError, match="python -m data_prep.copy"):
        build(corpus, output, Options(workers=1))


def test_options_of_the_pipeline_follow_two_dashes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    found: list[Options] = []
    monkeypatch.setattr(reshard, "run", lambda corpus, output, options, source: found.append(options))

    def call(*flags: str) -> int:
        return cli.call(reshard.main, ["reshard", "--input=a", "--output=b", *flags], reshard.define_flags)

    assert call("--beam", "--", "--runner=FlinkRunner", "--x-y") == 0
    assert call("--beam") == 0 and call() == 0
    assert [options.beam for options in found] == [("--runner=FlinkRunner", "--x-y"), (), None]
    assert call("--", "--runner=FlinkRunner") == 2
    assert "what follows ` -- ` is for Beam" in capsys.readouterr().err
    assert call("--beam", "--task=0/2") == 0
    with pytest.raises(UserError, match="neither --task nor --assemble"):
        found[-1].check()
    assert call("--task=3") == 2 and "--task=3: expected I/N" in capsys.readouterr().err
    for size in ("3", "²,3", "0,8", "70000,8", "8,8,8", "9" * 5000 + ",8"):
        assert call(f"--resize={size}") == 2 and "--resize: expected H,W" in capsys.readouterr().err
    assert layout_options.Options() == found[2]
