"""Checkpoints that are damaged or do not fit, and the digests that tell, on one mesh and on others."""

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
from tests import quick_compile
from tests.training import small_run
from uwm_jax.errors import RunError, UserError
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.checkpoints.reader import CorruptCheckpoint, array_digests, digests_on_devices, digests_on_host


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
    """A bit changed in any file: the restored state is the one that was saved, or the one before."""
    fell_back = set()
    for n, file in enumerate(files_of(workdir / "checkpoints" / "6")):
        damaged = shutil.copytree(workdir, workdir.parent / f"damaged{n}")
        small_run.flip(damaged / "checkpoints" / "6" / file, at=(0.5, 0.1, 0.9)[n % 3], bit=n % 8)
        checkpoints = Checkpoints(damaged)
        state, stored = checkpoints.restore_latest(small_run.like())
        checkpoints.close()
        small_run.assert_is_step(state, stored.step)
        assert stored.data_iter["position"] == 8 * stored.step
        assert stored.assets["data_spec"] == small_run.assets_of()["data_spec"]
        np.testing.assert_array_equal(stored.codec["components"], small_run.CODEC["components"])
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
    state, stored = checkpoints.restore_latest(small_run.like())
    assert stored.step == 4 and stored.data_iter["position"] == 32
    small_run.assert_is_step(state, 4)
    message = capfd.readouterr().err
    assert "warning: checkpoint 6 is damaged" in message and "step 4 is used instead" in message
    assert item.split("/")[0].rstrip(".") in message and "Traceback" not in message
    moved = workdir / "corrupt" / "6"
    assert {moved / p.relative_to(workdir / "checkpoints" / "6") for p in before} == set(moved.rglob("*"))
    assert latest_step(workdir) == 4
    again = small_run.state_at(6)  # the run comes by again
    checkpoints.save(again, {"position": 48}, small_run.CODEC, small_run.assets_of())
    checkpoints.close()
    assert latest_step(workdir) == 6 and checkpoints.steps() == [4, 6]


def test_when_none_is_left_nothing_is_deleted(workdir):
    for step in ("4", "6"):
        small_run.flip(small_run.largest_file(workdir / "checkpoints" / step / "params"))
    for _ in range(2):  # the second start finds what the first one left
        checkpoints = Checkpoints(workdir)
        with pytest.raises(UserError, match=r"(?s)checkpoints/4.*No other checkpoint .* Nothing was deleted"):
            checkpoints.restore_latest(small_run.like())
        checkpoints.close()
        assert latest_step(workdir) == 4 and (workdir / "corrupt" / "6").is_dir()


def test_a_checkpoint_that_does_not_fit_is_not_damaged(workdir):
    wanted = small_run.like()
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
        checkpoints.restore_latest(small_run.like())
    checkpoints.close()
    assert latest_step(workdir) == 6 and not (workdir / "corrupt").exists()


def test_checkpoints_without_digests_still_load(workdir):
    file = workdir / "checkpoints" / "6" / "assets" / "metadata"
    assets = json.loads(file.read_text())
    del assets["digests"]
    file.write_text(json.dumps(assets))
    checkpoints = Checkpoints(workdir)
    state, stored = checkpoints.restore_latest(small_run.like())
    checkpoints.close()
    assert stored.step == 6 and stored.codec is not None
    small_run.assert_is_step(state, 6)
    shutil.rmtree(workdir / "checkpoints" / "6" / "train_state")
    with pytest.raises(UserError, match="without a training state"):
        Checkpoints(workdir, read_only=True).restore_latest(small_run.like())


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
from tests.training import small_run as t
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.reader import array_digests, digests_on_devices

def spread(state, shape, spec):
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)
    return jax.tree.map(lambda x: NamedSharding(mesh, spec if x.ndim == 2 else P()), state)

state = t.state_at(6)
state = jax.device_put(state, spread(state, (2, 2, 2), P("fsdp", "tensor")))
assert array_digests(state) == array_digests(t.state_at(6))
leaves = jax.tree.leaves(state)
assert digests_on_devices(leaves) == digests_on_devices(jax.tree.leaves(t.state_at(6)))
checkpoints = Checkpoints(sys.argv[2])
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
    environment = os.environ | {"XLA_FLAGS": quick_compile.with_devices(8)}
    command = [sys.executable, "-c", program, str(Path(__file__).parents[2]), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "all equal" in result.stdout, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_agree_on_what_is_damaged(tmp_path):
    """Each holds half of every matrix; a bit that changes in one half makes both go back."""
    program = """
import sys, jax, numpy as np
from pathlib import Path
from absl import flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from uwm_jax.parallel import distributed

distributed.define_flags()
argv = ["--" + a[2:].replace("-", "_") if a.startswith("--") else a for a in sys.argv]
_, root, workdir = flags.FLAGS(argv)
sys.path.insert(0, root)
from tests.training import small_run as t
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.checkpoints.retention import Retention
from uwm_jax.training.checkpoints.reader import array_digests, digests_on_devices

distributed.initialize()
main = distributed.is_main()
mesh = jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

def where(state):
    return jax.tree.map(lambda x: NamedSharding(mesh, P("fsdp") if x.ndim == 2 else P()), state)

def place(state):
    spread = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i])
    return jax.tree.map(spread, state, where(state))

checkpoints = Checkpoints(workdir, Retention(2))
for step in (2, 4, 6):
    checkpoints.save(place(t.state_at(step)), {"position": 8 * step}, t.CODEC, t.assets_of())
checkpoints.close()
state = place(t.state_at(6))
assert array_digests(state) == array_digests(t.state_at(6))
assert digests_on_devices(jax.tree.leaves(state)) == digests_on_devices(jax.tree.leaves(t.state_at(6)))
distributed.barrier("saved")
if main:
    t.flip(t.largest_file(Path(workdir) / "checkpoints" / "6" / "params"))
distributed.barrier("damaged")
checkpoints = Checkpoints(workdir, Retention(2))
like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), t.LIKE, where(t.LIKE))
state, stored = checkpoints.restore_latest(like)
assert stored.step == 4 and latest_step(workdir) == 4
assert array_digests(state) == array_digests(t.state_at(4))
checkpoints.save(state.replace(step=place(t.state_at(6)).step), {"position": 48}, t.CODEC, t.assets_of())
checkpoints.wait()
assert checkpoints.steps() == [4, 6]
checkpoints.close()
distributed.shutdown()
print("all equal")
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parents[2]), str(tmp_path / "run")]
    with Processes(2, command, one_device(os.environ)) as processes:
        assert processes.wait(300) == [0, 0], processes.lines
    assert all("all equal" in "".join(lines) for lines in processes.lines), processes.lines
