"""Bounds and estimates against arithmetic by hand."""

from __future__ import annotations

import pytest

from tests.planning.facts import facts
from uwm_jax.planning import bounds, topology

V5E = topology.find("v5e-16")


def test_the_largest_part_is_the_bound_and_the_parts_of_the_estimate_are_summed():
    found = bounds.times(facts(), V5E)
    sent = 2 * (2 * 10**8 + 10**7 + 1)
    assert found["step_seconds_lower_bound/compute"] == pytest.approx(2.0 / 16)
    assert found["step_seconds_lower_bound/memory"] == pytest.approx(0.1)
    assert found["step_seconds_lower_bound/interconnect"] == pytest.approx(sent / (3 * 50e9))  # 24 links of 16 chips
    assert found["step_seconds_lower_bound/dcn"] == 0.0
    assert found["step_seconds_lower_bound"] == pytest.approx(2.0 / 16)
    # What runs next to other work costs no time of its own.
    waits = 4 * 10**8 / (3 * 50e9)
    assert found["step_seconds_estimate/cycles"] == pytest.approx(0.3)
    assert found["step_seconds_estimate"] == pytest.approx(0.3 + waits)


def test_slices_exchange_over_the_data_centre_network():
    between = {"kind": "all-reduce", "axes": ["dcn"], "bytes": 10**8, "sent_bytes": 10**8, "asynchronous": True}
    found = bounds.times(facts(collectives=[between]), topology.find("2xv5e-16"))
    seconds = 10**8 / (200e9 / 8 / 8)  # 2 x 100 Gb/s for 8 chips
    assert found["step_seconds_lower_bound/interconnect"] == 0.0
    assert found["step_seconds_lower_bound/dcn"] == pytest.approx(seconds)
    assert found["step_seconds_estimate"] == pytest.approx(0.3 + seconds)


def test_one_chip_has_no_links():
    assert bounds.times(facts(collectives=[], chips=1), topology.find("v5e-1"))["step_seconds_estimate"] == 0.3


def test_devices_of_this_machine_have_the_bounds_that_are_known():
    found = bounds.times(facts(device_kind="cpu", seconds_at_peak=None, hbm_bytes=None, cycles=None), None)
    assert found["step_seconds_lower_bound"] is None and found["step_seconds_estimate"] is None
    found = bounds.times(facts(device_kind="NVIDIA H200", hbm_bytes=None, cycles=None), None)
    assert found["step_seconds_lower_bound"] == 2.0 / 16


def test_days_and_costs():
    found = bounds.outlook(0.5, rows=100, steps=2 * 86_400, chips=16, price=1.5)
    assert found == {"samples_per_second": 200.0, "days": 1.0, "cost": 24 * 16 * 1.5}
    assert bounds.outlook(0.5, rows=100, steps=10, chips=16, price=None)["cost"] is None
    assert set(bounds.outlook(None, rows=1, steps=1, chips=1, price=1.0).values()) == {None}
