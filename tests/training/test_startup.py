"""The seconds of a start by part, and what a start leaves out."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest

from uwm_jax.training import startup
from uwm_jax.training.startup import PARTS, Startup, read_summary


@pytest.fixture
def clock(monkeypatch):
    """A function that moves the clock forward."""
    now = [100.0]
    monkeypatch.setattr(startup.time, "perf_counter", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


def test_every_second_since_the_command_has_one_part(clock):
    clock(-0.5)
    start = Startup(began=(97.25, 99.0))  # half a second ago imports were done
    for seconds, part in zip((1.0, 2.0, 4.0, 8.0, 16.0), PARTS[2:], strict=True):
        clock(seconds)
        start.reached(part)
    clock(32.0)
    line = start.summary({"loss": np.zeros(())})
    parts = dict(zip(PARTS, (1.75, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0), strict=True))
    assert read_summary(line) == {**parts, "xla": 0.0}
    assert line.startswith(f"first step after {sum(parts.values()):.2f} s: imports 1.75, config 1.50, ")


def test_a_call_from_python_starts_the_clock(clock):
    start = Startup()
    clock(2.0)
    start.reached("step")
    clock(1.0)
    parts = read_summary(start.summary(()))
    assert parts == {**dict.fromkeys(PARTS, 0.0), "config": 2.0, "step": 1.0, "xla": 0.0}


def test_programs_are_counted_with_the_time_that_they_took():
    start = Startup()
    for number in range(3):
        jax.jit(lambda x, n=number: x * n + 1.5).lower(jax.ShapeDtypeStruct((number + 2,), np.float32)).compile()
    line = start.summary(())
    assert line.endswith(" for 3 programs") and 0 < read_summary(line)["xla"] <= read_summary(line)["config"]


def test_other_lines_are_no_summary():
    for line in ("", "step 1/2  loss 1.2", "compiling the step..."):
        assert read_summary(line) is None


def test_what_a_run_does_not_need_is_not_imported():
    """Packages that take long, or that bring torch or TensorFlow along where these are installed."""
    late = ("torch", "tensorflow", "tensorboard", "tensorboardX", "tensorflow_datasets", "matplotlib", "scipy.special")
    program = f"import sys, uwm_jax.train\nprint(*[name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
