"""Fields that a checkpoint fixes follow neither from the config.json next to it nor from flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.errors import UserError
from uwm_jax.reporting.results import Run
from uwm_jax.training import fixed_fields
from uwm_jax.training.checkpoints.reader import CheckpointReader
from uwm_jax.training.workdir import write_config


@pytest.fixture
def stored(workdir):
    stored = CheckpointReader(workdir / "checkpoints", 6)
    write_config(workdir, fixed_fields.stored_config(stored))
    return stored


def rewrite(workdir, **fields):
    """Changes fields of `config.json`, `a__b` for `a.b`."""
    config = json.loads((workdir / "config.json").read_text())
    for name, value in fields.items():
        *parents, leaf = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    (workdir / "config.json").write_text(json.dumps(config))


def test_the_checkpoint_wins_with_one_line_where_the_file_differs(workdir, stored, capsys):
    config = fixed_fields.for_inference(workdir, stored)
    assert capsys.readouterr().err == ""
    rewrite(workdir, diffusion__prediction__action="v", model__num_heads=1, total_steps=77, data__path="/moved")
    found = fixed_fields.for_inference(workdir, stored)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "diffusion.prediction.action ('v', there 'epsilon')" in told
    assert "model.num_heads (1, there" in told and "total_steps" not in told and "data.path" not in told
    assert found.diffusion.prediction.action == "epsilon" and found.model.num_heads == config.model.num_heads
    assert found.total_steps == 77 and found.data.path == "/moved", "what may change is the file's"


def test_a_run_that_continues_was_started_with_what_its_checkpoint_holds(workdir, stored, capsys):
    rewrite(workdir, seed=9, total_steps=77)
    started = fixed_fields.started_with(workdir, 6)
    assert started.seed == 0 and started.total_steps == 77
    assert "seed (9, there 0)" in capsys.readouterr().err
    next((workdir / "checkpoints" / "6" / "assets").iterdir()).unlink()
    assert fixed_fields.started_with(workdir, 6).seed == 9, "all that is left"
    assert capsys.readouterr().err == ""


def test_a_page_tells_of_the_config_that_the_checkpoint_holds(workdir, stored):
    rewrite(workdir, seed=9, total_steps=77)
    config = Run.read(workdir).config
    assert config.seed == 0 and config.total_steps == 77


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diffusion.prediction.action", "v"),
        ("diffusion.beta_schedule", "linear"),
        ("diffusion.num_train_steps", "50"),
        ("diffusion.next_obs_timesteps", "high_noise"),
        ("model.depth", "7"),
        ("model.num_registers", "0"),
        ("model.codec.vae", "elsewhere/vae"),
        ("data.cameras", "front"),
        ("data.low_dim", "gripper"),
        ("data.normalize", "none"),
        ("data.window.pad", "edge"),
        ("optimizer.ema_decay", "0.5"),  # has no effect on what is saved
        ("optimizer.learning_rate", "1"),
        ("loss.weights.action", "2"),
        ("total_steps", "7"),
        ("seed", "7"),
        ("checkpoint.keep", "9"),
        ("data.num_threads", "9"),
        ("init_from", "elsewhere"),
    ],
)
def test_what_the_checkpoint_fixes_or_nobody_reads_is_refused_by_name(workdir, stored, name, value):
    for may_change in (fixed_fields.SAMPLING, fixed_fields.EVALUATION):
        with pytest.raises(UserError, match=rf"--config\.{name}=.*only diffusion\.spacing") as e:
            fixed_fields.for_inference(workdir, stored, [(name, value)], may_change)
        assert ("data.split" in str(e.value)) == (may_change is fixed_fields.EVALUATION)


def test_how_to_sample_may_change_and_what_to_evaluate_too(workdir, stored, capsys):
    sampling = [
        ("diffusion.spacing", "trailing"),
        ("diffusion.num_inference_steps", "3"),
        ("diffusion.hide_at", "train"),
        ("diffusion.clip.next_obs", "4.0"),
        ("model.dtype", "bfloat16"),
        ("model.depth", str(config_lib.read(workdir).model.depth)),  # the value that it has
    ]
    flat = config_lib.flatten(fixed_fields.for_inference(workdir, stored, sampling))
    assert flat["diffusion.clip.next_obs"] == 4.0 and flat["diffusion.num_inference_steps"] == 3
    evaluation = [
        ("eval.num_windows", "5"),
        ("data.split", "val"),
        ("batch_size", "8"),
        ("data.drop_nonfinite", "true"),
        ("data.max_bad_records", "3"),
        ("data.latents", "vae"),
    ]
    for name, value in evaluation:
        with pytest.raises(UserError, match=f"--config.{name}="):
            fixed_fields.for_inference(workdir, stored, [(name, value)])
    flat = config_lib.flatten(
        fixed_fields.for_inference(workdir, stored, sampling + evaluation, fixed_fields.EVALUATION)
    )
    assert flat["data.split"] == "val" and flat["eval.num_windows"] == 5
    assert capsys.readouterr().err == ""


def test_the_docs_list_what_may_change():
    page = (Path(config_lib.__file__).parents[1] / "docs" / "training.md").read_text()
    of_systems = {field for name in systems.names() for field in systems.get(name).fields.sampling}
    listed = of_systems | {*fixed_fields.EVALUATION} - {*fixed_fields.SAMPLING}
    assert [name for name in sorted(listed) if f"`{name}`" not in page] == []
