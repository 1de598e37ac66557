"""The flags of shares of a job's tasks."""

from __future__ import annotations

import pytest

from data_prep.jobs import shares
from uwm_jax import cli


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("python -m x --task=1/4 --out=a", "python -m x --out=a"),
        ("python -m x --task 1/4 --out a", "python -m x --out a"),
        ("python -m x --assemble -task=1/4 --noassemble", "python -m x"),
        ("python -m x --out=a --tasks=3 assemble", "python -m x --out=a --tasks=3 assemble"),
    ],
)
def test_a_command_line_without_its_share(line: str, whole: str) -> None:
    assert shares.without_flags(line.split()) == whole.split()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([], None),
        (["--task=0/1"], (0, 1)),
        (["--task=3/16"], (3, 16)),
        (["--task=3"], "--task=3: expected I/N"),
        (["--task=-1/2"], "--task=-1/2: expected I/N"),
        (["--task=2/2"], "--task=2/2: expected I/N with 0 <= I < N"),
        (["--task=0/0"], "--task=0/0: expected I/N with 0 <= I < N"),
        (["--task=0/2", "--assemble"], "give one"),
    ],
)
def test_the_share_of_the_flags(flags: list[str], found, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def main(_: cli.Call) -> None:
        seen.append(shares.from_flags())
        shares.check(seen[0], shares.FLAGS.assemble)

    status = cli.call(main, ["x", *flags], lambda: shares.define_flags("dataset"))
    if isinstance(found, str):
        assert status == 2 and found in capsys.readouterr().err
    else:
        assert status == 0 and seen == [found]
