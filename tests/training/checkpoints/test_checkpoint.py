"""Checkpoints that are read for inference or to continue, that others may be writing, and that cannot be saved."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.training import small_run
from uwm_jax import reading
from uwm_jax.errors import RunError, UserError
from uwm_jax.synthetic import synthetic_codec, synthetic_system
from uwm_jax.training.checkpoints import checkpoint
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step, make_assets
from uwm_jax.training.checkpoints.retention import Retention
from uwm_jax.training.inference import load_for_inference
from uwm_jax.training.state import TrainState, create, make_optimizer
from uwm_jax.training.workdir import save_params_only, warn_of_room, write_config


@pytest.fixture(scope="module")
def converted(tmp_path_factory, make_tiny_config):
    """A workdir with parameters and assets alone, and these parameters."""
    config = make_tiny_config()
    config.model.codec.name = "pca"
    workdir = tmp_path_factory.mktemp("checkpoint") / "run"
    system, frozen = synthetic_system(config, 10)
    params = jax.jit(system.init)(jax.random.key(1))
    save_params_only(workdir, config, system.spec, params, frozen)
    return workdir, system, params, frozen


def test_parameters_and_codec_come_back(converted):
    workdir, _, params, frozen = converted
    _, found, found_frozen, step = load_for_inference(workdir)
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, found, params)
    jax.tree.map(np.testing.assert_array_equal, found_frozen, frozen)


def test_reading_leaves_a_save_in_progress_alone(converted):
    workdir = converted[0]
    unfinished = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    try:
        assert latest_step(workdir) == 0
        assert load_for_inference(workdir)[3] == 0
        assert unfinished.is_dir()
    finally:
        unfinished.rmdir()


def test_a_run_from_before_the_data_had_a_seed_continues(tmp_path, monkeypatch):
    """Its one seed was for all draws."""
    checkpoints, items_of = Checkpoints(tmp_path), checkpoint._state_items

    def older(state):
        items = items_of(state)
        fields = {name: getattr(state.hparams, name) for name in ("seed", "learning_rate", "weights")}
        return {**items, "train_state": {**items["train_state"], "hparams": fields}}

    state, assets = small_run.state_at(2), small_run.assets_of()
    state = state.replace(hparams=state.hparams.replace(seed=jnp.uint32(7), data_seed=jnp.uint32(7)))
    del assets["config"]["data"]["seed"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_state_items", older)
        checkpoints.save(state, {}, small_run.CODEC, assets)
        checkpoints.wait()
    found, _ = checkpoints.restore_latest(small_run.like())
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)


def test_a_workdir_without_checkpoints_stays_untouched(converted, tmp_path):
    (tmp_path / "config.json").write_text((converted[0] / "config.json").read_text())
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_for_inference(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert latest_step(tmp_path) is None and latest_step(tmp_path / "none") is None


def digest_of(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_workdir_that_another_start_holds_is_left_as_it_is(tmp_path):
    """A run that has not saved yet holds its workdir by the lock alone."""
    (tmp_path / "config.json").write_text("theirs")
    with (tmp_path / ".lock").open("w") as held:
        held.write("process 1 on elsewhere")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        before = digest_of(tmp_path)
        for first_start in (True, False):
            with pytest.raises(RunError, match="another run is at work.*process 1 on elsewhere"):
                Checkpoints(tmp_path, first_start=first_start)
        assert digest_of(tmp_path) == before and not (tmp_path / "checkpoints").exists()


def test_a_first_start_leaves_what_another_run_saved_meanwhile(converted):
    workdir = converted[0]
    before = digest_of(workdir)
    for _ in range(2):  # the lock is given back
        with pytest.raises(RunError, match="another run has meanwhile saved step 0"):
            Checkpoints(workdir, first_start=True)
    assert digest_of(workdir) == before


def test_too_little_room_for_the_checkpoints_to_keep_is_told(tmp_path, monkeypatch, capsys):
    state = {"w": jax.ShapeDtypeStruct((250, 1000), jnp.float32)}  # 1 MB
    for free, most, warns in ((4.1e6, 4, False), (3.9e6, 4, True), (3.9e6, 3, False), (0, None, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        warn_of_room(tmp_path, state, most)
        assert ("keep up to 3" in capsys.readouterr().err) == warns
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)  # one of the three is there already
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3.1e6))
    warn_of_room(tmp_path, state, 4)
    assert not capsys.readouterr().err
    warn_of_room(tmp_path, state, 4, members=2)
    assert "3 more checkpoints of 1.0 MB for each of 2 members" in capsys.readouterr().err


def test_a_converted_checkpoint_cannot_be_continued(converted, make_tiny_config):
    workdir, system, params, _ = converted
    config = make_tiny_config()
    state = jax.eval_shape(lambda p: create(config, p, make_optimizer(config)), params)
    checkpoints = Checkpoints(workdir, read_only=True)
    with pytest.raises(UserError, match="without a training state"):
        checkpoints.restore_state(0, state)
    checkpoints.close()


def test_synthetic_pca_is_orthonormal(make_tiny_config):
    _, frozen = synthetic_codec(make_tiny_config())
    gram = np.einsum("vpk,vpl->vkl", frozen["components"], frozen["components"])
    np.testing.assert_allclose(gram, np.eye(gram.shape[-1])[None], atol=1e-5)


def test_parameters_alone_are_read(converted, tmp_path):
    """For sampling, nothing is opened but the parameters that count, the codec and the assets."""
    _, system, params, frozen = converted
    state = TrainState(jnp.int32(0), params, None, params["obs_encoder"], {})
    averaged = jax.tree.map(lambda x: x + 1, params)
    write_config(tmp_path, system.config)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        state.replace(ema_params=averaged), {"position": 3}, frozen, make_assets(system.config, system.spec)
    )
    checkpoints.close()
    for item in ("params", "train_state", "data_iter"):
        shutil.rmtree(tmp_path / "checkpoints" / "0" / item)
    _, found, _, _ = load_for_inference(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, averaged)
    shutil.rmtree(tmp_path / "checkpoints" / "0" / "ema_params")
    with pytest.raises(UserError, match="ema_params is missing"):
        load_for_inference(tmp_path)


def test_sampling_falls_back_too_but_not_from_a_step_that_was_asked_for(converted, tmp_path, capfd):
    _, system, params, frozen = converted
    newer = jax.tree.map(lambda x: x + 1, params)
    for step, values in ((2, params), (4, newer)):
        save_params_only(tmp_path, system.config, system.spec, values, frozen, step)
    small_run.flip(small_run.largest_file(tmp_path / "checkpoints" / "4" / "params"))
    _, found, _, step = load_for_inference(tmp_path)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert "warning: checkpoint 4 is damaged" in capfd.readouterr().err
    assert latest_step(tmp_path) == 4 and not (tmp_path / "corrupt").exists(), "reading moves nothing"
    with pytest.raises(UserError, match=r"--step=4: .*params.*steps \[2, 4\]"):
        load_for_inference(tmp_path, step=4)


# --- a run's checkpoints ---------------------------------------------------------------------------


def test_the_newest_comes_back_and_old_ones_go(workdir):
    checkpoints = Checkpoints(workdir, Retention(2))
    assert checkpoints.steps() == [4, 6]
    assert {p.name for p in checkpoints.directory.iterdir()} == {"4", "6"}
    stored = checkpoints.newest_readable()
    assert stored.step == 6 and stored.data_iter == {"position": 48, "history": [[0, 1.5]]}
    np.testing.assert_array_equal(stored.codec["components"], small_run.CODEC["components"])
    state, stored = checkpoints.restore_latest(small_run.like())
    assert stored.step == 6 and stored.assets["data_spec"]["action_dim"] == 4
    small_run.assert_is_step(state, 6)
    checkpoints.save(small_run.state_at(8), {"position": 64}, small_run.CODEC, small_run.assets_of())
    checkpoints.wait()
    assert checkpoints.steps() == [6, 8] == Checkpoints(workdir, read_only=True).steps()
    checkpoints.close()


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_readable() is None
    checkpoints.close()


def test_the_state_may_be_overwritten_while_it_is_saved(tmp_path):
    """The step reuses the state's buffers at once."""
    checkpoints = Checkpoints(tmp_path)
    state = small_run.state_at(3)
    checkpoints.save(state, {}, small_run.CODEC, small_run.assets_of())
    wipe = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    for _ in range(3):
        state = wipe(state)
    checkpoints.wait()
    small_run.assert_is_step(checkpoints.restore_latest(small_run.like())[0], 3)
    checkpoints.close()


def test_leftovers_of_a_killed_run_go_at_the_next_start(workdir):
    for name in ("8.orbax-checkpoint-tmp", "2.deleted"):
        (workdir / "checkpoints" / name / "params").mkdir(parents=True)
    assert Checkpoints(workdir, read_only=True).steps() == [4, 6] and latest_step(workdir) == 6
    assert len(list((workdir / "checkpoints").iterdir())) == 4
    Checkpoints(workdir).close()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]


# --- saves that fail ---------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Writing an item fails in the background, as it does when no space is left."""

    async def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)


def test_a_failed_save_is_raised_at_the_next_step(workdir, full_disk, capfd):
    checkpoints = Checkpoints(workdir, Retention(1))
    checkpoints.check()
    checkpoints.save(small_run.state_at(8), {}, small_run.CODEC, small_run.assets_of())
    with pytest.raises(RunError, match=r"checkpoints/8: .*No space left on device.*continues from step 6"):
        checkpoints.wait()
    for method in (
        checkpoints.check,
        lambda: checkpoints.save(small_run.state_at(9), {}, small_run.CODEC, small_run.assets_of()),
    ):
        with pytest.raises(RunError, match="checkpoints/8"):
            method()
    checkpoints.close()  # it is known already
    assert checkpoints.steps() == [4, 6], "nothing is deleted for a checkpoint that is not there"
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"], "half of one only takes room"
    assert "Traceback" not in capfd.readouterr().err


def test_closing_tells_of_a_failed_save(workdir, full_disk):
    checkpoints = Checkpoints(workdir)
    checkpoints.save(small_run.state_at(8), {}, small_run.CODEC, small_run.assets_of())
    with pytest.raises(RunError, match="checkpoints/8"):
        checkpoints.close()


def test_closing_does_not_hide_another_error(workdir, full_disk, capfd):
    checkpoints = Checkpoints(workdir)
    checkpoints.save(small_run.state_at(8), {}, small_run.CODEC, small_run.assets_of())
    with pytest.raises(ZeroDivisionError):
        try:
            _ = 1 / 0
        finally:
            checkpoints.close()
    assert "warning: " in (message := capfd.readouterr().err) and "No space left on device" in message


def test_a_directory_that_cannot_be_read_hides_no_failed_save(workdir, full_disk, monkeypatch, capfd):
    """The thread that deletes old checkpoints, and tells of failures, must not die of it."""

    def steps(_):
        raise OSError(errno.EIO, "Input/output error", str(workdir))

    checkpoints = Checkpoints(workdir, Retention(1))
    monkeypatch.setattr(Checkpoints, "steps", steps)
    checkpoints.save(small_run.state_at(8), {}, small_run.CODEC, small_run.assets_of())
    with pytest.raises(RunError, match=r"checkpoints/8: .*No space left on device"):
        checkpoints.wait()
    checkpoints.close()
    told = capfd.readouterr().err
    assert "checkpoints cannot be read: [Errno 5] Input/output error" in told and "Traceback" not in told


def test_a_directory_is_listed_again_where_a_disk_fails_for_a_moment(workdir, monkeypatch):
    listed, original, slept = [], os.listdir, []

    def fail_once(path):
        listed.append(path)
        if len(listed) == 1:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return original(path)

    monkeypatch.setattr(os, "listdir", fail_once)
    monkeypatch.setattr(reading.time, "sleep", slept.append)
    assert latest_step(workdir) == 6 and slept == [1.0]


def test_a_save_that_cannot_start(workdir):
    checkpoints = Checkpoints(workdir)
    with pytest.raises(RunError, match="checkpoints/6: .*exists"):
        checkpoints.save(small_run.state_at(6), {}, small_run.CODEC, small_run.assets_of())
    checkpoints.close()
    assert checkpoints.steps() == [4, 6]
