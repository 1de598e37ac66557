"""Idle steps: the rule on hand-made episodes and against a plain loop, the command, and training on what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import ranges
from data_prep.caches import idle
from data_prep.caches.idle import IdleRule, make_ranges, summary
from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from tests.data_prep.killing import Commands, kill_and_resume, random_moments, tree
from uwm_jax import cli
from uwm_jax.config import base
from uwm_jax.data.limits import StepRanges
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError

LENGTHS = [21, 5, 60, 1, 32, 40]
KEY = "action_dict/gripper_position"
RULE = IdleRule(KEY, 0.5, min_idle=3, min_kept=4, drop_last=2)


def listed(found: StepRanges) -> list[list[list[int]]]:
    bounds = np.stack([found.starts, found.stops], axis=1).tolist()
    return [bounds[a:b] for a, b in zip([0, *found.ends[:-1]], found.ends, strict=True)]


def velocities(moves: str) -> np.ndarray:
    """(len, 7) joint velocities: at `x` one joint changes, at `.` none does by as much as 1e-3."""
    rng = np.random.default_rng(0)
    values = np.zeros((len(moves), 7), np.float32)
    for t, move in enumerate(moves):
        values[t] = 0.0005 * (t % 2)
        if move == "x":
            values[t, rng.integers(7)] += 0.1 * (1 + t % 3) * (-1) ** t
    return values


@pytest.mark.parametrize(
    ("moves", "kept"),
    [
        ("x" * 40, [[0, 30]]),
        # The step after a change changes back, so it moves too: the idle run below has 7 steps, then 6.
        ("x" * 20 + "." * 8 + "x" * 12, [[0, 11]]),
        ("x" * 20 + "." * 7 + "x" * 12, [[0, 29]]),
        ("x" * 20 + "." * 8 + "x" * 16, [[0, 11], [28, 34]]),
        ("x" * 14 + "." * 8 + "x" * 15, []),
        ("." * 30, []),
        ("." * 12 + "x" * 30, [[12, 32]]),
    ],
)
def test_openpis_rule_on_hand_made_episodes(moves: str, kept: list[list[int]]) -> None:
    rule, lengths = IdleRule(), np.array([len(moves)])
    assert (rule.key, rule.threshold, rule.min_idle) == ("action_dict/joint_velocity", 1e-3, 7)
    assert listed(rule.ranges(rule.idle(velocities(moves), lengths), lengths)) == [kept]


def test_the_threshold_itself_is_no_idle_step() -> None:
    column = np.array([[0.0, 1.0], [0.25, 1.0], [0.25, 1.0], [0.25, 1.125], [np.nan, 1.125], [0.5, 1.125]], np.float32)
    assert IdleRule(threshold=0.25).idle(column, np.array([6])).tolist() == [False, False, True, True, False, False]
    assert IdleRule(threshold=0.25).idle(column, np.array([3, 3])).tolist()[3] is False  # an episode's first step


def plain(column: np.ndarray, rule: IdleRule) -> list[list[int]]:
    """The rule for one episode, a step at a time."""
    is_idle = [t > 0 and all(abs(column[t] - column[t - 1]) < rule.threshold) for t in range(len(column))]
    kept = [True] * len(column)
    for a in range(len(column)):
        for b in range(a + rule.min_idle, len(column) + 1):
            if all(is_idle[a:b]):
                kept[a:b] = [False] * (b - a)
    found = []
    start = None
    for t in range(len(column) + 1):
        if t < len(column) and kept[t]:
            start = t if start is None else start
        elif start is not None:
            if t - start >= rule.min_kept and t - rule.drop_last > start:
                found.append([start, t - rule.drop_last])
            start = None
    return found


def test_ranges_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_BLOCK", 11)
    rng = np.random.default_rng(0)
    for rule in (RULE, IdleRule("", 0.4, 2, 1, 0), IdleRule("", 0.3, 3, 9, 4), IdleRule("", 0.4, 2, 3, 2)):
        lengths = rng.integers(0, 50, 30)
        column = rng.uniform(size=(lengths.sum(), 2)).cumsum(axis=0) % 1.0
        done: list[int] = []
        found = rule.ranges(rule.idle(column, lengths, done.append), lengths)
        parts = np.split(column, np.cumsum(lengths)[:-1])
        assert listed(found) == [plain(part, rule) for part in parts]
        assert sum(done) == len(column) and len(found.starts) > 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranges")
    rlds_source.make(root / "source", LENGTHS)
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, chunk_steps=8, workers=1)
    return root / "out"


def call(dataset: Path, *flags: str) -> int:
    return cli.call(ranges.main, ["data_prep.ranges", f"--dataset={dataset}", *flags], ranges.define_flags)


def test_the_command_writes_what_training_uses(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = (dataset / "manifest.json").read_bytes()
    flags = [f"--key={KEY}", "--threshold=0.5", "--min_idle=3", "--min_kept=4", "--drop_last=2"]
    assert call(dataset, *flags) == 0
    said = capsys.readouterr().out
    c = base().data
    c.path, c.cameras, c.low_dim, c.ranges, c.val_ratio = str(dataset), ("wrist",), ("state",), "idle", 0.3
    c.window.action, c.window.next_obs, c.num_streams = (1, 2), (3,), 4
    data = RunData(c, seed=0)
    (source,) = data.sources.values()
    column = source.dataset.column(KEY)
    kept = [plain(part, RULE) for part in np.split(column, np.cumsum(LENGTHS)[:-1])]
    for windows in (source.windows, source.held_out_windows()):
        assert windows is not None
        places = [windows.locate(w) for w in range(len(windows))]
        assert 3 < len(places) < windows.total
        assert all(any(a <= origin + 1 < b for a, b in kept[episode]) for episode, origin in places)
    steps = sum(b - a for of in kept for a, b in of)
    empty = sum(not of for of in kept)
    assert f"{steps / 159:.1%} stay, in {sum(map(len, kept))} ranges; {empty} of 6 episodes have none" in said
    assert "left out by the ranges 'idle'" in data.summary()
    assert f"present frames in ranges of {steps} steps" in source.identity
    # The dataset itself is the same; a second call finds the work done, other settings are refused by field.
    assert (dataset / "manifest.json").read_bytes() == manifest
    assert call(dataset, *flags) == 0 and "already complete" in capsys.readouterr().out
    assert call(dataset, f"--key={KEY}", "--threshold=0.25") == 2
    error = capsys.readouterr().err
    assert "fields.threshold: expected 0.25, found 0.5" in error and "--overwrite" in error
    # An interrupted job leaves nothing that training takes, and the same command ends as if it had not been.
    before = {file.name: file.read_bytes() for file in (dataset / "ranges" / "idle").iterdir()}
    (dataset / "ranges" / "idle" / "sidecar.json").unlink()
    (dataset / "ranges" / "idle" / "train.npz").write_bytes(b"half")
    content = json.loads(before["sidecar.json"])
    begun = {key: content[key] for key in ("format", "format_version", "kind", "fingerprint", "fields")}
    (dataset / "ranges" / "idle" / "unfinished.json").write_text(json.dumps({**begun, "command": "the command"}))
    with pytest.raises(UserError, match=r"config\.data\.ranges='idle': .* is unfinished: .*`the command`"):
        RunData(c, seed=0)
    assert call(dataset, *flags) == 0
    assert {file.name: file.read_bytes() for file in (dataset / "ranges" / "idle").iterdir()} == before


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(dataset: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(dataset, tmp_path / "own", ignore=shutil.ignore_patterns("ranges")))
    folder, command = (
        own / "ranges" / "idle",
        ["data_prep.ranges", f"--dataset={own}", f"--key={KEY}", "--threshold=0.5"],
    )
    commands = Commands("data_prep.ranges")
    try:
        status, said = commands.run(command)
        assert status == 0, said
        expected = tree(folder)
        shutil.rmtree(folder)
        moments = [folder.exists, (folder / "unfinished.json").exists, *random_moments(0, 4, 0.2)]
        kill_and_resume(commands, command, moments, (folder / "sidecar.json").exists)
    finally:
        commands.close()
    assert tree(folder) == expected and set(expected) == {"sidecar.json", "train.npz"}


def test_what_cannot_be_is_refused_by_name(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--name=none"], "--name=none: config.data.ranges gives this value another meaning"),
        (["--threshold=0"], "--threshold=0.0: expected a number above 0"),
        ([], "--key=action_dict/joint_velocity: "),
        (["--min_idle=0"], "min_idle"),
    ):
        assert call(dataset, *flags) == 2
        assert message in capsys.readouterr().err
    assert not (dataset / "ranges" / "none").exists()


def test_damaged_ranges_and_those_of_another_dataset_are_refused(dataset: Path) -> None:
    made, was_complete = make_ranges(dataset, "other", RULE, "command")
    assert not was_complete and summary(made).startswith("train: ")
    c = base().data
    c.path, c.cameras, c.ranges = str(dataset), ("wrist",), "other"
    file = dataset / "ranges" / "other" / "train.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"other/train\.npz: its checksum is not that of sidecar\.json"):
        RunData(c, seed=0)
    file.write_bytes(whole)
    sidecar = dataset / "ranges" / "other" / "sidecar.json"
    sidecar.write_text(sidecar.read_text().replace(json.loads(sidecar.read_text())["fingerprint"], "0" * 64))
    with pytest.raises(UserError, match=r"config\.data\.ranges='other': .* was made from another dataset"):
        RunData(c, seed=0)
