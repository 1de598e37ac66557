"""Items that a thread makes ahead, and what becomes of one that never comes."""

from __future__ import annotations

import threading
import time

import jax
import numpy as np
import pytest

from uwm_jax.data.loader import prefetch_to_device
from uwm_jax.errors import UserError
from uwm_jax.parallel import ahead
from uwm_jax.parallel.ahead import Ahead


def test_errors_and_the_end_come_in_their_place():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def failing():
        yield {"x": np.zeros(2)}
        raise UserError("shard 3 is damaged")

    batches = prefetch_to_device(failing(), sharding, 4)
    assert batches.ready(10) and batches.error is None
    next(batches)
    assert batches.ready(10) and "shard 3" in str(batches.error)
    for _ in range(2):
        with pytest.raises(UserError, match="shard 3 is damaged"):
            next(batches)
    numbers = Ahead(iter([1, 2, 3]))
    assert list(numbers) == [1, 2, 3] and numbers.error is None


def test_nobody_waits_for_an_item_that_hangs(monkeypatch):
    monkeypatch.setattr(ahead, "CLOSE_SECONDS", 0.1)
    hangs, began = threading.Event(), time.monotonic()

    def items():
        yield 1
        hangs.wait()

    numbers = Ahead(items(), 2)
    try:
        assert next(numbers) == 1
        assert not numbers.ready(0.05) and numbers.error is None
        numbers.close()
        assert time.monotonic() - began < 5
        with pytest.raises(StopIteration):
            next(numbers)
    finally:
        hangs.set()


def test_no_more_than_asked_for_is_made_ahead():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    numbers = Ahead(items(), 3)
    for taken in range(5):
        deadline = time.monotonic() + 10
        while len(made) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(made) == taken + 3
        next(numbers)
    numbers.close()
