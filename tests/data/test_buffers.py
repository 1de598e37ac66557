"""Memory of batches is used again, and never while anything refers to it."""

from __future__ import annotations

import gc
import threading

import jax
import numpy as np

from uwm_jax.data.buffers import KEPT, WORTH, Buffers

LIKE = {"x": jax.ShapeDtypeStruct((3, WORTH // 4), np.float32), "row": jax.ShapeDtypeStruct((3,), np.int32)}


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    buffers = Buffers()
    first, second = buffers.empty(LIKE), buffers.empty(LIKE)
    assert {key: (x.shape, x.dtype) for key, x in first.items()} == {k: (x.shape, x.dtype) for k, x in LIKE.items()}
    assert not np.shares_memory(first["x"], second["x"])
    place, part = address(first["x"]), first["x"][1, 5:9]
    part[:] = 7
    del first
    assert address(buffers.empty(LIKE)["x"]) != place, "a part of it is in use"
    del part
    assert place in {address(batch["x"]) for batch in [buffers.empty(LIKE) for _ in range(2)]}


def test_an_array_of_jax_keeps_it() -> None:
    buffers = Buffers()
    held = []
    for number in range(6):
        batch = buffers.empty(LIKE)
        batch["x"][:] = number
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        held.append(jax.make_array_from_process_local_data(sharding, batch["x"]))
        del batch
    gc.collect()
    assert [float(x.min()) for x in held] == [float(x.max()) for x in held] == list(range(6))


def test_few_idle_arrays_are_kept() -> None:
    buffers = Buffers()
    many = [buffers.empty(LIKE) for _ in range(KEPT + 3)]
    del many
    assert [len(idle) for idle in buffers._idle.values()] == [KEPT]


def test_all_arrays_of_a_batch_are_kept() -> None:
    """However many have the same size, as the frames of several cameras do."""
    buffers, like = Buffers(), {f"camera_{i}": LIKE["x"] for i in range(KEPT + 2)}
    first = {address(x) for x in buffers.empty(like).values()}
    assert {address(x) for x in buffers.empty(like).values()} == first


def test_an_array_may_die_while_another_is_made() -> None:
    """As where garbage is collected in the middle of it."""
    buffers, batches = Buffers(), []

    def work() -> None:
        batches.append(buffers.empty(LIKE))
        with buffers._lock:
            batches.clear()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive() and sum(map(len, buffers._idle.values())) == 1
