"""The tasks of a job on a Beam pipeline, where Beam is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
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

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
BEAM = pytest.mark.skipif(
    not HAS_BEAM, reason="needs Apache Beam: `pip install 'uwm_jax[beam]' pytest` in an environment of its own"
)
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
def test_options_that_beam_does_not_know(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Beam refuses its options, '--runner=NoSuchRunner'"):
        build(corpus, tmp_path / "beam", Options(beam=("--runner=NoSuchRunner",)))


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
