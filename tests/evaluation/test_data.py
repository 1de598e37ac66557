"""Episodes that an evaluation may call held out, and its warnings where a model may know them."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import pytest

from uwm_jax.config import apply_overrides, source
from uwm_jax.data.loader import Loader
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.evaluation import data as held_out_data
from uwm_jax.evaluation.data import doubt, open_data, refuse_other_data
from uwm_jax.synthetic import synthetic_spec, synthetic_system
from uwm_jax.systems.uwm.system import UWM


def test_other_data_than_the_runs_are_refused_unless_named(tiny_config):
    """Their held-out episodes are not those of the run."""
    system, _ = synthetic_system(tiny_config, 10)
    sources = {"robot": SimpleNamespace(identity="b" * 40), "video": SimpleNamespace(identity="c" * 40)}
    data = SimpleNamespace(spec=system.spec, sources=sources, directory="there")
    same, of_the_run = {"robot": "b" * 40, "video": "c" * 40}, {"robot": "a" * 40, "video": "c" * 40}
    assert refuse_other_data(system, data, same, []) is True
    with pytest.raises(UserError, match="val_ratio: the run decided which episodes it did not learn from"):
        refuse_other_data(system, data, same, ["data.val_ratio"])
    assert refuse_other_data(system, data, {}, ["data.val_ratio"]) is None  # a converted checkpoint: nothing is known
    with pytest.raises(UserError, match="there: .*source 'robot': fingerprint bbbbbbbbbbbb, the run's is aaaaaaaaaaaa"):
        refuse_other_data(system, data, of_the_run, [])
    assert refuse_other_data(system, data, of_the_run, ["data.path"]) is False
    ranges = {"robot": "b" * 40 + " (present frames in ranges)", "video": "c" * 40}
    with pytest.raises(
        UserError, match=r"'robot' chooses all of its data here, but .* on \(present frames in ranges\)"
    ):
        refuse_other_data(system, data, ranges, [])
    data.spec = dataclasses.replace(system.spec, action_dim=3)
    with pytest.raises(UserError, match="action_dim is 3, but the run was trained with 10"):
        refuse_other_data(system, data, of_the_run, ["data.path"])


def test_the_runs_own_dataset_is_known_wherever_it_lies(tiny_config, tiny_dataset, tmp_path):
    system, _ = synthetic_system(tiny_config, 10)
    trained = RunData(tiny_config.data, seed=0)
    system = UWM(tiny_config, trained.spec, system.codec)
    tiny_config.data.path = str(shutil.copytree(tiny_dataset, tmp_path / "moved"))
    data = RunData(tiny_config.data, seed=0)
    assert refuse_other_data(system, data, Loader(trained, batch_size=1).state(0)["datasets"], []) is True


class FakeData:
    """Of one dataset with any split; a dataset at `elsewhere` is another one."""

    def __init__(self, data, **_):
        def made(split, path):
            fingerprint = ("b" if path == "elsewhere" else "a") * 40
            dataset = SimpleNamespace(split=split, fingerprint=fingerprint, directory=path)
            return SimpleNamespace(dataset=dataset, identity=f"{fingerprint} (2000 chosen of {split})")

        sources = {name: (s.split or data.split, s.path or data.path) for name, s in data.sources.items()}
        self.sources = {name: made(*of) for name, of in (sources or {"robot": (data.split, data.path)}).items()}
        self.directory = data.path


@pytest.fixture
def opened(tiny_config, monkeypatch):
    """A function from overrides to what `open_data` opens for a run of `tiny_config`, or of `sources`."""

    def open_with(*overrides, datasets=None, leak="58 of 65 episodes", sources=None, **kept):
        config = tiny_config.copy_and_resolve_references()
        config.data.sources = sources or {}
        names = list(config.data.sources) or ["robot"]
        if datasets is None:
            splits = {name: s.split or config.data.split for name, s in config.data.sources.items()}
            datasets = {name: f"{'a' * 40} (2000 chosen of {splits.get(name, config.data.split)})" for name in names}
        monkeypatch.setattr(held_out_data, "RunData", FakeData)
        FakeData.spec = synthetic_spec(tiny_config, 10)
        now = config.copy_and_resolve_references()
        apply_overrides(now, overrides)
        system, changed = SimpleNamespace(config=now, spec=FakeData.spec), [name for name, _ in overrides]
        return open_data(system, config, datasets, {"leak": leak, **kept}, changed)

    return open_with


def test_a_split_of_its_own_is_evaluated_whole_with_the_runs_training_episodes_for_baselines(opened):
    data = opened()
    assert (data.own, data.whole, data.settings) == (True, (), {}) and data.references is data.evaluated
    assert doubt(data.about()) == "58 of 65 episodes"
    data = opened(("data.split", "val"))
    assert (data.own, data.whole) == (True, ("robot",)) and data.about()["splits"] == {"robot": "val"}
    assert [d.sources["robot"].dataset.split for d in (data.evaluated, data.references)] == ["val", "train"]
    assert doubt(data.about()) == "", "nothing was trained on it, whatever reached the run's own episodes"
    entries = [{"fingerprint": "a" * 40, "split": split, "val_ratio": 0.1} for split in ("train", "val")]
    assert doubt(opened(("data.split", "val"), learned_from=entries[:1]).about()) == ""
    from_the_origin = "The run that this one started from was trained on the split 'val' of 'robot'."
    assert doubt(opened(("data.split", "val"), learned_from=entries).about()) == from_the_origin
    unknown = opened(("data.split", "val"), leak="The origin does not say.", learned_from=None)
    assert doubt(unknown.about()) == "The origin does not say."
    data = opened(("data.path", "elsewhere"), ("data.split", "val"))
    assert (
        data.whole == ("robot",)
        and data.references is data.evaluated
        and data.settings == {"datasets": ["b" * 40 + " (2000 chosen of val)"]}
    )
    assert doubt(data.about()).startswith("These are not the datasets that this run was trained on. Episodes that are")
    data = opened(("data.path", "elsewhere"), datasets={})
    assert (data.own, data.whole, data.settings) == (None, (), {"datasets": ["b" * 40 + " (2000 chosen of train)"]})
    assert doubt(data.about()).startswith("It is not known what this run was trained on. Episodes that are held out")


def test_in_a_mixture_the_sources_with_another_split_are_evaluated_whole(opened):
    sources = {"one": source(), "two": source(split="test")}
    data = opened(("data.split", "val"), sources=sources)
    assert data.whole == ("one",) and doubt(data.about()) == "58 of 65 episodes"
    data = opened(("data.sources.one.split", "val"), ("data.sources.two.split", "val"), sources=sources)
    assert data.whole == ("one", "two") and doubt(data.about()) == ""
    with pytest.raises(UserError, match="was trained on the split 'test', by another of its sources than 'one'"):
        opened(("data.sources.one.split", "test"), sources=sources)


def test_why_held_out_episodes_may_be_known():
    assert doubt({}) == doubt({"own_data": True, "leak": None}) == ""
    assert doubt({"own_data": True, "leak": "58 of 65"}) == "58 of 65"
    for own, words_ in ((False, "not the datasets that this run was trained on."), (None, "It is not known what this")):
        assert words_ in doubt({"own_data": own, "leak": None}) and "held out here may be" in doubt({"own_data": own})
