"""The command of sweeps around their training, which does not happen here."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import sweep
from uwm_jax import cli
from uwm_jax import config as config_lib
from uwm_jax.errors import Preempted, UserError
from uwm_jax.reporting import sweep_page
from uwm_jax.sweeps import record, run
from uwm_jax.train import train

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """A function that runs a sweep of two groups, each of which ends so; returns (status, stdout, stderr)."""

    def start(end) -> tuple[int, str, str]:
        monkeypatch.setattr(run, "run_group", end)
        flags = [f"--config={CONFIG}", "--grid=seed=0,1", "--grid=batch_size=2,4", f"--workdir={tmp_path / 'sweep'}"]
        status = cli.call(sweep.main, ["sweep", *flags], sweep.define_flags)
        return status, *capsys.readouterr()

    return start


def diverge(places, record_of_all, *_):
    for place in places:
        record_of_all.set(place.name, record.DIVERGED, step=3)


def be_told_to_end(places, record_of_all, *_):
    record_of_all.set(places[0].name, record.TRAINING, step=5)
    raise Preempted("SIGTERM")


def test_the_page_is_written_after_each_group_even_if_all_of_it_has_diverged(call, tmp_path):
    status, out, err = call(diverge)
    assert status == 1 and "4 of 4 members have diverged" in err
    assert out.count(f"wrote {tmp_path / 'sweep' / 'sweep.html'}") == 2
    assert (tmp_path / "sweep" / "sweep.html").read_text().count("diverged at step 3") == 4


def test_the_page_is_written_where_the_sweep_is_told_to_end(call, tmp_path):
    assert call(be_told_to_end)[0] == 143
    source = (tmp_path / "sweep" / "sweep.html").read_text()
    assert source.count("stopped at step 5") == 1 and source.count("waits for its turn") == 3


def test_a_page_that_cannot_be_drawn_ends_no_sweep(call, monkeypatch):
    def fail(directory):
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(sweep_page, "write", fail)
    status, _, err = call(lambda *_: None)
    assert status == 0 and err.count("sweep.html was not written: by chance") == 2


def test_no_run_trains_in_the_directory_of_a_sweep(call, tmp_path):
    call(lambda *_: None)
    with pytest.raises(UserError, match=r"holds a sweep, not a run.*seed=0,batch_size=2"):
        train(config_lib.load(str(CONFIG)), tmp_path / "sweep")
