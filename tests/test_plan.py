"""The command from end to end, on the devices of this machine."""

from __future__ import annotations

import json
import re
import sys

import pytest

from uwm_jax import cli, plan
from uwm_jax import config as config_lib

LINES = """
import json
from uwm_jax.config import from_dict

def get_config():
    return from_dict(json.loads({config!r}), "")
"""


@pytest.fixture
def file(tiny_config, tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(LINES.format(config=config_lib.to_json(tiny_config)))
    return path


def call(*flags):
    return cli.call(plan.main, ["plan", *map(str, flags)], plan.define_flags)


@pytest.mark.slow
def test_a_step_is_planned_and_measured_here(file, tmp_path, capsys):
    output = tmp_path / "rows.json"
    flags = ("--config.eval.every=3", "--config.batch_size=1024", f"--json={output}", "--price=2")
    assert call(f"--config={file}", "--measure", *flags) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(output.read_text())
    assert row["topology"] == "here" and row["chip"] == "cpu" and row["failure"] is None
    assert row["evaluation_hbm_bytes"] > row["parameter_bytes"] + row["optimizer_bytes"]
    assert row["measured/step_seconds"] > 0 and "measured on this machine (cpu)" in printed
    if sys.platform == "linux":
        # What convolutions take inside of XLA's operations is not in the plan.
        assert 0.5 < row["measured/measured_bytes"] / row["measured/planned_bytes"] < 6
    assert f"sizes from the dataset {row['data'].removeprefix('the dataset ')}" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--topology is required"),
        (("--topology=,",), "--topology: expected at least one name"),
        (("--topology=v5e-16", "--efficiency=5"), "efficiency"),
        (("--topology=v5e-17",), "--topology=v5e-17: expected names such as"),
        (("--measure", "--topology=v5e-16"), "--measure runs on the devices of this machine: add here"),
        (("--search", "--topology=here"), "--search requires topologies of TPUs"),
        (("--topology=v5e-16", "--price=-1"), "price"),
        (("--topology=v5e-16", "--sizes=wrist"), "--sizes=wrist: expected KEY=HEIGHTxWIDTH"),
        (("--topology=v5e-16", "--json=/dev/null/rows.json"), "--json: cannot write"),
    ],
)
def test_unusable_flags(file, flags, message, capsys):
    assert call(f"--config={file}", *flags) == 2
    assert message in capsys.readouterr().err


def test_sizes_that_are_missing_are_asked_for_with_a_flag_that_can_be_copied(file, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(plan, "plan", lambda name, config, question: asked.append(question) or [])
    monkeypatch.setattr(plan, "table", lambda rows: "")
    flags = (f"--config={file}", "--topology=here", "--config.data.path=absent")
    assert call(*flags) == 2
    (flag,) = re.findall(r"--sizes=\S+", capsys.readouterr().err)
    assert call(*flags, flag) == 0 and asked[0].data.origin.startswith("--sizes")


def test_each_program_of_a_sweep_is_planned(file, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(plan, "plan", lambda name, config, question: asked.append((config, question)) or [])
    monkeypatch.setattr(plan, "table", lambda rows: "")
    grid = ("--grid=loss.weights.action=1,5", "--grid=seed=0,1,2")
    assert call(f"--config={file}", "--topology=here", *grid) == 0
    assert asked[0][1].members == 6 and "6 members in 1 program(s)" in capsys.readouterr().err
    assert call(f"--config={file}", "--topology=here", *grid, "--grid=model.depth=2,3") == 0
    assert [(c.model.depth, q.members, q.program, q.programs) for c, q in asked[1:]] == [(2, 6, 1, 2), (3, 6, 2, 2)]
    assert asked[2][1].names[0] == "action=1,seed=0,depth=3"
    file.write_text(file.read_text() + "\n\ndef get_members():\n    return [{'seed': 1}, {'seed': 2}]\n")
    assert call(f"--config={file}", "--topology=here") == 0
    assert asked[3][1].members == 2
    file.write_text(file.read_text().replace("{'seed': 2}", "{2: 3}"))
    assert call(f"--config={file}", "--topology=here") == 2
    assert "get_members of" in capsys.readouterr().err
    file.write_text(file.read_text().replace("{2: 3}", "{'seed': 2}"))
    assert call(f"--config={file}", "--topology=v5e-4", "--search") == 2
    assert "--search tries meshes of single runs" in capsys.readouterr().err


def test_without_libtpu_a_line_says_how_to_get_it(file, monkeypatch, capsys):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert call(f"--config={file}", "--topology=v5e-16") == 2
    assert "libtpu is not installed: `pip install 'uwm-jax[plan]'`" in capsys.readouterr().err


def test_what_cannot_be_run_is_a_row_and_nothing_is_compiled(file, tmp_path, capsys):
    output = tmp_path / "rows.json"
    assert call(f"--config={file}", "--topology=v5e-16,2xv5e-4", "--config.batch_size=12", f"--json={output}") == 0
    rows = json.loads(output.read_text())
    assert [row["failure_kind"] for row in rows] == ["config", "config"]
    assert "12 rows can use at most 4 of the 16 devices" in rows[0]["failure"]
    assert "v5e-16 (predicted, never run" in capsys.readouterr().out
