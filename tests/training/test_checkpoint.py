"""Checkpoints that others may be writing, that do not fit, were never finished, are damaged, or cannot be saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from launch.rehearse import Processes, one_device
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.errors import RunError, UserError
from uwm_jax.made_up import make_up_codec, make_up_system
from uwm_jax.system import DataFacts
from uwm_jax.training.checkpoint import (
    Checkpoints,
    latest_step,
    load_for_inference,
    make_assets,
    save_params_only,
    write_config,
)
from uwm_jax.training.state import TrainState, create, make_optimizer
from uwm_jax.training.stored import CorruptCheckpoint, array_digests, digests_on_devices, digests_on_host


@pytest.fixture(scope="module")
def converted(tmp_path_factory, make_tiny_config):
    """A workdir with parameters and assets alone, and these parameters."""
    config = make_tiny_config()
    config.model.codec.name = "pca"
    workdir = tmp_path_factory.mktemp("checkpoint") / "run"
    system, frozen = make_up_system(config, 10)
    params = jax.jit(system.init)(jax.random.key(1))
    save_params_only(workdir, config, system.facts, params, frozen)
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


def test_a_workdir_without_checkpoints_stays_untouched(converted, tmp_path):
    (tmp_path / "config.json").write_text((converted[0] / "config.json").read_text())
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_for_inference(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert latest_step(tmp_path) is None and latest_step(tmp_path / "none") is None


def test_a_converted_checkpoint_cannot_be_continued(converted, make_tiny_config):
    workdir, system, params, _ = converted
    config = make_tiny_config()
    state = jax.eval_shape(lambda p: create(config, p, make_optimizer(config)), params)
    checkpoints = Checkpoints(workdir, read_only=True)
    with pytest.raises(UserError, match="without a training state"):
        checkpoints.restore_state(0, state)
    checkpoints.close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("model.num_registers", "3"), r"pos_embed is \(1, 7, 32\) in the checkpoint, but \(1, 8, 32\)"),
        (("model.num_registers", "0"), r"pos_embed is \(1, 7, 32\) in the checkpoint, but \(1, 5, 32\)"),
        (("model.depth", "3"), r"blocks/.* is \(2, .* but \(3, "),
        (("data.cameras", "front"), r"config.data.cameras is \('front',\).*\('wrist',\)"),
        (("data.low_dim", "gripper"), r"config.data.low_dim is \('gripper',\).*\('state',\)"),
    ],
)
def test_overrides_that_do_not_fit_the_checkpoint_are_named(converted, override, message):
    with pytest.raises(UserError, match=message):
        load_for_inference(converted[0], overrides=[override])


def test_made_up_pca_is_orthonormal(make_tiny_config):
    _, frozen = make_up_codec(make_tiny_config())
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
        state.replace(ema_params=averaged), {"position": 3}, frozen, make_assets(system.config, system.facts)
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
        save_params_only(tmp_path, system.config, system.facts, values, frozen, step)
    flip(largest_file(tmp_path / "checkpoints" / "4" / "params"))
    _, found, _, step = load_for_inference(tmp_path)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert "warning: checkpoint 4 is damaged" in capfd.readouterr().err
    assert latest_step(tmp_path) == 4 and not (tmp_path / "corrupt").exists(), "reading moves nothing"
    with pytest.raises(UserError, match=r"--step=4: .*params.*steps \[2, 4\]"):
        load_for_inference(tmp_path, step=4)


# --- a run's checkpoints, with a small state of every dtype ------------------------------------------


def state_at(step: int) -> TrainState:
    keys = jax.random.split(jax.random.key(step), 3)
    params = {"net": {"kernel": jax.random.normal(keys[0], (24, 16)), "bias": jax.random.normal(keys[1], (16,))}}
    state = create(base(), params, make_optimizer(base()))
    extra = {"half": jax.random.normal(keys[2], (8,), jnp.bfloat16), "flags": jnp.arange(5) % 2 == 0}
    return state.replace(step=jnp.int32(step), ema_params=jax.tree.map(jnp.copy, params), opt_state=(extra, params))


LIKE = jax.eval_shape(lambda: state_at(0))
CODEC = {"components": np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)}


def assets_of(note: str = "") -> dict:
    normalizer = Normalizer({"action": (np.full(4, 0.123456789), np.zeros(4))})
    return make_assets(base(), DataFacts({"wrist": (16, 16)}, {}, 4, 0, normalizer), note=note)


def save_steps(workdir: Path, *steps: int, keep: int | None = None) -> Path:
    checkpoints = Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(state_at(step), {"position": 8 * step, "history": [[0, 1.5]]}, CODEC, assets_of())
    checkpoints.close()
    return workdir


def like() -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), LIKE)


def assert_is_step(state: TrainState, step: int) -> None:
    for found, saved in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        assert found.dtype == saved.dtype
        np.testing.assert_array_equal(found, saved)


def flip(file: Path, at: float = 0.5, bit: int = 4) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    file.write_bytes(bytes(content))


def largest_file(directory: Path) -> Path:
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != "commit_success.txt"]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    return save_steps(tmp_path_factory.mktemp("two") / "run", 2, 4, 6, keep=2)


@pytest.fixture
def workdir(two_steps, tmp_path):
    """A run's directory with checkpoints of steps 4 and 6, to be damaged."""
    return shutil.copytree(two_steps, tmp_path / "run")


def test_the_newest_comes_back_and_old_ones_go(workdir):
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.steps() == [4, 6]
    assert {p.name for p in checkpoints.directory.iterdir()} == {"4", "6"}
    stored = checkpoints.newest_readable()
    assert stored.step == 6 and stored.data_iter == {"position": 48, "history": [[0, 1.5]]}
    np.testing.assert_array_equal(stored.codec["components"], CODEC["components"])
    state, stored = checkpoints.restore_latest(like())
    assert stored.step == 6 and stored.assets["data_facts"]["action_dim"] == 4
    assert_is_step(state, 6)
    checkpoints.save(state_at(8), {"position": 64}, CODEC, assets_of())
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
    state = state_at(3)
    checkpoints.save(state, {}, CODEC, assets_of())
    wipe = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    for _ in range(3):
        state = wipe(state)
    checkpoints.wait()
    assert_is_step(checkpoints.restore_latest(like())[0], 3)
    checkpoints.close()


def files_of(directory: Path) -> list[str]:
    """All kinds of files of a checkpoint; names of data files differ from save to save, so each kind by its largest."""
    kinds: dict[str, Path] = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        kind = str((file.parent if file.parent.name == "d" else file).relative_to(directory))
        if kind not in kinds or file.stat().st_size > kinds[kind].stat().st_size:
            kinds[kind] = file
    return [str(file.relative_to(directory)) for file in kinds.values()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves coroutines behind
def test_no_flipped_bit_goes_unseen(workdir, capfd):
    """Whichever file a bit changes in: the state that comes back is the one that was saved, or the one before."""
    fell_back = set()
    for n, file in enumerate(files_of(workdir / "checkpoints" / "6")):
        damaged = shutil.copytree(workdir, workdir.parent / f"damaged{n}")
        flip(damaged / "checkpoints" / "6" / file, at=(0.5, 0.1, 0.9)[n % 3], bit=n % 8)
        checkpoints = Checkpoints(damaged)
        state, stored = checkpoints.restore_latest(like())
        checkpoints.close()
        assert_is_step(state, stored.step)
        assert stored.data_iter["position"] == 8 * stored.step
        assert stored.assets["data_facts"] == assets_of()["data_facts"]
        np.testing.assert_array_equal(stored.codec["components"], CODEC["components"])
        assert (damaged / "corrupt" / "6").is_dir() == (stored.step == 4)
        if stored.step == 4:
            fell_back.add(Path(file).parts[0])
            assert "warning: checkpoint 6 is damaged" in capfd.readouterr().err
    assert fell_back >= {"params", "ema_params", "train_state", "data_iter", "assets", "codec"}


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path) -> None:
    """Every file of it lost its second half."""
    for file in (p for p in path.rglob("*") if p.is_file()):
        os.truncate(file, file.stat().st_size // 2)


def edit(path: Path) -> None:
    """Valid JSON with one digit changed."""
    file = path / "metadata"
    file.write_text(file.read_text().replace("0.123456789", "0.123456798").replace("48", "49"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves coroutines behind
@pytest.mark.parametrize(
    ("item", "damage"),
    [
        *((item, remove) for item in ("params", "ema_params", "train_state", "data_iter", "assets", "codec")),
        *((item, cut) for item in ("params", "ema_params", "train_state", "data_iter", "assets", "codec")),
        *((item, edit) for item in ("data_iter", "assets")),
        ("params/manifest.ocdbt", remove),
        (".", lambda path: [remove(p) for p in path.iterdir()]),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(workdir, item, damage, capfd):
    damage(workdir / "checkpoints" / "6" / item)
    before = {p for p in (workdir / "checkpoints" / "6").rglob("*")}
    checkpoints = Checkpoints(workdir)
    state, stored = checkpoints.restore_latest(like())
    assert stored.step == 4 and stored.data_iter["position"] == 32
    assert_is_step(state, 4)
    message = capfd.readouterr().err
    assert "warning: checkpoint 6 is damaged" in message and "step 4 is used instead" in message
    assert item.split("/")[0].rstrip(".") in message and "Traceback" not in message
    moved = workdir / "corrupt" / "6"
    assert {moved / p.relative_to(workdir / "checkpoints" / "6") for p in before} == set(moved.rglob("*"))
    assert latest_step(workdir) == 4
    checkpoints.save(state_at(6), {"position": 48}, CODEC, assets_of())  # the run comes by again
    checkpoints.close()
    assert latest_step(workdir) == 6 and checkpoints.steps() == [4, 6]


def test_when_none_is_left_nothing_is_deleted(workdir):
    for step in ("4", "6"):
        flip(largest_file(workdir / "checkpoints" / step / "params"))
    for _ in range(2):  # the second start finds what the first one left
        checkpoints = Checkpoints(workdir)
        with pytest.raises(UserError, match=r"(?s)checkpoints/4.*No other checkpoint .* Nothing was deleted"):
            checkpoints.restore_latest(like())
        checkpoints.close()
        assert latest_step(workdir) == 4 and (workdir / "corrupt" / "6").is_dir()


def test_a_checkpoint_that_does_not_fit_is_not_damaged(workdir):
    wanted = like()
    wanted.params["net"]["bias"] = jax.ShapeDtypeStruct((17,), jnp.float32, sharding=wanted.step.sharding)
    checkpoints = Checkpoints(workdir)
    with pytest.raises(UserError, match=r"params/net/bias is \(16,\) in the checkpoint, but \(17,\)") as e:
        checkpoints.restore_latest(wanted)
    checkpoints.close()
    assert not isinstance(e.value, CorruptCheckpoint)
    assert latest_step(workdir) == 6 and not (workdir / "corrupt").exists()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("RESOURCE_EXHAUSTED: memory")])
def test_what_may_pass_moves_nothing(workdir, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    checkpoints = Checkpoints(workdir)
    with pytest.raises(RunError, match="cannot be read: .*Nothing was changed"):
        checkpoints.restore_latest(like())
    checkpoints.close()
    assert latest_step(workdir) == 6 and not (workdir / "corrupt").exists()


def test_checkpoints_without_digests_still_load(workdir):
    file = workdir / "checkpoints" / "6" / "assets" / "metadata"
    assets = json.loads(file.read_text())
    del assets["digests"]
    file.write_text(json.dumps(assets))
    checkpoints = Checkpoints(workdir)
    state, stored = checkpoints.restore_latest(like())
    checkpoints.close()
    assert stored.step == 6 and stored.codec is not None
    assert_is_step(state, 6)
    shutil.rmtree(workdir / "checkpoints" / "6" / "train_state")
    with pytest.raises(UserError, match="without a training state"):
        Checkpoints(workdir, read_only=True).restore_latest(like())


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
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.check()
    checkpoints.save(state_at(8), {}, CODEC, assets_of())
    with pytest.raises(RunError, match=r"checkpoints/8: .*No space left on device.*continues from step 6"):
        checkpoints.wait()
    for method in (checkpoints.check, lambda: checkpoints.save(state_at(9), {}, CODEC, assets_of())):
        with pytest.raises(RunError, match="checkpoints/8"):
            method()
    checkpoints.close()  # it is known already
    assert checkpoints.steps() == [4, 6], "nothing is deleted for a checkpoint that is not there"
    assert "Traceback" not in capfd.readouterr().err


def test_closing_tells_of_a_failed_save(workdir, full_disk):
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state_at(8), {}, CODEC, assets_of())
    with pytest.raises(RunError, match="checkpoints/8"):
        checkpoints.close()


def test_closing_does_not_hide_another_error(workdir, full_disk, capfd):
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state_at(8), {}, CODEC, assets_of())
    with pytest.raises(ZeroDivisionError):
        try:
            _ = 1 / 0
        finally:
            checkpoints.close()
    assert "warning: " in (message := capfd.readouterr().err) and "No space left on device" in message


def test_a_save_that_cannot_start(workdir):
    checkpoints = Checkpoints(workdir)
    with pytest.raises(RunError, match="checkpoints/6: .*exists"):
        checkpoints.save(state_at(6), {}, CODEC, assets_of())
    checkpoints.close()
    assert checkpoints.steps() == [4, 6]


# --- digests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool", "uint8"])
def test_digests_see_every_change(dtype):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(0, 2, (5, 7, 3)), dtype)
    (digest,) = digests_on_host([values])
    assert digests_on_devices([values]) == [digest]
    flat = values.reshape(-1)
    others = [flat.at[i].set(1 - flat[i].astype("int32")).reshape(values.shape) for i in range(flat.size)]
    others += [jnp.roll(values, 1), values.transpose(2, 1, 0).reshape(values.shape)]
    assert digest not in digests_on_host(others) and digests_on_devices(others) == digests_on_host(others)


def test_digests_of_scalars_and_of_nothing():
    arrays = [jnp.uint32(7), jnp.float32(-0.0), jnp.float32(0.0), jnp.zeros((0, 3))]
    assert digests_on_host(arrays) == digests_on_devices(arrays)
    assert digests_on_host(arrays)[1] != digests_on_host(arrays)[2]
    assert array_digests({}) == {} and list(array_digests({"a": {"b": np.ones(3, np.float32)}})) == ["a/b"]


@pytest.mark.slow
def test_a_checkpoint_continues_on_other_meshes(tmp_path):
    """Saved on 2x2x2 devices, restored on 8, 2 and one: the same arrays, and the digests prove it."""
    program = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t
from uwm_jax.training.stored import array_digests, digests_on_devices

def spread(state, shape, spec):
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)
    return jax.tree.map(lambda x: NamedSharding(mesh, spec if x.ndim == 2 else P()), state)

state = t.state_at(6)
state = jax.device_put(state, spread(state, (2, 2, 2), P("fsdp", "tensor")))
assert array_digests(state) == array_digests(t.state_at(6))
leaves = jax.tree.leaves(state)
assert digests_on_devices(leaves) == digests_on_devices(jax.tree.leaves(t.state_at(6)))
checkpoints = t.Checkpoints(sys.argv[2])
checkpoints.save(state, {"position": 48}, t.CODEC, t.assets_of())
checkpoints.wait()
for shape, spec in (((1, 8, 1), P("fsdp")), ((1, 1, 2), P(None, "tensor")), ((1, 1, 1), P())):
    where = spread(t.LIKE, shape, spec)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), t.LIKE, where)
    found, stored = checkpoints.restore_latest(like)
    assert found.params["net"]["kernel"].sharding == like.params["net"]["kernel"].sharding
    t.assert_is_step(found, 6)
checkpoints.close()
print("all equal")
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "all equal" in result.stdout, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_agree_on_what_is_damaged(tmp_path):
    """Each holds half of every matrix; a bit that changes in one half makes both go back."""
    program = """
import sys, jax, numpy as np
from absl import flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from uwm_jax.parallel import distributed

distributed.define_flags()
argv = ["--" + a[2:].replace("-", "_") if a.startswith("--") else a for a in sys.argv]
_, tests, workdir = flags.FLAGS(argv)
sys.path.insert(0, tests)
import test_checkpoint as t
from uwm_jax.training.stored import array_digests, digests_on_devices

distributed.initialize()
main = distributed.is_main()
mesh = jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

def where(state):
    return jax.tree.map(lambda x: NamedSharding(mesh, P("fsdp") if x.ndim == 2 else P()), state)

def place(state):
    spread = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i])
    return jax.tree.map(spread, state, where(state))

checkpoints = t.Checkpoints(workdir, keep=2)
for step in (2, 4, 6):
    checkpoints.save(place(t.state_at(step)), {"position": 8 * step}, t.CODEC, t.assets_of())
checkpoints.close()
state = place(t.state_at(6))
assert array_digests(state) == array_digests(t.state_at(6))
assert digests_on_devices(jax.tree.leaves(state)) == digests_on_devices(jax.tree.leaves(t.state_at(6)))
distributed.barrier("saved")
if main:
    t.flip(t.largest_file(t.Path(workdir) / "checkpoints" / "6" / "params"))
distributed.barrier("damaged")
checkpoints = t.Checkpoints(workdir, keep=2)
like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), t.LIKE, where(t.LIKE))
state, stored = checkpoints.restore_latest(like)
assert stored.step == 4 and t.latest_step(workdir) == 4
assert array_digests(state) == array_digests(t.state_at(4))
checkpoints.save(state.replace(step=place(t.state_at(6)).step), {"position": 48}, t.CODEC, t.assets_of())
checkpoints.wait()
assert checkpoints.steps() == [4, 6]
checkpoints.close()
distributed.shutdown()
print("all equal")
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "run")]
    with Processes(2, command, one_device(os.environ)) as processes:
        assert processes.wait(300) == [0, 0], processes.lines
    assert all("all equal" in "".join(lines) for lines in processes.lines), processes.lines
