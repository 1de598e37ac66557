"""Closed loop: the path of observations, what is measured, the film, and the command on a tiny run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("gym_pusht")

from tests.pusht_run import SIZE, make_config, make_demonstrations, same  # noqa: E402
from uwm_jax import cli, compare_samplers, envs, rollout  # noqa: E402
from uwm_jax.backend import JaxBackend  # noqa: E402
from uwm_jax.config import base, source  # noqa: E402
from uwm_jax.data.normalize import Normalizer  # noqa: E402
from uwm_jax.data.robot import RobotActions  # noqa: E402
from uwm_jax.data.run_data import RunData  # noqa: E402
from uwm_jax.data.spec import DataSpec  # noqa: E402
from uwm_jax.data.windows import WindowSpec  # noqa: E402
from uwm_jax.envs.parallel import EpisodeResult, ParallelEnvs, replay  # noqa: E402
from uwm_jax.errors import UserError  # noqa: E402
from uwm_jax.evaluation import closed_loop  # noqa: E402
from uwm_jax.policy import Policy  # noqa: E402
from uwm_jax.reporting import film  # noqa: E402
from uwm_jax.reporting.sheets import read_labels  # noqa: E402
from uwm_jax.systems.base import Use  # noqa: E402
from uwm_jax.train import train  # noqa: E402
from uwm_jax.training.inference import load_for_inference  # noqa: E402

SEEDS = [100_000, 100_003]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(make_config(make_demonstrations(tmp_path_factory.mktemp("demonstrations") / "pusht")), workdir)
    return workdir


class Stub:
    """The policy goes from the agent's place towards the middle and adds noise; what the forward mode imagines is one
    colour, the last action's x."""

    def __init__(self, size: int = SIZE):
        self.config = base()
        self.config.data.resize = self.config.data.crop = (size, size)
        half = (np.full(2, 256, np.float32), np.full(2, 256, np.float32))
        window = WindowSpec.from_config(self.config.data.window)
        self.spec = DataSpec(window, {"image": (size, size)}, {"agent_pos": 2}, 2, 0, Normalizer({"action": half}))
        self.cameras = ("image",)

    acting, can_promise = "policy", False
    uses = {"policy": Use(makes=("action",)), "forward": Use(makes=("next_obs",), given=("action",))}

    def noise(self, key, rows, use):
        return {"action": jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (16, 2)))(rows)}

    def images(self, batch):
        following = batch["next_obs/image"][:, None] / 255 if "next_obs/image" in batch else None
        return batch["obs/image"][:, None] / 255, following

    def encode(self, frozen, batch):
        return batch

    def sample(self, params, batch, use, noise):
        if use == "forward":
            return {"next_obs_latent": batch["action"][:, -1, 0]}
        here = batch["obs/agent_pos"][:, -1:] / 256 - 1
        brightness = batch["obs/image"].mean(axis=(1, 2, 3, 4))[:, None, None] / 255
        return {"action": here * jnp.linspace(1, 0, 16)[:, None] + 0.1 * brightness * noise["action"]}

    def frames(self, frozen, made):
        latents = made["next_obs_latent"]
        return jnp.broadcast_to(latents[:, None, None, None, None, None], (len(latents), 1, 2, SIZE, SIZE, 3))


def backend(system: Stub) -> JaxBackend:
    return JaxBackend(system, {}, {})


class TwoViews(Stub):
    """Acts as the stub, and is trained on two views of the environment's one camera."""

    def __init__(self):
        super().__init__()
        self.config.data.cameras = ("wrist", "front")
        self.config.data.sources.robot = source(cameras=("observation/image", "image"))
        self.config.data.sources.another = source(use_actions=False, cameras=("web",))
        self.spec = dataclasses.replace(self.spec, cameras={"front": (SIZE, SIZE), "wrist": (SIZE, SIZE)})
        self.cameras = ("front", "wrist")

    def sample(self, params, batch, use, noise):
        return super().sample(params, batch | {"obs/image": batch["obs/front"]}, use, noise)


def test_one_camera_in_several_views_can_be_rolled_out():
    spec, system = envs.get("pusht"), TwoViews()
    closed_loop.check_fits(spec, system)
    assert closed_loop.views_of(spec, system) == {"front": "image", "wrist": "image"}
    assert closed_loop.env_cameras(spec, system) == {"image": (SIZE, SIZE)}
    image = np.arange(3)
    seen = closed_loop.under_views({"image": image, "agent_pos": image + 1}, closed_loop.views_of(spec, system))
    assert seen["front"] is seen["wrist"] is image and "agent_pos" in seen
    assert closed_loop.with_views(spec, system).action_plane == ("front", *spec.action_plane[1:])
    assert closed_loop.with_views(spec, Stub()) == spec
    # Without the source's word for it, another name is another camera.
    del system.config.data.sources["robot"]
    with pytest.raises(UserError, match="camera 'front': pusht has image(.|\n)*camera 'wrist': pusht has image"):
        closed_loop.check_fits(spec, system)


def test_a_choice_shows_the_first_of_its_cameras_that_the_environment_has():
    spec, system = envs.get("pusht"), Stub()
    system.config.data.cameras, system.config.data.choices = ("any",), {"any": ("web", "observation/image")}
    system.spec = dataclasses.replace(system.spec, cameras={"any": (SIZE, SIZE)})
    assert closed_loop.views_of(spec, system) == {"any": "image"}
    system.config.data.sources.robot = source(cameras=("own",), choices={"own": ("image", "web")})
    assert closed_loop.views_of(spec, system) == {"any": "image"}
    system.config.data.sources.robot.choices = {"own": ("web",)}
    with pytest.raises(UserError, match="camera 'any': pusht has image"):
        closed_loop.check_fits(spec, system)


@pytest.mark.slow
def test_several_views_of_one_camera_act_as_one(episodes):
    (alone,) = closed_loop.closed_loop(backend(TwoViews()), "pusht", SEEDS[:1], workers=1)
    assert same(alone, episodes[0])


@pytest.fixture(scope="module")
def episodes():
    return closed_loop.closed_loop(backend(Stub()), "pusht", SEEDS, workers=2)


@pytest.mark.slow
def test_an_episode_does_not_depend_on_the_others(episodes):
    assert [e.seed for e in episodes] == SEEDS and [len(e.actions) for e in episodes] == [300, 300]
    assert all(len(e.scores) == len(e.actions) + 1 for e in episodes)
    with ParallelEnvs("pusht", {"image": (SIZE, SIZE)}, workers=1) as open_envs:
        alone = closed_loop.closed_loop(backend(Stub()), open_envs, SEEDS[1:])
        again = closed_loop.closed_loop(backend(Stub()), open_envs, SEEDS[::-1], seed=1)
    assert same(alone[0], episodes[1])
    assert not same(again[1], episodes[0])


@pytest.mark.slow
def test_the_loop_is_that_of_one_policy_in_one_environment(episodes):
    env = envs.get("pusht").make({"image": (SIZE, SIZE)})
    policy = Policy(backend(Stub()), execute=8, batch_size=closed_loop.BATCH)
    policy.reset(SEEDS[:1])
    observation, info = env.reset(seed=SEEDS[0])
    for step in range(40):
        assert episodes[0].scores[step] == info["score"]
        action = policy.act({key: x[None] for key, x in observation.items()})[0]
        np.testing.assert_array_equal(episodes[0].actions[step], action)
        observation, *_, info = env.step(action)


class Relative(Stub):
    """Makes the same actions relative to the agent's place."""

    def __init__(self):
        super().__init__()
        part = {"columns": "action", "transform": "relative:agent_pos:position", "width": 2}
        robots = {"robot": RobotActions.from_json({"parts": [part], "states": {"agent_pos": 2}})}
        half = (np.full(2, 256, np.float32), np.zeros(2, np.float32))
        self.spec = dataclasses.replace(self.spec, normalizer=Normalizer({"action": half}), robots=robots)

    def sample(self, params, batch, use, noise):
        made = super().sample(params, batch, use, noise)
        return made if use == "forward" else {"action": made["action"] + 1 - batch["obs/agent_pos"][:, -1:] / 256}


@pytest.mark.slow
def test_relative_actions_are_taken_as_the_simulator_has_them():
    """Two chunks of the loop, and what the film gives the forward mode."""

    def begin(stub):
        return closed_loop.closed_loop(
            backend(stub), "pusht", SEEDS[:1], workers=1, each=lambda rounds: itertools.islice(rounds, 2)
        )[0]

    spec, relative, plain = envs.get("pusht"), begin(Relative()), begin(Stub())
    assert relative.actions.shape == (16, 2) and relative.actions.std() > 10
    np.testing.assert_allclose(relative.actions[:8], plain.actions[:8], atol=1e-3)  # pixels
    np.testing.assert_allclose(relative.actions, plain.actions, atol=0.1)
    episode = walk()
    seen = replay(spec.make({"image": (SIZE, SIZE)}), episode)
    clip = film.imagine(Relative(), {}, {}, episode, seen, execute=8)
    for i, t in enumerate(clip.steps):
        expected = (episode.actions[t + 15, 0] - seen["agent_pos"][t, 0]) / 256
        np.testing.assert_allclose(clip.imagined[i], np.clip(expected, 0, 1), atol=1e-5)
    assert clip.imagined.max() > 0.1
    other = Relative()
    other.spec = dataclasses.replace(
        other.spec,
        robots={
            "robot": RobotActions.from_json(
                {"parts": [{"columns": "a", "transform": "relative:pose", "width": 6}], "states": {"pose": 6}}
            )
        },
    )
    with pytest.raises(UserError, match=r"pose \(6 numbers\): pusht has (.|\n)*6 numbers of action: pusht takes 2"):
        closed_loop.check_fits(spec, other)


def walk(steps: int = 45) -> EpisodeResult:
    """An episode of some random targets."""
    env = envs.get("pusht").make({})
    scores, actions = [env.reset(seed=SEEDS[0])[1]["score"]], np.random.default_rng(0).uniform(0, 512, (steps, 2))
    scores += [env.step(action)[4]["score"] for action in actions]
    return EpisodeResult(SEEDS[0], np.array(scores), actions, False)


def test_a_replay_shows_what_was_seen():
    env, episode = envs.get("pusht").make({"image": (SIZE, SIZE)}), walk()
    seen = replay(env, episode)
    assert seen["image"].shape == (46, SIZE, SIZE, 3) and seen["agent_pos"].shape == (46, 2)
    assert env.simulator._get_coverage() == episode.scores[-1]
    np.testing.assert_array_equal(seen["agent_pos"][0], env.reset(seed=SEEDS[0])[0]["agent_pos"])


def test_the_film_shows_actions_and_outcome_of_each_decision(tmp_path):
    spec, stub, episode = envs.get("pusht"), Stub(), walk()
    seen = replay(spec.make({"image": (SIZE, SIZE)}), episode)
    clip = film.imagine(stub, {}, {}, episode, seen, execute=8, label="first")
    # Window obs (0, 1), action 1..16, next_obs (17, 18): the last frame is 17 steps after the newest observed one.
    np.testing.assert_array_equal(clip.steps, [0, 8, 16, 24])
    for i, t in enumerate(clip.steps):
        np.testing.assert_array_equal(clip.actions[i], episode.actions[t : t + 16])
        np.testing.assert_allclose(clip.current[i, 0], seen["image"][t] / 255, atol=1e-6)
        np.testing.assert_allclose(clip.truth[i, 0], seen["image"][t + 17] / 255, atol=1e-6)
        expected = np.clip(episode.actions[t + 15, 0] / 256 - 1, 0, 1)
        np.testing.assert_allclose(clip.imagined[i], expected, atol=1e-5)
    assert clip.imagined.std() > 0.01

    short = dataclasses.replace(episode, actions=episode.actions[:16], scores=episode.scores[:17])
    none = film.imagine(stub, {}, {}, short, seen, execute=8)
    assert len(none.steps) == 0 and not film.draw([none], spec, stub, tmp_path / "none.gif")
    (tmp_path / "film.gif").write_bytes(b"older")
    assert not film.draw([none], spec, stub, tmp_path / "film.gif") and not (tmp_path / "film.gif").exists()
    assert film.draw([clip._replace(steps=clip.steps[:3]), none], spec, stub, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames == 3
    assert {p.name for p in tmp_path.iterdir()} == {"film.gif", "pictures.json"}


def test_the_film_has_its_labels_beside_it_and_no_text_inside(tmp_path, monkeypatch):
    def no_text(*args, **kwargs):
        raise AssertionError("text in a picture")

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", no_text)
    spec, stub, episode = envs.get("pusht"), Stub(), walk()
    seen = replay(spec.make({"image": (SIZE, SIZE)}), episode)
    clip = film.imagine(stub, {}, {}, episode, seen, execute=8, label="best of 2")
    assert film.draw([clip, clip._replace(label="worst of 2")], spec, stub, tmp_path / "film.gif")
    labels = read_labels(tmp_path / "film.gif")
    ends = f"ended after {len(episode.scores) - 1} steps, best coverage {episode.scores.max():.2f}"
    assert labels.rows == [f"best of 2: {ends}", f"worst of 2: {ends}"]
    assert [title for title, _ in labels.columns] == ["now", "imagined", "the truth"]
    with Image.open(tmp_path / "film.gif") as gif:
        width, height = gif.size[0] / 3, gif.size[1] / 2  # tiles are equal
        assert width % 1 == height % 1 == 0
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("RGB"), int)
    # The bar at the end of the episode: filled for the share that its last score is of the best one.
    line = last[int(height) - film.BELOW // 2 + 3, film.GAP : -film.GAP]
    filled = np.abs(line - np.array([0xD8, 0x1B, 0x60])).sum(-1) < 60
    assert filled.mean() == pytest.approx(episode.scores[-1] / episode.scores.max(), abs=0.03)


def test_the_film_of_a_system_that_imagines_nothing_reads_no_later_frame(tmp_path):
    spec, stub, episode = envs.get("pusht"), Stub(), walk()
    stub.uses = {"policy": stub.uses["policy"]}
    stub.config.data.window.next_obs = ()
    stub.spec = dataclasses.replace(stub.spec, window=WindowSpec.from_config(stub.config.data.window))
    seen = replay(spec.make({"image": (SIZE, SIZE)}), episode)
    clip = film.imagine(stub, {}, {}, episode, seen, execute=8, label="first")
    np.testing.assert_array_equal(clip.steps, [0, 8, 16, 24])
    np.testing.assert_allclose(clip.current[:, 0], seen["image"][clip.steps] / 255, atol=1e-6)
    assert clip.imagined is None and clip.truth is None
    assert film.draw([clip], spec, stub, tmp_path / "film.gif")
    assert [title for title, _ in read_labels(tmp_path / "film.gif").columns] == ["now"]
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames == 4 and gif.size[0] == film.CELL + 2 * film.GAP
    stub.spec = dataclasses.replace(stub.spec, cameras={})
    assert not len(film.imagine(stub, {}, {}, episode, seen, execute=8).steps)


def test_metrics_are_paired_by_episode():
    def made(best):
        return [EpisodeResult(i, np.array([0.01 * i, b, 0.0]), np.zeros((2, 2)), b > 0.95) for i, b in enumerate(best)]

    best = [0.5, 1.0, 0.7, 0.6, 0.6, 0.5, 0.9, 0.8]
    results = {"policy": made(best), "random_held": made([b - 0.2 for b in best])}
    metrics = closed_loop.measure(results, envs.get("pusht"))
    assert metrics["policy/max_coverage"]["mean"] == pytest.approx(0.7) and metrics["policy/success"]["mean"] == 0.125
    assert 0.5 < metrics["policy/max_coverage"]["lo"] < 0.65 < 0.75 < metrics["policy/max_coverage"]["hi"] < 0.9
    paired = metrics["paired/policy_vs_random_held/max_coverage"]
    np.testing.assert_allclose([paired["mean"], paired["lo"], paired["hi"]], 0.2)  # the same in every episode
    assert paired["n"] == 8
    success = metrics["paired/policy_vs_random_held/success"]
    assert -1 < success["lo"] < success["mean"] == 0.125 < success["hi"] < 1
    assert metrics["no_action/max_coverage"]["mean"] == pytest.approx(0.035)
    assert film.representative(results["policy"][:4]) == [("best of 4", 1), ("median of 4", 2), ("worst of 4", 0)]
    assert film.representative(results["policy"][:1]) == [("best of 1", 0)]
    table = rollout.text_table(metrics, "coverage")
    assert "0.700" in table and "+0.200 [+0.200, +0.200]" in table
    two = closed_loop.measure({who: episodes[:2] for who, episodes in results.items()}, envs.get("pusht"))
    assert all(m["lo"] is m["hi"] is None for m in two.values()), "of two episodes"
    assert "0.750 [too few]" in rollout.text_table(two, "coverage")


def test_a_model_of_other_data_is_refused():
    stub = Stub()
    stub.spec = DataSpec(stub.spec.window, {"wrist": (8, 8)}, {"agent_pos": 3}, 7, 4, Normalizer())
    with pytest.raises(UserError) as e:
        closed_loop.closed_loop(backend(stub), "pusht", SEEDS)
    for part in (
        "camera 'wrist': pusht has image",
        "agent_pos (3 numbers)",
        "text (4 numbers): pusht has none",
        "action: pusht takes 2",
    ):
        assert part in str(e.value)


@pytest.mark.slow
def test_observations_take_the_path_of_training_bit_for_bit(trained):
    """A demonstration's window through the loader, and the simulator in the same states through the policy."""
    system, params, frozen, _ = load_for_inference(trained)
    data = RunData(system.config.data, seed=0, normalizer=system.spec.normalizer)
    held_out = data.held_out(4)
    window = held_out.batch(2, 3)
    origin = int(held_out.origins[2])

    seed = int(held_out.episodes[2])  # episode i of the dataset starts from seed i
    spec = envs.get("pusht")
    env, expert = spec.make(system.spec.cameras), spec.expert()
    observation, _ = env.reset(seed=seed)
    expert.reset(seed)
    policy = Policy(JaxBackend(system, params, frozen), execute=16)
    policy.reset([seed])
    for _ in range(origin + 1):  # the newest frame of the window is the one at origin + 1
        policy.observe({key: x[None] for key, x in observation.items()})
        observation, *_ = env.step(expert.act(env))
    policy.observe({key: x[None] for key, x in observation.items()})

    inputs = system.spec.normalized(policy.inputs())
    assert inputs.keys() == {key for key in window if key.startswith("obs/")}
    for key, value in inputs.items():
        assert value.dtype == window[key].dtype
        np.testing.assert_array_equal(value, window[key])
    own = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), 0)
    noise = system.noise(own, jnp.zeros(1, jnp.int32), "policy")

    @jax.jit
    def sample(batch, noise):
        return system.sample(params, system.encode(frozen, batch), "policy", noise)["action"]

    chunk = sample(window, noise)
    made = policy.actor.chunks(policy.inputs(), policy.actor.noise(0, [seed], [0]))
    np.testing.assert_array_equal(made, system.spec.normalizer.unnormalize("action", np.asarray(chunk)))


@pytest.mark.slow
def test_the_command_writes_metrics_episodes_and_film(trained, capsys):
    arguments = ["rollout", f"--workdir={trained}", "--env=pusht", "--episodes=2", "--workers=1"]
    assert cli.call(rollout.main, arguments, rollout.define_flags) == 0
    folder = trained / "rollout" / "2"
    metrics = json.loads((folder / "metrics.json").read_text())
    for who in ("policy", "random_uniform", "random_held", "expert"):
        assert set(metrics[f"{who}/max_coverage"]) == {"mean", "lo", "hi", "n", "episodes"}
        assert metrics[f"{who}/success"]["n"] == 2
        assert who == "policy" or f"paired/policy_vs_{who}/max_coverage" in metrics
    assert metrics["expert/max_coverage"]["mean"] > 0.9
    stored = json.loads((folder / "episodes.json").read_text())
    assert stored["env"] == "pusht" and stored["execute"] == 8
    assert [e["seed"] for e in stored["episodes"]["policy"]] == [100_000, 100_001]
    with Image.open(folder / "episodes.gif") as gif:
        assert gif.n_frames == 36
    assert (trained / "report.html").exists() and "random_held" in capsys.readouterr().out

    system, params, frozen, _ = load_for_inference(trained)
    again = closed_loop.closed_loop(JaxBackend(system, params, frozen), "pusht", [100_001])
    assert again[0].max_score == stored["episodes"]["policy"][1]["max_coverage"]


@pytest.mark.slow
def test_other_closed_loops_leave_the_first_alone(trained, tmp_path, monkeypatch, capsys):
    def act(*args, **_):
        return [EpisodeResult(seed, np.array([0.0, 0.5]), np.zeros((1, 2)), False) for seed in args[-1]]

    monkeypatch.setattr(rollout, "closed_loop", act)
    monkeypatch.setattr(rollout, "play", act)
    monkeypatch.setattr(rollout, "open_envs", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(rollout, "replay", lambda *_: {"image": None})
    monkeypatch.setattr(film, "imagine", lambda *_, **__: None)
    monkeypatch.setattr(film, "draw", lambda *_: False)
    output = tmp_path / "out"

    def call(*flags):
        arguments = ["rollout", f"--workdir={trained}", "--env=pusht", "--episodes=3", f"--output={output}", *flags]
        status = cli.call(rollout.main, arguments, rollout.define_flags)
        return status, capsys.readouterr().err

    def settings(folder):
        return json.loads((folder / "episodes.json").read_text())["settings"]

    first = output / "rollout" / "2"
    flags = {"env": "pusht", "first_seed": 100_000, "episodes": 3, "execute": 8, "seed": 0}
    assert call() == (0, "") and settings(first) == flags
    content = (first / "episodes.json").read_bytes()
    for flag, other in (
        ("--first_seed=100009", {"first_seed": 100_009}),
        ("--execute=4", {"execute": 4}),
        ("--seed=1", {"seed": 1}),
        ("--config.diffusion.hide_at=train", {"diffusion.hide_at": "train"}),
    ):
        before = set(first.glob("*/"))
        assert call(flag)[0] == 0
        (folder,) = set(first.glob("*/")) - before
        assert settings(folder) == flags | other
    assert call("--execute=4", "--name=four") == (0, "") and settings(first / "four") == flags | {"execute": 4}
    assert (first / "episodes.json").read_bytes() == content and call() == (0, "")
    assert (output / "report.html").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rollout, "open_envs", None)  # nothing is simulated before it is known
    status, error = call(f"--output={tmp_path / 'file' / 'x'}")
    assert status == 2 and "cannot be written" in error


@pytest.mark.slow
def test_every_way_of_sampling_acts_in_the_same_processes(trained, monkeypatch, capsys):
    seen = []

    def act(backend, envs, seeds, execute, progress):
        assert execute == 4
        seen.append((envs, backend.model.schedule.num_inference_steps, list(seeds)))
        return [EpisodeResult(seed, np.array([0.0, len(seen) / 10]), np.zeros((1, 2)), seed % 2 == 0) for seed in seeds]

    monkeypatch.setattr(closed_loop, "closed_loop", act)
    arguments = ["compare_samplers", f"--workdir={trained}", "--steps=2,1", "--env=pusht", "--episodes=2"]
    arguments += ["--execute=4", "--config.eval.num_windows=4"]
    assert cli.call(compare_samplers.main, arguments, compare_samplers.define_flags) == 0
    envs, again = seen[0][0], seen[1][0]
    assert envs is again and isinstance(envs, ParallelEnvs) and envs.spec.name == "pusht"
    assert [call[1:] for call in seen] == [(2, [100_000, 100_001]), (1, [100_000, 100_001])]
    found = json.loads((trained / "eval" / "2" / "few_steps.json").read_text())
    assert [found["about"][name] for name in ("env", "closed_loop_episodes", "execute")] == ["pusht", 2, 4]
    rows = found["rows"]
    for row, coverage in zip(rows, (0.1, 0.2), strict=True):
        same = {"mean": coverage, "lo": None, "hi": None, "n": 2, "episodes": 2}
        assert row["metrics"]["closed_loop/max_coverage"] == same
        assert row["metrics"]["closed_loop/success"] == {**same, "mean": 0.5}
    assert "closed_loop/success" in capsys.readouterr().out
    for flag, message in (
        ("--env=other", "--env=other: there is no such environment. Known: pusht"),
        ("--execute=17", "execute=17: expected 1 to 16"),
    ):
        assert cli.call(compare_samplers.main, [*arguments, flag], compare_samplers.define_flags) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_unusable_flags_end_with_status_2(trained, capsys):
    for flag, message in (
        ("--env=other", "--env=other: there is no such environment. Known: pusht"),
        ("--execute=17", "execute=17: expected 1 to 16"),
        ("--episodes=0", "episodes"),
    ):
        arguments = ["rollout", f"--workdir={trained}", "--env=pusht", "--episodes=1", flag]
        assert cli.call(rollout.main, arguments, rollout.define_flags) == 2
        assert message in capsys.readouterr().err
    assert cli.call(rollout.main, ["rollout", f"--workdir={trained}"], rollout.define_flags) == 2
    assert "--env is required" in capsys.readouterr().err
