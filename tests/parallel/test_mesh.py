from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from uwm_jax.config import base
from uwm_jax.errors import UserError
from uwm_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"
    slice_index: int | None = None


def config(batch_size=64, accumulation_steps=1, **sizes):
    c = base()
    c.batch_size, c.accumulation_steps = batch_size, accumulation_steps
    c.mesh.update(sizes)
    return c


def devices(count):
    return [Device(i) for i in range(count)]


def test_rest_of_the_devices_goes_to_data():
    for sizes, shape in (
        ({}, (8, 1, 1)),
        ({"fsdp": 8}, (1, 8, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "tensor": 4}, (2, 1, 4)),
    ):
        mesh = mesh_lib.make_mesh(config(**sizes), devices(8))
        assert (tuple(mesh.shape), mesh.devices.shape) == (("data", "fsdp", "tensor"), shape)


def test_default_is_every_device_of_the_run():
    mesh = mesh_lib.make_mesh(config())
    assert list(mesh.devices.flat) == jax.devices()
    assert mesh_lib.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    assert mesh_lib.replicated(mesh).spec == PartitionSpec()
    assert mesh_lib.data_group(mesh) == (0, 1)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 4}, r"config.mesh.data=4, .* does not fit the 8 cpu device.*set config.mesh.data to 8"),
        ({"data": 16}, r"does not fit the 8"),
        ({"fsdp": 3}, r"config.mesh.fsdp=3.* does not fit the 8 .*product, 3 now, divides 8"),
        ({"fsdp": 4, "tensor": 4}, r"product, 16 now, divides 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        mesh_lib.make_mesh(config(**sizes), devices(8))


@pytest.mark.parametrize("error", [NotImplementedError("Failed to find assignment for axis 0"), ValueError()])
def test_sizes_that_the_links_do_not_allow_are_refused(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(mesh_lib.mesh_utils, "create_device_mesh", fail)
    message = rf"config.mesh.data=-1, config.mesh.fsdp=2, .* links .*\({str(error) or 'ValueError'}\): choose sizes of"
    with pytest.raises(UserError, match=message):
        mesh_lib.make_mesh(config(fsdp=2), devices(8))


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(
        UserError, match=r"config.batch_size=36 .* 8 devices: the nearest that do are 32 and 40; 36 .* at most 4"
    ):
        mesh_lib.make_mesh(config(36, fsdp=2), devices(8))
    with pytest.raises(
        UserError, match=r"config.batch_size=24 .* config.accumulation_steps=2 parts: .* 16 and 32; 24 rows"
    ):
        mesh_lib.make_mesh(config(24, accumulation_steps=2), devices(8))
    mesh_lib.make_mesh(config(36, tensor=2), devices(8))  # the rows run over 4 only


# --- slices -----------------------------------------------------------------------------------------------


def in_slices(*sizes, **kind):
    """Devices of slices of these sizes, in an order that mixes the slices."""
    found = [Device(s * 100 + i, slice_index=s, **kind) for s, size in enumerate(sizes) for i in range(size)]
    return sorted(found, key=lambda device: device.id % 100)


def in_processes(*sizes):
    return [Device(p * 10 + i, process_index=p) for p, size in enumerate(sizes) for i in range(size)]


def test_slices_are_blocks_along_data():
    mesh = mesh_lib.make_mesh(config(slices=2, fsdp=2), in_slices(4, 4))
    assert mesh.devices.shape == (4, 2, 1)
    assert [[d.slice_index for d in line.flat] for line in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert len({device.id for device in mesh.devices.flat}) == 8
    # where the platform knows of no slices, a process is one
    mesh = mesh_lib.make_mesh(config(slices=2, tensor=2), in_processes(4, 4))
    assert [[d.process_index for d in line.flat] for line in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    # which it need not be
    assert mesh_lib.make_mesh(config(fsdp=8), in_processes(4, 4)).devices.shape == (1, 8, 1)


@pytest.mark.parametrize(
    ("sizes", "found", "message"),
    [
        (
            {"slices": 2},
            devices(8),
            r"slices=2 .* 8 cpu .* 1 slice\(s\) of 8 \(processes\): set config.mesh.slices to 1",
        ),
        ({}, in_slices(4, 4, platform="tpu"), r"slices=1 .* 8 tpu .* 2 slice\(s\) of 4: set config.mesh.slices to 2"),
        ({"slices": 3}, in_slices(4, 4), r"slices=3 .* 2 slice\(s\) of 4: set config.mesh.slices to 2"),
        ({"slices": 2}, in_slices(5, 3), r"slices=2 .* 2 slice\(s\) of 3 and 5: start the run on slices of equal size"),
        (
            {"slices": 2, "fsdp": 8},
            in_slices(4, 4),
            r"slices=2 does not divide the 1 .* 8 now, divides the 4 devices of",
        ),
    ],
)
def test_slices_that_do_not_fit_are_refused(sizes, found, message):
    with pytest.raises(UserError, match=message):
        mesh_lib.make_mesh(config(**sizes), found)


def groups(shape, per_process):
    """(index, count) of every process of a mesh in the order of the device numbers."""
    count = int(np.prod(shape))
    grid = np.array([Device(i, i // per_process) for i in range(count)], dtype=object).reshape(shape)
    return [mesh_lib._data_group(grid, process) for process in range(count // per_process)]


def test_processes_that_hold_the_same_rows_load_the_same_share():
    assert groups((8, 1, 1), 2) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert groups((2, 2, 2), 2) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert groups((2, 1, 4), 2) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert groups((1, 1, 4), 1) == [(0, 1)] * 4
    # rows of a process need not be neighbours, as long as nobody has a part of them
    interleaved = np.array([Device(0, 0), Device(1, 1), Device(2, 0), Device(3, 1)], dtype=object).reshape(4, 1, 1)
    assert [mesh_lib._data_group(interleaved, p) for p in (0, 1)] == [(0, 2), (1, 2)]


def test_rows_that_overlap_in_part_are_refused():
    with pytest.raises(UserError, match="config.mesh.tensor=2.* overlap only in part"):
        groups((3, 1, 2), 3)


def test_members_of_a_sweep_have_an_axis_of_their_own():
    def shape(members, asked=-1, **sizes):
        c = config(**sizes)
        c.sweep.devices = asked
        return tuple(mesh_lib.make_mesh(c, devices(8), members).shape.values())

    assert tuple(mesh_lib.make_mesh(config(), devices(8), 8).shape) == ("sweep", "data", "fsdp", "tensor")
    assert shape(8) == (8, 1, 1, 1)
    assert shape(6) == (2, 4, 1, 1)
    assert shape(4, fsdp=4) == (2, 1, 4, 1)
    assert shape(3) == (1, 8, 1, 1)
    assert shape(8, asked=2, tensor=2) == (2, 2, 1, 2)
    assert shape(4, data=8) == (1, 8, 1, 1)
    with pytest.raises(UserError, match=r"config.sweep.devices=4 must divide the 6 members .*set it to 2"):
        shape(6, asked=4)
    with pytest.raises(UserError, match=r"does not fit the 2 cpu .* for each of config.sweep.devices=4"):
        shape(4, asked=4, fsdp=4)


def test_processes_with_other_members_load_the_same_rows():
    assert groups((2, 2, 1, 1), 2) == [(0, 1), (0, 1)]
    assert groups((2, 2, 1, 2), 2) == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert groups((1, 4, 1, 1), 2) == [(0, 2), (1, 2)]


def test_the_nearest_batches_that_divide_and_the_devices_that_one_can_use():
    droid = config(144)
    with pytest.raises(UserError, match="the nearest that do are 256; 144 rows can use at most 16 of the 256 devices"):
        mesh_lib.find_sizes(droid, 256, "TPU")
    assert mesh_lib.find_sizes(droid, 16, "TPU") == (1, 16, 1, 1)
    parts = config(36, accumulation_steps=2)
    message = "in config.accumulation_steps=2 parts: .* are 32 and 64; 36 rows .* at most 2 of"
    with pytest.raises(UserError, match=message):
        mesh_lib.find_sizes(parts, 16, "TPU")
    with pytest.raises(UserError, match="2 devices for each of config.sweep.devices=4: .* are 2 and 4"):
        mesh_lib.find_sizes(config(3), 8, "TPU", members=4)
