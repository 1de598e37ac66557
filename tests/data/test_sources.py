"""Mixtures as the loader reads them: filters, action-free rows, one normaliser, continuing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from uwm_jax import config as config_lib
from uwm_jax.config import base, source
from uwm_jax.data.loader import Loader
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.data.samples import Clip
from uwm_jax.data.stats import column_stats, pool_stats
from uwm_jax.data.windows import split_episodes
from uwm_jax.errors import UserError

LENGTHS = [21, 30, 25, 32, 12, 33, 18, 27]
FOLDERS = [f"/r2d2/{'WEIRD' if i % 2 else 'AUTOLab'}/success/ép-{i}" for i in range(8)]


def _make(root: Path, lengths: list[int], folders: list[str] | None = None, seed: int = 0) -> Path:
    rlds_source.make(root / "source", lengths, seed=seed, folders=folders)
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, chunk_steps=8, val_ratio=0.3, workers=1)
    return root / "out"


@pytest.fixture(scope="module")
def droid(tmp_path_factory) -> Path:
    """Every other episode has WEIRD in its path."""
    return _make(tmp_path_factory.mktemp("droid"), LENGTHS, FOLDERS)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return _make(tmp_path_factory.mktemp("other"), [40, 35, 20], seed=1)


@pytest.fixture
def config(droid: Path) -> ConfigDict:
    """The co-training config on the small dataset: half robot, half robot data as video."""
    c = config_lib.load(str(Path(__file__).parents[2] / "configs" / "droid_cotrain.py")).data
    c.path = str(droid)
    c.cameras, c.low_dim, c.text = ("wrist", "exterior"), ("state",), "embedding"
    c.window.action, c.window.next_obs = (1, 2, 3, 4), (5, 6)
    c.val_ratio, c.num_streams, c.num_threads = 0.3, 8, 2
    return c


def _loader(
    config: ConfigDict, batch_size: int = 8, seed: int = 5, normalizer: Normalizer | None = None, **kwargs: Any
) -> Loader:
    return Loader(RunData(config, seed=seed, normalizer=normalizer), batch_size=batch_size, **kwargs)


def _take(loader: Loader, count: int) -> list[dict[str, np.ndarray]]:
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def _assert_equal(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def test_cotraining_shows_the_others_without_their_actions(config: ConfigDict) -> None:
    loader = _loader(config)
    train = split_episodes(8, 0.3)[0]
    weird = {e for e in train if "WEIRD" in FOLDERS[e]}
    assert set(loader.data.sources["robot"].episodes) == weird
    assert set(loader.data.sources["video"].episodes) == set(train) - weird
    plain = config.copy_and_resolve_references()
    plain.sources = ConfigDict()
    whole = _loader(plain, batch_size=1, normalizer=loader.data.spec.normalizer)
    seen = {True: 0, False: 0}
    for step, batch in enumerate(_take(loader, 6)):
        for row in range(8):
            trace = loader.describe(step * 8 + row)
            robot = trace.source == "robot"
            seen[robot] += 1
            assert batch["action_mask"][row] == robot == ("WEIRD" in FOLDERS[trace.episode])
            assert robot or not (batch["action"][row].any() or batch["obs/state"][row].any())
            expected = whole.data.spec.empty(1)
            samples = whole.data.sources[loader.data.directory.name].samples
            samples.load(
                expected,
                0,
                0,
                [Clip(trace.episode, trace.origin)],
                0,
                dataclasses.replace(whole.data.spec, normalizer=loader.data.spec.normalizer),
            )
            same = [k for k in expected if k.startswith(("obs/", "next_obs/")) and k != "obs/state"]
            assert len(same) == 5
            for key in same + (["action", "obs/state"] if robot else []):
                np.testing.assert_array_equal(batch[key][row], expected[key][0])
    assert abs(seen[True] - seen[False]) <= 8


def test_the_summary_tells_what_the_filters_keep(config: ConfigDict) -> None:
    text = _loader(config).data.summary()
    assert "robot (50.0% of the samples)" in text and "8 episodes (4 of them with " in text
    assert "(4 of them with 'success' in file_path; no 'WEIRD' in recording_folderpath)" in text
    assert "used without actions" in text


def test_held_out_windows_are_of_robots_and_filtered(config: ConfigDict) -> None:
    held_out = _loader(config).data.held_out(1000)
    expected = {e for e in split_episodes(8, 0.3)[1] if "WEIRD" in FOLDERS[e]}
    assert expected and set(held_out.episodes) == expected
    assert all(batch["action_mask"].all() for batch in held_out.batches(16))


def test_sources_without_held_out_windows_matter_only_if_none_has_any(config: ConfigDict) -> None:
    assert split_episodes(8, 0.3)[1].tolist() == [5, 7]  # of 33 and 27 steps
    config.window.next_obs = (28, 29)
    config.sources = ConfigDict(
        {
            "filtered": source(include=("ép-1", "ép-3")),
            "short": source(include=("ép-3", "ép-7")),
            "whole": source(),
        }
    )
    assert set(_loader(config).data.held_out(1000).episodes) == {5}
    del config.sources["whole"]
    with pytest.raises(UserError) as caught:
        _loader(config).data.held_out(4)
    message = str(caught.value)
    assert "no held-out window to evaluate on (config.data.val_ratio=0.3)" in message
    assert "'filtered'" in message and "2 of 8 episodes are held out, 0 of them used ('ép-1' or 'ép-3' in " in message
    assert "1 of them used ('ép-3' or 'ép-7' in " in message
    assert "; the longest has 27 steps, and config.data.window spans 30\n" in message


def test_held_out_windows_of_two_robots_have_episodes_of_their_own(config: ConfigDict, other: Path) -> None:
    config.sources = ConfigDict({"a": source(path=str(other)), "b": source()})
    loader = _loader(config)
    every = loader.data.held_out(1000)
    a, b = split_episodes(3, 0.3)[1], split_episodes(8, 0.3)[1]
    assert set(every.episodes) == set(a) | {3 + e for e in b}
    batch = every.batch(0, len(every))
    for i, (episode, origin) in enumerate(zip(every.episodes, every.origins, strict=True)):
        dataset, number = (Dataset(other), episode) if episode < 3 else (Dataset(config.path), episode - 3)
        frame = np.empty((1, 16, 16, 3), np.uint8)
        dataset.frames(int(number), {"observation/wrist": [int(origin)]}, {"observation/wrist": frame})
        np.testing.assert_array_equal(batch["obs/wrist"][i, 0], frame[0])


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        (("AUTOLab", "ép-1/"), (), {0, 1, 2, 4, 6}),
        (("WEIRD",), ("ép-3", "ép-7"), {1, 5}),
        ((), ("AUTOLab",), {1, 3, 5, 7}),
    ],
)
def test_filters(config: ConfigDict, include, exclude, kept) -> None:
    config.sources = ConfigDict({"robot": source(include=include, exclude=exclude)})
    robot = _loader(config).data.sources["robot"]
    assert set(robot.episodes) | set(robot.held_out) == kept


def test_conditions_on_several_keys_and_a_largest_number(config: ConfigDict) -> None:
    """As the paper's recipe has them; the short name of a key will do."""
    lab = ("recording_folderpath", "WEIRD")
    config.sources = ConfigDict({"robot": source(include=("success", lab), max_episodes=3, max_episodes_seed=1)})
    robot = _loader(config).data.sources["robot"]
    used = set(robot.episodes) | set(robot.held_out)
    assert len(used) == 3 and used <= {1, 3, 5, 7}
    assert set(robot.held_out) == used & set(split_episodes(8, 0.3)[1])
    text = (
        "8 episodes (4 of them with 'success' in episode_metadata/file_path; 'WEIRD' in recording_folderpath; 3 chosen"
    )
    assert f"{text} by seed 1), 198 steps" in _loader(config).data.summary()
    rows = np.concatenate(
        [
            robot.dataset.column("observation/state")[robot.dataset.episode_starts[e] :][: LENGTHS[e]]
            for e in robot.episodes
        ]
    )
    np.testing.assert_allclose(robot.stats()["state"]["max"], rows.max(axis=0), rtol=1e-6)
    state = json.loads(json.dumps(_loader(config).state(2)))
    _loader(config, start_step=2, state=state)
    config.sources.robot.max_episodes_seed = 0
    with pytest.raises(UserError, match="datasets/robot = .*3 chosen by seed 1.*this run has .*3 chosen by seed 0"):
        _loader(config, start_step=2, state=state)


def test_filters_that_fit_nothing_are_explained(config: ConfigDict) -> None:
    def refused(message: str, **fields: Any) -> None:
        config.sources = ConfigDict({"robot": source(**fields)})
        with pytest.raises(UserError, match=message):
            _loader(config)

    refused(
        r"source 'robot' .*: none of 8 episodes has 'KIT' in episode_metadata/file_path. The first .* has '/r2d2/",
        include=("KIT",),
    )
    refused(r"no episode text 'x'; it has: episode_metadata/file_path", include=("WEIRD",), path_key="x")
    held_out = split_episodes(8, 0.3)[1][0]
    refused(
        r"there are no training episodes of source 'robot' .*: all that would do are held out",
        include=(f"ép-{held_out}/",),
    )


def test_one_normaliser_over_the_training_episodes_of_all_robots(config: ConfigDict, other: Path) -> None:
    config.sources = ConfigDict(
        {
            "a": source(include=("WEIRD",), weight=3),
            "b": source(path=str(other), weight=0),  # not drawn yet, but it may be later
            "video": source(use_actions=False),
        }
    )
    loader = _loader(config)
    values = {"action_dict/cartesian_velocity": [], "observation/state": []}
    for path, keep in ((config.path, lambda e: "WEIRD" in FOLDERS[e]), (other, lambda e: True)):
        dataset = Dataset(path)
        for key, rows in values.items():
            for e in split_episodes(dataset.num_episodes, 0.3)[0]:
                if keep(e):
                    start = dataset.episode_starts[e]
                    rows.append(np.array(dataset.column(key)[start : start + dataset.episode_lengths[e]]))
    for name, key, columns in (
        ("action", "action_dict/cartesian_velocity", slice(0, 3)),
        ("state", "observation/state", slice(0, 3)),
    ):
        rows = np.concatenate(values[key])[:, columns]
        scale, offset = loader.data.spec.normalizer.entries[name]
        low, high = rows.min(axis=0), rows.max(axis=0)
        np.testing.assert_allclose(scale[columns], (high - low) / 2, rtol=1e-6)
        np.testing.assert_allclose(offset[columns], (high + low) / 2, atol=1e-6)
    assert {trace.source for trace in map(loader.describe, range(100))} == {"a", "video"}


def test_ranges_are_known_whether_or_not_the_data_is_normalised(config: ConfigDict) -> None:
    config.sources.video.weight = 3
    fitted = _loader(config)
    config.normalize = "none"
    raw = _loader(config)
    assert raw.data.spec.normalizer.to_json() == {}
    for loader in (fitted, raw):
        (ranges,) = loader.data.ranges().values()
        assert ranges.keys() == fitted.data.spec.normalizer.entries.keys()
        for key, (low, high) in ranges.items():
            scale, offset = fitted.data.spec.normalizer.entries[key]
            varies = scale != 1
            np.testing.assert_allclose((high - low)[varies] / 2, scale[varies], rtol=1e-6)
            np.testing.assert_allclose((high + low) / 2, offset, rtol=1e-6, atol=1e-6)


def test_pooled_statistics_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(loc, 1 + loc, (n, 3)).astype(np.float32) for loc, n in ((0, 500), (2, 40), (-1, 7))]
    stats = [column_stats(part) for part in parts]
    pooled, expected = pool_stats(stats), column_stats(np.concatenate(parts))
    for name in ("count", "nonfinite", "min", "max"):
        assert pooled[name] == expected[name]
    for name in ("mean", "std"):
        np.testing.assert_allclose(pooled[name], expected[name], rtol=1e-9)
    assert pooled["q01"] == np.min([s["q01"] for s in stats], axis=0).tolist()
    assert pooled["q99"] == np.max([s["q99"] for s in stats], axis=0).tolist()
    assert pool_stats(stats[:1]) == stats[0]


def test_robots_of_different_widths_are_refused(config: ConfigDict, other: Path) -> None:
    config.sources = ConfigDict({"a": source(), "b": source(path=str(other), action=(("action", "identity"),))})
    with pytest.raises(UserError, match=r"action has 7 numbers in source 'b' \(.*other.*\), but 10 in source 'a' \("):
        _loader(config)
    config.sources.b.action = ()
    config.sources.b.cameras = ("exterior", "wrist")
    loader = _loader(config)
    assert loader.data.camera_keys == {"wrist": "observation/wrist", "exterior": "observation/exterior"}
    assert loader.data.sources["b"].samples.camera_keys == {
        "wrist": "observation/exterior",
        "exterior": "observation/wrist",
    }
    assert loader.data.spec.cameras == {"exterior": (24, 32), "wrist": (16, 16)}
    assert _take(loader, 2)[0]["obs/wrist"].shape == (8, 2, 16, 16, 3)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_and_threads_change_nothing(config: ConfigDict, processes: int) -> None:
    whole = _take(_loader(config), 4)
    config.num_threads = 0 if processes == 2 else 3
    parts = [_take(_loader(config, process_index=p, process_count=processes), 4) for p in range(processes)]
    for step, expected in enumerate(whole):
        joined = {k: np.concatenate([part[step][k] for part in parts]) for k in expected}
        order = np.argsort(joined["row"])
        _assert_equal([{k: v[order] for k, v in joined.items()}], [expected])


def test_continuing_with_other_weights(config: ConfigDict) -> None:
    """Samples drawn stay drawn, and the continuation is the same for any threads, processes and further stops."""
    first = _loader(config)
    state = json.loads(json.dumps(first.state(3)))
    assert state["weights"] == [[0, {"robot": 0.5, "video": 0.5}]]
    assert "'WEIRD'" in state["datasets"]["robot"]
    tail = _take(_loader(config, start_step=3, state=state), 4)
    _assert_equal(tail, _take(first, 7)[3:])

    config.sources.video.weight = 1.5
    changed = _loader(config, start_step=3, state=state)
    batches = _take(changed, 4)
    later = json.loads(json.dumps(changed.state(5)))
    assert later["weights"] == [[0, {"robot": 0.5, "video": 0.5}], [24, {"robot": 0.5, "video": 1.5}]]
    config.num_threads = 0
    for process in range(2):
        again = _loader(config, start_step=5, state=later, process_index=process, process_count=2)
        mine = [{k: v[process::2] for k, v in batch.items()} for batch in batches[2:]]
        _assert_equal(_take(again, 2), mine)
    assert [changed.describe(n) for n in range(24)] == [first.describe(n) for n in range(24)]
    drawn = [changed.order.locate(n) for n in range(24 + 400)]
    assert len(set(drawn)) == len(drawn)
    assert abs(sum(d.source == "video" for d in drawn[24:]) - 300) <= 8


def test_other_sources_are_refused_by_name(config: ConfigDict, other: Path) -> None:
    state = json.loads(json.dumps(_loader(config).state(2)))

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            _loader(config, start_step=2, state=state)

    config.sources.web = source(use_actions=False)
    refused("started with robot, video; it has no source 'web'")
    del config.sources["web"]
    config.sources.robot.exclude = ("ép-3",)
    refused("datasets/robot = .*'WEIRD'.*this run has .*'success' but no 'ép-3' in file_path; 'WEIRD' in ")
    config.sources.robot.exclude = ()
    config.sources.video.path = str(other)
    config.sources.video.include = config.sources.video.exclude = ()
    refused("datasets/video")
    del config.sources["video"]
    refused("it has the source 'video'")


def test_sources_that_moved_keep_their_names_and_their_order(config: ConfigDict, other: Path, tmp_path: Path) -> None:
    """Two sources of one dataset, of equal fingerprints, are told apart by their names in the config."""
    config.sources = ConfigDict({"a": source(), "b": source(use_actions=False), "c": source(path=str(other), weight=2)})
    first = _loader(config)
    state = json.loads(json.dumps(first.state(2)))
    config.path = str(shutil.copytree(config.path, tmp_path / "moved"))
    config.sources.b.path = str(shutil.copytree(config.path, tmp_path / "copied"))
    moved = _loader(config, start_step=2, state=state)
    _assert_equal(_take(moved, 2), _take(first, 4)[2:])
    assert moved.state(2) == state
    config.sources.c.path, config.sources.b.path = str(tmp_path / "copied"), str(other)
    with pytest.raises(UserError, match="datasets/b"):
        _loader(config, start_step=2, state=state)


def test_a_source_whose_dataset_is_absent_is_named_with_its_field(config: ConfigDict) -> None:
    path = config.path
    config.sources = ConfigDict({"robot": source(), "video": source(path="nowhere")})
    with pytest.raises(UserError, match=r"config.data.sources.video.path=nowhere: source 'video': .*no training data"):
        _loader(config)
    config.path, config.sources.video.path = "nowhere", path
    with pytest.raises(UserError, match=r"config.data.path=nowhere: source 'robot': .*no training dataset"):
        _loader(config)
    config.sources.robot.path = "s3://bucket/robot"
    with pytest.raises(UserError, match=r"config.data.sources.robot.path=s3://bucket/robot: s3:// is not supported"):
        _loader(config)


def test_bad_weights_are_explained(config: ConfigDict) -> None:
    config.sources.video.weight = -1
    with pytest.raises(UserError, match=r"config.data.sources: the weight of video is -1"):
        _loader(config)


def test_sources_of_one_dataset_are_out_of_step(config: ConfigDict) -> None:
    config.sources = ConfigDict({"robot": source(), "video": source(use_actions=False)})
    loader = _loader(config)
    robot, video = (loader.data.sources[name] for name in ("robot", "video"))
    assert [robot.clip(n) for n in range(50)] != [video.clip(n) for n in range(50)]
    config.sources = ConfigDict({"robot": source()})
    alone = _loader(config)
    config.sources = ConfigDict()
    plain = _loader(config)
    assert [alone.describe(n)[1:] for n in range(50)] == [plain.describe(n)[1:] for n in range(50)]
    assert plain.state(0)["weights"] == [[0, {"out": 1.0}]]


@pytest.mark.parametrize(
    ("argument", "robot", "video", "most"),
    [
        ("", {1, 5}, {0, 2, 4}, 0),
        (":official", {1, 3, 5, 7}, {0, 2, 4, 6}, 2000),
    ],
)
def test_the_shipped_configs_choose_among_droids_episodes(tmp_path: Path, argument, robot, video, most) -> None:
    """Episodes 3, 6 and 7 failed, which the folder of their recording does not tell."""
    tree, episodes = rlds_source.features(), rlds_source.make_episodes([9] * 8)
    for i, episode in enumerate(episodes):
        outcome, lab = "failure" if i in (3, 6, 7) else "success", "WEIRD" if i % 2 else "AUTOLab"
        episode["episode_metadata"] |= {"file_path": f"/{lab}/{outcome}/{i}.h5", "recording_folderpath": f"/{lab}/{i}"}
    rlds_source.write(tmp_path / "source", {"train": [[rlds_source.serialize(tree, e) for e in episodes]]}, tree)
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    for name, expected in (
        ("droid", {"droid": robot if argument else robot | video}),
        ("droid_cotrain", {"robot": robot, "video": video}),
    ):
        c = config_lib.load(str(Path(__file__).parents[2] / "configs" / f"{name}.py{argument}"))
        assert c.data.path == base().data.path and c.loss.action_free == "kept"
        assert (c.data.last_action, c.data.augment.draw) == (("keep", "batch") if argument else ("drop", "sample"))
        assert {s.max_episodes for s in c.data.sources.values()} == {most}
        c.data.path, c.data.cameras = str(tmp_path / "out"), ("wrist",)
        c.data.window.action, c.data.window.next_obs, c.data.num_streams = (1, 2), (3, 4), 1
        loader = _loader(c.data)
        used = {name: set(s.episodes) | set(s.held_out) for name, s in loader.data.sources.items()}
        assert used == expected
        for name, episodes_of in expected.items():
            assert f"8 episodes ({len(episodes_of)} of them with " in loader.data.sources[name].describe()
    if most:
        c.data.sources.robot.max_episodes = c.data.sources.video.max_episodes = 2
        used = {name: set(s.episodes) | set(s.held_out) for name, s in _loader(c.data).data.sources.items()}
        assert used["robot"] < robot and used["video"] < video and {len(u) for u in used.values()} == {2}
