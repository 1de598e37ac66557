"""PushT demonstrations: the episodes, and what is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from uwm_jax.data.records import fingerprint, read_manifest
from uwm_jax.errors import UserError

pytest.importorskip("gym_pusht")

from data_prep import demo  # noqa: E402

TINY = demo.Demo(episodes=2, image_size=32, seed=3, candidates=6, max_steps=12)


def test_expert_solves():
    for number in range(2):
        episode = demo.run_episode(number, demo.Demo(image_size=16))
        assert episode.solved and episode.coverage > 0.95 and episode.reward[-1] == 1
        assert len(episode.action) < 300
        assert len(episode.images) == len(episode.agent_pos) == len(episode.action) + 1
        assert episode.action.min() >= 0 and episode.action.max() <= 512


def same(a: demo.Episode, b: demo.Episode) -> bool:
    x, y = dataclasses.astuple(a), dataclasses.astuple(b)
    return all(np.array_equal(p, q) if isinstance(p, np.ndarray) else p == q for p, q in zip(x, y, strict=True))


def test_episodes_do_not_depend_on_the_processes():
    def first(workers: int) -> list[tuple[int, demo.Episode]]:
        generator = demo.episodes(TINY, workers)
        try:
            return list(itertools.islice(generator, 4))
        finally:
            generator.close()

    alone, together = first(1), first(2)
    assert [n for n, _ in alone] == [n for n, _ in together] == [0, 1, 2, 3]
    assert all(same(a, b) for (_, a), (_, b) in zip(alone, together, strict=True))
    assert same(demo.run_episode(2, TINY), alone[2][1])  # nor on the episodes before it
    assert not same(demo.run_episode(2, dataclasses.replace(TINY, seed=4)), alone[2][1])


@pytest.fixture
def short_episodes(monkeypatch):
    """Episode 1 fails; the others count as solved after a few steps."""
    run = demo.run_episode

    def short(number, params):
        return dataclasses.replace(run(number, params), solved=number != 1)

    monkeypatch.setattr(demo, "run_episode", short)


def test_written_dataset(short_episodes, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    record = demo._write_source(TINY, tmp_path / "rlds", workers=1)
    assert (record["episodes"], record["failed"], record["steps"]) == (2, 1, 26)
    assert json.loads((tmp_path / "rlds" / demo.RECORD).read_text()) == record

    builder = tfds.builder_from_directory(str(tmp_path / "rlds" / record["dataset"]))
    source = builder.as_data_source(split="train")
    assert len(source) == 2
    for written, number in zip(source, (0, 2), strict=True):
        episode = demo.run_episode(number, TINY)
        steps = list(written["steps"])
        assert written["episode_metadata"]["seed"] == 3_000_000 + number == episode.seed
        assert written["episode_metadata"]["final_coverage"] == np.float32(episode.coverage)
        images = [np.asarray(Image.open(io.BytesIO(png))) for png in episode.images]
        np.testing.assert_array_equal([s["observation"]["image"] for s in steps], images)
        np.testing.assert_array_equal([s["observation"]["agent_pos"] for s in steps], episode.agent_pos)
        np.testing.assert_array_equal([s["action"] for s in steps], episode.action[[*range(12), 11]])
        np.testing.assert_array_equal([s["reward"] for s in steps], [*episode.reward, 0])
        assert [s["discount"] for s in steps] == [1] * 12 + [0]
        assert [s["is_first"] for s in steps] == [True] + [False] * 12
        assert [s["is_last"] for s in steps] == [s["is_terminal"] for s in steps] == [False] * 12 + [True]


def test_make_is_ready_to_train_on_and_keeps_what_is_there(short_episodes, tmp_path, capsys):
    output = tmp_path / "pusht"
    demo.make(TINY, output, workers=1)
    manifest = (output / "manifest.json").read_bytes()
    assert (output / "codec" / "pca.npz").exists() and (output / "stats.json").exists()

    capsys.readouterr()
    demo.make(TINY, output, workers=1)
    assert "exist already" in capsys.readouterr().out
    other = dataclasses.replace(TINY, seed=9)
    with pytest.raises(UserError, match="--overwrite"):
        demo.make(other, output, workers=1)
    assert (output / "manifest.json").read_bytes() == manifest
    demo.make(other, output, workers=1, overwrite=True)
    assert (output / "manifest.json").read_bytes() != manifest


def test_a_dataset_of_an_older_version_is_cut_again_from_its_source(short_episodes, tmp_path, capsys, monkeypatch):
    output = tmp_path / "pusht"
    demo.make(TINY, output, workers=1)
    current = json.loads((output / "manifest.json").read_text())
    older = json.dumps(current | {"format_version": 1})
    (output / "manifest.json").write_text(older)
    record = demo._read_record(tmp_path / "pusht_rlds")
    demo._write_record(tmp_path / "pusht_rlds", record | {"fingerprint": fingerprint(json.loads(older))})
    monkeypatch.setattr(demo, "run_episode", None)
    demo.make(TINY, output, workers=1)
    assert "another version; cutting it again from" in capsys.readouterr().out
    assert fingerprint(read_manifest(output)) == fingerprint(current)
    demo.make(TINY, output, workers=1)
    assert "exist already" in capsys.readouterr().out


def test_an_expert_that_always_fails_is_an_error(monkeypatch, tmp_path):
    episode = demo.run_episode(0, TINY)
    monkeypatch.setattr(demo, "run_episode", lambda number, params: dataclasses.replace(episode, solved=False))
    with pytest.raises(UserError, match="--candidates=6"):
        demo._write_source(TINY, tmp_path / "rlds", workers=1)
    assert list(tmp_path.iterdir()) == []


def _files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_an_interrupted_overwrite_loses_nothing_and_is_not_taken_for_done(short_episodes, tmp_path, monkeypatch):
    output, other = tmp_path / "pusht", dataclasses.replace(TINY, seed=9)
    demo.make(TINY, output, workers=1)
    before = _files(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "rlds_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.make(other, output, workers=1, overwrite=True)
    assert _files(tmp_path) == before

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.conversion.training_layout.run_jobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.make(other, output, workers=1, overwrite=True)
    assert _files(output) == {p.relative_to("pusht"): b for p, b in before.items() if p.parts[0] == "pusht"}

    # The source is the new one now, the dataset still the old one: this must not count as ready.
    with pytest.raises(UserError, match="holds another dataset .not cut from .*pusht_rlds"):
        demo.make(other, output, workers=1)
    monkeypatch.setattr(demo, "run_episode", None)  # the source is kept
    demo.make(other, output, workers=1, overwrite=True)
    assert _files(output) != before
    demo.make(other, output, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pusht", "pusht_rlds"]


@pytest.mark.parametrize("name", ["pusht", "pusht_rlds"])
def test_overwrite_deletes_nothing_of_others(monkeypatch, tmp_path, name):
    monkeypatch.setattr(demo, "run_episode", None)
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("kept")
    for overwrite, message in ((True, "does not replace it"), (False, "--overwrite")):
        with pytest.raises(UserError, match=message):
            demo.make(TINY, tmp_path / "pusht", workers=1, overwrite=overwrite)
    assert _files(tmp_path) == {(tmp_path / name / "thesis.tex").relative_to(tmp_path): b"kept"}


def test_output_in_a_place_that_is_no_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_episode", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        demo.make(TINY, tmp_path / "file" / "pusht", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_without_the_extra_the_installation_is_told_and_nothing_made(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "tensorflow" in name else find_spec(name))
    with pytest.raises(UserError, match=r"^tensorflow_datasets: not installed. Run `pip install 'uwm_jax\[demo\]'`"):
        demo.make(demo.Demo(episodes=1), tmp_path / "pusht")
    assert not list(tmp_path.iterdir())
