"""--profile=START:STEPS."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from uwm_jax import files
from uwm_jax.errors import UserError
from uwm_jax.parallel import distributed
from uwm_jax.training.profile import Profile


def test_a_trace_is_written(tmp_path, capsys):
    profile = Profile.parse("2:1", tmp_path, start_step=0, total_steps=3)
    x, step = jnp.ones((4, 4)), jax.jit(lambda x: x @ x / 4)
    for i in range(1, 4):
        with profile.step(i, x):
            x = step(x)
    profile.close()
    (file,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert "steps 2 to 2" in capsys.readouterr().out
    assert steps_of(file) == [("train", 2)]


def steps_of(file):
    """(name, number) of the steps that a trace marks."""
    events = (e for p in ProfileData.from_file(str(file)).planes for line in p.lines for e in line.events)
    marked = [(e.name, dict(e.stats)) for e in events]
    return [(name, stats["step_num"]) for name, stats in marked if "step_num" in stats]


def test_a_trace_of_a_run_in_a_bucket_is_uploaded(bucket, capsys, monkeypatch):
    folders = []

    def start(directory):
        assert "://" not in directory, "the profiler writes local files alone"
        folders.append(Path(directory))

    def stop():
        (folders[-1] / "plugins").mkdir()
        (folders[-1] / "plugins" / "host.xplane.pb").write_bytes(b"trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    profile = Profile.parse("2:2", files.as_place(bucket), start_step=0, total_steps=6)
    for step in range(1, 7):
        with profile.step(step, 0):
            pass
    profile.close()
    assert (files.as_place(bucket) / "profile" / "plugins" / "host.xplane.pb").read_bytes() == b"trace"
    assert f"profile: steps 2 to 3 in {bucket}/profile\n" in capsys.readouterr().out
    assert not folders[0].exists(), "nothing stays on this disk"


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_written_is_told_and_ends_nothing(tmp_path, calls, capsys, monkeypatch, fails):
    def fail(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(jax.profiler, fails, fail)
    run(Profile.parse("12:2", tmp_path, 10, 20), calls, range(11, 17))
    assert [c for c in calls if isinstance(c, int)] == list(range(11, 17))
    said = capsys.readouterr()
    assert said.err.count("warning: ") == 1 and f"{tmp_path / 'profile'}" in said.err and "No space" in said.err
    assert "profile: steps" not in said.out


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: seen.append(f"wait {x}"))
    return seen


def run(profile, calls, steps):
    for step in steps:
        with profile.step(step, f"step {step - 1}"):
            calls.append(step)
    profile.close()


def test_the_trace_holds_whole_steps(tmp_path, calls):
    run(Profile.parse("12:2", tmp_path, 10, 20), calls, range(11, 16))
    assert calls == [11, "wait step 11", "start", 12, 13, "wait step 13", "stop", 14, 15]


def test_a_trace_of_the_last_steps_ends_with_the_run(tmp_path, calls):
    run(Profile.parse("19:2", tmp_path, 10, 20), calls, range(18, 21))
    assert calls == [18, "wait step 18", "start", 19, 20, "stop"]


def test_a_trace_that_is_cut_short_names_the_steps_it_holds(tmp_path, calls, capsys):
    run(Profile.parse("12:3", tmp_path, 10, 20), calls, range(11, 13))
    assert calls == [11, "wait step 11", "start", 12, "stop"]
    assert "profile: steps 12 to 12 in " in capsys.readouterr().out


def test_only_the_main_process_tells(tmp_path, calls, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    run(Profile.parse("12:1", tmp_path, 10, 20), calls, range(11, 14))
    Profile.parse("10:5", tmp_path, 10, 20)
    assert "start" in calls and capsys.readouterr().out == ""


@pytest.mark.parametrize("text", [None, ""])
def test_no_flag_no_trace(tmp_path, calls, text):
    run(Profile.parse(text, tmp_path, 0, 3), calls, range(1, 4))
    assert calls == [1, 2, 3] and not (tmp_path / "profile").exists()


@pytest.mark.parametrize("text", ["5", "a:b", "5:", ":5", "5:0", "0:5", "-1:5", "1:2:3"])
def test_another_form_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="expected START:STEPS"):
        Profile.parse(text, tmp_path, 0, 100)


@pytest.mark.parametrize("text", ["18:4", "30:1"])
def test_steps_after_the_end_are_refused(tmp_path, text):
    with pytest.raises(UserError, match="ends with step 20"):
        Profile.parse(text, tmp_path, 10, 20)


def test_steps_behind_the_start_are_no_error(tmp_path, calls, capsys):
    run(Profile.parse("10:5", tmp_path, 10, 20), calls, range(11, 14))
    assert calls == [11, 12, 13] and "continues after step 10" in capsys.readouterr().out
