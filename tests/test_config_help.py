"""`--help` lists every config field with the comment that stands next to it in the source."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from absl.flags import FLAGS
from ml_collections import ConfigDict

from uwm_jax import cli, config_help, systems, train
from uwm_jax import config as config_lib

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.py")

SCHEMA = """
from ml_collections import ConfigDict


def add_network(m):
    m.depth = 2  # number of blocks
    for name in ("height", "width"):
        m[name] = 4  # pixels


def make():
    c = ConfigDict()
    c.first = 1  # at the end # of the line
    # Above the statement,
    # on two lines
    c.second = (
        1,
        2,  # and inside it
    )
    # A comment that an empty line separates belongs to nothing.

    c.silent = 0
    c.model = ConfigDict()
    add_network(c.model)
    c.weights = ConfigDict({"a": 1.0, "b": 2.0})  # of each part
    c.weights.b = 3.0  # of the last part
    c.first = 2
    return c
"""


def test_the_comments_of_a_schema_are_the_meanings_of_its_fields(tmp_path):
    file = tmp_path / "schema.py"
    file.write_text(SCHEMA)
    spec = importlib.util.spec_from_file_location("schema", file)
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    assert config_help.meanings(schema.make) == {
        "first": "at the end # of the line",
        "second": "Above the statement, on two lines and inside it",
        "silent": "",
        "model.depth": "number of blocks",
        "model.height": "pixels",
        "model.width": "pixels",
        "weights.a": "of each part",
        "weights.b": "of the last part",
    }


@pytest.mark.parametrize("make", [config_lib.source, *(functools.partial(config_lib.base, n) for n in systems.names())])
def test_no_field_lacks_a_meaning(make):
    found = config_help.meanings(make)
    groups = {"data.sources", "data.choices", "choices"}  # without fields of their own
    assert found.keys() - groups == config_lib.flatten(make()).keys()
    assert [name for name, text in found.items() if len(text) < 10] == []


def test_the_fields_of_a_config_are_listed_with_its_values():
    lines = config_help.describe(QUICKSTART, [("batch_size", "8")])
    shown = {name: value for line in lines if (m := re.match(r"  (\S+) = (.*)", line)) for name, value in [m.groups()]}
    config = config_lib.load(QUICKSTART, [("batch_size", "8")])
    expected = {name: repr(value) for name, value in config_lib.flatten(config).items()}
    of_source = {f"data.sources.NAME.{name}": repr(v) for name, v in config_lib.flatten(config_lib.source()).items()}
    groups = {"data.choices": "{}", "data.sources.NAME.choices": "{}"}  # without fields of their own
    assert shown == expected | of_source | groups and shown["batch_size"] == "8"
    at = next(i for i, line in enumerate(lines) if line.startswith("  data.crop = "))
    assert "(height, width) of the crop" in lines[at + 1]
    assert max(len(line) for line in lines if line.startswith("      ")) <= config_help.WIDTH


def test_a_mixture_lists_its_sources(tmp_path):
    file = tmp_path / "mixture.py"
    file.write_text(
        "from uwm_jax.config import base, source\n\n\ndef get_config():\n    c = base()\n"
        "    c.data.sources.robot = source(weight=0.5)  # not the field's meaning\n    return c\n"
    )
    text = "\n".join(config_help.describe(str(file), []))
    assert "  data.sources.robot.weight = 0.5\n      share of the samples" in text
    assert "NAME" not in text and "not the field's meaning" not in text


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], "batch_size = 36"),
        ([f"--config={QUICKSTART}"], "batch_size = 32"),
        (["--config", QUICKSTART, "--config.batch_size=3"], "batch_size = 3"),
        ([f"--config={QUICKSTART}", "--unknown=3"], "batch_size = 32"),
    ],
)
def test_help_of_a_command_lists_fields_after_flags(flags, shown, capsys):
    assert cli.call(train.main, ["train", "--help", *flags], train.define_flags) == 0
    flag_help, fields = capsys.readouterr().out.split("Config fields, set by --config.FIELD=VALUE")
    assert "--workdir" in flag_help and f"  {shown}" in fields
    assert "config" not in FLAGS


def test_help_of_a_config_that_does_not_exist_says_so(capsys):
    assert cli.call(train.main, ["train", "--help", "--config=none.py"], train.define_flags) == 2
    assert "no Python file 'none.py'" in capsys.readouterr().err


def test_nothing_goes_on_being_observed():
    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        config_help.meanings(lambda: ConfigDict({"a": 1 / 0}))
    assert sys.getprofile() is before
