"""Every system through the trainer and the commands, with no line of theirs that knows which one it is."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from data_prep import demo  # noqa: E402
from tests.systems.small import SIZE, SYSTEMS, on_pusht, on_tiny_dataset, small_config  # noqa: E402
from uwm_jax import cli, evaluate, report, rollout, sample, sample_inputs, systems  # noqa: E402
from uwm_jax.config import source  # noqa: E402
from uwm_jax.errors import UserError  # noqa: E402
from uwm_jax.train import train  # noqa: E402
from uwm_jax.training import inference  # noqa: E402
from uwm_jax.training.patterns import matches  # noqa: E402


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """The beginnings of four demonstrations in the training layout, which count as solved."""
    run = demo.run_episode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_episode", lambda number, params: dataclasses.replace(run(number, params), solved=True))
        output = tmp_path_factory.mktemp("demonstrations") / "pusht"
        demo.make(demo.Demo(episodes=4, image_size=SIZE, candidates=24, max_steps=40), output, workers=1)
    return output


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def call(module, *arguments):
    name = module.__name__.rpartition(".")[2]
    assert cli.call(module.main, [name, *map(str, arguments)], module.define_flags) == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", SYSTEMS)
def test_every_command_serves_it(variant, demonstrations, tmp_path, capsys):
    kind = systems.get(SYSTEMS[variant])
    config = on_pusht(small_config(variant), demonstrations, demo.VAL_RATIO)
    config.total_steps, config.eval.every = 4, 4
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, straight)
    lines = lines_of(straight)
    parts = {f"loss/{part}" for part in config.loss.weights}
    assert parts <= lines[0].keys() and all(np.isfinite(line["loss"]) for line in lines)
    acting = kind.uses[kind.acting]
    assert {f"eval/{kind.acting}/action_mse", *(f"eval/{part}" for part in parts)} <= lines[-1].keys()
    assert ("next_obs" in acting.makes) == (f"eval/{kind.acting}/psnr" in lines[-1])

    half = config.copy_and_resolve_references()
    half.total_steps, half.eval.every = 2, 0
    train(half, stopped)
    train(config, stopped)  # continues
    assert [line["loss"] for line in lines_of(stopped)] == [line["loss"] for line in lines]

    call(evaluate, f"--workdir={straight}")
    metrics = json.loads((straight / "eval" / "4" / "metrics.json").read_text())
    assert parts < metrics.keys() and f"paired/{kind.acting}_vs_mean_action/action_mse" in metrics
    assert (straight / "eval" / "4" / "actions.png").is_file()
    call(rollout, f"--workdir={straight}", "--env=pusht", "--episodes=2", "--workers=1", "--execute=4")
    scores = json.loads((straight / "rollout" / "4" / "metrics.json").read_text())
    assert scores["policy/max_coverage"]["n"] == 2
    page = (straight / "report.html").read_text()
    assert kind.title in page and "Pictures: not made yet" not in page
    call(report, straight, stopped, f"--output={tmp_path / 'both.html'}")

    inputs, output = tmp_path / "in.npz", tmp_path / "out.npz"
    call(sample_inputs, f"--workdir={straight}", "--windows=0:2", f"--output={inputs}")
    modes = ",".join([*kind.uses, "denoise"])
    call(sample, f"--workdir={straight}", f"--mode={modes}", f"--inputs={inputs}", f"--output={output}")
    with np.load(output) as found:
        assert all(np.isfinite(found[name]).all() for name in found.files)
        assert found[f"{kind.acting}/action"].shape == (2, 4, 2)
        assert {f"denoise/{part}" for part in parts} <= set(found.files)
    if absent := sorted({"policy", "joint", "video"} - set(kind.uses)):
        status = cli.call(sample.main, ["sample", f"--workdir={straight}", f"--mode={absent[0]}", f"--inputs={inputs}",
                                        f"--output={output}"], sample.define_flags)  # fmt: skip
        told = capsys.readouterr().err
        assert status == 2 and all(use in told for use in kind.uses)

    finetuned = config.copy_and_resolve_references()
    finetuned.init_from, finetuned.total_steps, finetuned.eval.every = str(straight), 2, 0
    finetuned.optimizer.learning_rate = 1e-30  # steps that change nothing but zeros
    train(finetuned, tmp_path / "finetuned")
    before, after = (inference.load_for_inference(run)[1] for run in (straight, tmp_path / "finetuned"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-30), after, before)
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("variant", SYSTEMS)
def test_rows_without_actions(variant, tiny_dataset, tmp_path):
    """Systems that learn from video leave such rows out of the action loss; DP refuses the source."""
    config = on_tiny_dataset(small_config(variant), tiny_dataset)
    config.data.path = ""
    config.data.sources.robot = source(path=str(tiny_dataset))
    config.data.sources.video = source(path=str(tiny_dataset), use_actions=False)
    if SYSTEMS[variant] == "dp":
        with pytest.raises(UserError, match="config.data.sources.video.use_actions=False: a dp run"):
            train(config, tmp_path / "run")
        return
    config.data.sources.robot.weight = 1e-9  # all but every row has none
    train(config, tmp_path / "run")
    for line in lines_of(tmp_path / "run"):
        assert np.isfinite(line["loss"]) and np.isfinite(line["loss/next_obs"])
        if SYSTEMS[variant] != "uwm":  # UWM keeps such rows with epsilon, as its official code does
            assert "loss/action" not in line, "a part that no row trained has no mean"


@pytest.mark.slow
@pytest.mark.parametrize("variant", SYSTEMS)
def test_untrained_parameters_stay_as_they_are(variant, tiny_dataset, tmp_path):
    config = on_tiny_dataset(small_config(variant), tiny_dataset)
    config.optimizer.ema_decay, config.optimizer.weight_decay = 0.5, 0.1
    config.total_steps = 5
    train(config, tmp_path / "run")
    system, params, *_ = inference.load_for_inference(tmp_path / "run")
    fresh = jax.jit(system.init)(jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1))
    after, before = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (params, fresh)
    )
    still = [name for name in after if matches(name, system.tree.untrained)]
    assert bool(still) == (SYSTEMS[variant] == "gr1")
    for name in still:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
