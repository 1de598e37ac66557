"""Closed loops with a latency, of exports, and against one of before."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from tests.pusht_run import make_demonstrations, same  # noqa: E402
from tests.systems.small import on_pusht, small_config  # noqa: E402
from uwm_jax import cli, convert, envs, rollout  # noqa: E402
from uwm_jax.backend import Arrays, Backend, Noise  # noqa: E402
from uwm_jax.config import base  # noqa: E402
from uwm_jax.data.normalize import Normalizer  # noqa: E402
from uwm_jax.data.spec import DataSpec  # noqa: E402
from uwm_jax.data.windows import WindowSpec  # noqa: E402
from uwm_jax.envs import parallel  # noqa: E402
from uwm_jax.envs.parallel import EpisodeResult  # noqa: E402
from uwm_jax.errors import UserError  # noqa: E402
from uwm_jax.evaluation import against, closed_loop  # noqa: E402
from uwm_jax.policy import SWITCHES, Policy  # noqa: E402
from uwm_jax.systems.base import Promised, Use  # noqa: E402
from uwm_jax.systems.dp.system import DP  # noqa: E402
from uwm_jax.train import train  # noqa: E402

SEEDS = [100_000, 100_003]
HALF = np.full(2, 256, np.float32)
PUSHT = envs.get("pusht")


class Walker(Backend):
    """Goes from where the agent is to a place that the noise chooses, step by step; promised rows are held and drawn
    near."""

    def __init__(self):
        self.config = base()
        window = WindowSpec.from_config(self.config.data.window)
        self.spec = DataSpec(window, {}, {"agent_pos": 2}, 2, 0, Normalizer({"action": (HALF, HALF)}))
        self.config.data.cameras = ()
        self.system, self.uses, self.acting = "walker", {"policy": Use(makes=("action",))}, "policy"
        self.can_promise, self.step, self.parameters = True, 0, "raw"

    def noise(self, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> Noise:
        draws = [np.random.default_rng((seed, int(s), int(d))) for s, d in zip(seeds, decisions, strict=True)]
        return {"action": np.stack([rng.uniform(-2, 2, 2) for rng in draws]).astype(np.float32)}

    def sample(
        self,
        use: str,
        inputs: Any,
        noise: Noise,
        promised: Promised | None = None,
        *,
        guided: bool = False,
        actions_only: bool = False,
    ) -> Arrays:
        here = inputs["obs/agent_pos"][:, -1:] / 256 - 1
        share = np.linspace(0, 1, 16, dtype=np.float32)[:, None]
        chunk = here + share * (np.asarray(noise["action"])[:, None] - here)
        if promised is not None:
            last = np.maximum(np.asarray(promised.mask).sum(axis=1) - 1, 0)
            rows = np.arange(len(last))
            gap = (promised.action - chunk)[rows, last] * np.asarray(promised.mask).any(axis=1)[:, None]
            chunk = np.where(promised.mask[..., None], promised.action, chunk + gap[:, None])
        return {"action": chunk * HALF + HALF, "action_normalized": chunk}

    def describe_sampling(self) -> dict[str, Any]:
        return {}


def act(latency: int, switch: str, steps: int = 40) -> list[EpisodeResult]:
    with closed_loop.open_envs("pusht", Walker(), SEEDS, workers=1) as opened:
        opened.spec = dataclasses.replace(PUSHT, max_steps=steps)
        return closed_loop.closed_loop(Walker(), opened, SEEDS, latency=latency, switch=switch)


@pytest.mark.slow
def test_without_a_latency_every_switch_gives_the_same_episodes_to_the_bit():
    first, *others = (act(0, switch) for switch in SWITCHES)
    for found in others:
        assert all(same(a, b) and a.seam == b.seam for a, b in zip(first, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_with_a_latency_the_loop_is_that_of_one_policy(switch, capsys):
    episodes = act(3, switch)
    env = PUSHT.make({})
    policy = Policy(Walker(), delay=3, switch=switch, limits=PUSHT.action_limits)
    policy.reset(SEEDS[1:])
    observation, info = env.reset(seed=SEEDS[1])
    for step in range(40):
        assert episodes[1].scores[step] == info["score"]
        action = policy.act({key: x[None] for key, x in observation.items()})[0]
        np.testing.assert_array_equal(episodes[1].actions[step], action)
        observation, *_, info = env.step(action)
    assert episodes[1].seam == policy.seams()[0] > 0
    assert episodes[1].actions.min() >= 0 and episodes[1].actions.max() <= 512
    assert episodes[1].first_chunk.shape == (16, 2) and np.abs(episodes[1].first_chunk).max() <= 1
    assert "beyond the limits of pusht, and were cut" in capsys.readouterr().err


@pytest.mark.slow
def test_promised_rows_make_smaller_seams():
    naive, held = (act(4, switch) for switch in ("naive", "replacement"))
    metrics = closed_loop.measure({"policy": held, "naive": naive}, PUSHT)
    assert metrics["policy/seam"]["mean"] < 0.7 * metrics["naive/seam"]["mean"]
    assert metrics["paired/policy_vs_naive/seam"]["mean"] > 0


def made(seams: list[float]) -> list[EpisodeResult]:
    chunk = np.full((16, 2), 0.25, np.float32)
    return [
        EpisodeResult(100_000 + i, np.array([0.1, 0.5, 0.4]), np.zeros((2, 2)), False, seam, chunk)
        for i, seam in enumerate(seams)
    ]


def test_a_closed_loop_of_before_is_read_and_compared_on_the_same_starts(tmp_path):
    seams = [0.5, 0.4, 0.6, 0.5, 0.45, 0.55, float("nan")]
    stored = closed_loop.describe_episodes(PUSHT, Walker(), {"policy": made(seams)}, 8, 0, 4, "naive")
    assert (stored["latency"], stored["switch"]) == (4, "naive")
    closed_loop.write_episodes(tmp_path / "naive4", {}, stored)
    other = against.read(tmp_path / "naive4", PUSHT, range(100_000, 100_007))
    assert other.name == "naive4" and [e.seed for e in other.episodes] == list(range(100_000, 100_007))
    now = made([seam - 0.1 for seam in seams])
    assert other.first_chunks(now) == 0
    now[3].first_chunk[5, 1] += 0.125
    metrics = closed_loop.measure({"policy": now, "naive4": other.episodes}, PUSHT)
    assert other.first_chunks(now) == 0.125
    smoother = metrics["paired/policy_vs_naive4/seam"]
    assert smoother["n"] == 6 and 0 < smoother["lo"] <= smoother["mean"] == pytest.approx(0.1)
    assert metrics["naive4/max_coverage"]["mean"] == 0.5 and metrics["policy/seam"]["n"] == 6
    assert "+0.100" in rollout.text_table(metrics, "coverage")

    for change, message in (
        ({"env": "other"}, "expected 7 episodes of pusht from seed 100000 on, .* found 7 of other"),
        ({"max_steps": 3}, "Give the same --env, --episodes and --first_seed"),
        ({"episodes": {}}, "not as `rollout` writes it"),
        ({"episodes": {"policy": [{"seed": 1}]}}, "not as `rollout` writes it"),
    ):
        (tmp_path / "naive4" / "episodes.json").write_text(json.dumps(stored | change))
        with pytest.raises(UserError, match=message):
            against.read(tmp_path / "naive4", PUSHT, range(100_000, 100_007))
    closed_loop.write_episodes(tmp_path / "policy", {}, stored)
    with pytest.raises(UserError, match="'policy' names other metrics"):
        against.read(tmp_path / "policy", PUSHT, range(100_000, 100_007))
    with pytest.raises(UserError, match="cannot read episodes.json"):
        against.read(tmp_path, PUSHT, [1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of a Diffusion Policy with chunks of four actions."""
    folder = tmp_path_factory.mktemp("trained")
    config = on_pusht(small_config("dp"), make_demonstrations(folder / "pusht"), 0.3)
    config.eval.every = 0
    config.diffusion.prediction.action = "sample"  # chunks that a clip does not make equal
    train(config, folder / "run")
    return folder / "run"


def call(*flags: str) -> int:
    return cli.call(rollout.main, ["rollout", "--env=pusht", "--workers=1", *map(str, flags)], rollout.define_flags)


@pytest.mark.slow
@pytest.mark.torch
def test_the_command_acts_with_a_latency_and_by_torch(trained, tmp_path, capsys, monkeypatch):
    short = dataclasses.replace(PUSHT, max_steps=24, expert=None)
    monkeypatch.setattr(rollout, "get", lambda name: short)
    monkeypatch.setattr(parallel, "get", lambda name: short)
    monkeypatch.setattr(rollout, "_film", lambda *_: False)
    common = ["--episodes=2", "--execute=2"]
    run = [f"--workdir={trained}", *common, f"--output={tmp_path}"]
    folder = tmp_path / "rollout" / "2"
    assert call(*run, "--latency=2", "--switch=naive", "--name=naive") == 0
    settings = json.loads((folder / "naive" / "episodes.json").read_text())["settings"]
    assert (settings["latency"], settings["switch"]) == (2, "naive")
    assert call(*run, "--latency=2", "--switch=replacement", "--name=held", f"--against={folder / 'naive'}") == 0
    metrics = json.loads((folder / "held" / "metrics.json").read_text())
    assert "paired/policy_vs_naive/seam" in metrics and not any("random" in name for name in metrics)
    assert metrics["naive/seam"] == json.loads((folder / "naive" / "metrics.json").read_text())["policy/seam"]
    assert call(*run) == 0
    with monkeypatch.context() as patch:
        patch.setattr(DP, "can_promise", False)
        assert call(*run, "--latency=2", "--switch=guided", f"--against={folder / 'naive'}", "--name=cannot") == 0
    cannot = json.loads((folder / "cannot" / "episodes.json").read_text())
    assert cannot["switch"] == cannot["settings"]["switch"] == "naive"
    metrics = json.loads((folder / "cannot" / "metrics.json").read_text())
    assert metrics["policy/seam"] == metrics["naive/seam"]
    assert capsys.readouterr().err.count("it switches naively") == 1

    export = tmp_path / "DIR"
    arguments = ["convert", "to-torch", f"--workdir={trained}", f"--output={export}/"]
    assert cli.call(convert.main, arguments, convert.define_flags) == 0
    capsys.readouterr()
    assert call(f"--export={export}", *common, f"--against={folder}") == 0
    (episodes,) = export.glob("rollout/2/episodes.json")
    stored = json.loads(episodes.read_text())
    assert stored["settings"]["backend"] == "torch" and stored["against"]["first_chunks"] < 1e-3
    assert "first chunks of an episode and those of 2 differ by at most" in capsys.readouterr().out
    for flags, message in (
        ([f"--export={export}", f"--workdir={trained}"], "--workdir or --export is required, one of them"),
        ([f"--export={export}", "--step=2"], "--step: an export holds one set of parameters"),
        ([f"--export={export}", "--config.diffusion.num_inference_steps=1"], "an export samples as it was written"),
        ([*run, "--latency=3", "--switch=naive"], "execute=2 and delay=3 with switch=naive: expected at most 4"),
        ([*run, "--episodes=1", f"--against={folder}"], "Give the same --env, --episodes and --first_seed"),
    ):
        assert call(*flags) == 2
        assert message in capsys.readouterr().err
