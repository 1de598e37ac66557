"""`data_prep.text` as a command that is killed and started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import clip
from tests.data_prep import language_source
from tests.data_prep.killing import Commands, kill_and_resume, random_moments, tree

pytestmark = [pytest.mark.torch, pytest.mark.slow]


def test_a_command_that_is_killed_continues_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    encoder = clip.make(tmp_path / "encoder")
    made = language_source.make(tmp_path / "made")
    killed = Path(shutil.copytree(made, tmp_path / "killed"))
    before = tree(killed)
    # torch and transformers are imported once, before the commands are forked.
    preloaded = ("transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip")
    commands = Commands("data_prep.text", "torch", *preloaded)
    flags = [f"--encoder={encoder}", "--batch_size=1", "--workers=1"]
    status, output = commands.run(["data_prep.text", f"--dataset={made}", *flags])
    assert status == 0, output
    table = killed / "text" / "clip"
    moments = [
        (table / "unfinished.json").exists,
        lambda: any(table.glob("parts/train.*.npz")),
        (table / "embedded.json").exists,
        lambda: json.loads((table / "embedded.json").read_text())["rows"] > 1,
        *random_moments(seed=0, count=2, longest=0.3),
    ]
    command = ["data_prep.text", f"--dataset={killed}", *flags]
    outputs = kill_and_resume(commands, command, moments, (table / "sidecar.json").exists)
    assert len(outputs) > 2
    assert tree(table) == tree(made / "text" / "clip")
    assert {name: data for name, data in tree(killed).items() if not name.startswith("text/")} == before
    status, output = commands.run(command)
    assert status == 0 and "already complete" in output and "embedding:" not in output

    status, output = commands.run([*command, "--overwrite", "--keys=note"])
    assert status == 0 and "5 distinct strings" in output
    for wrong, message in (
        (["--name=other"], "--encoder is required"),
        (["--output=a.npy", *flags], "--output requires --embed"),
        (["--keys=action", *flags], "no key 'action' of strings"),
        (["--name=../up", *flags], "cannot name a file inside the dataset"),
    ):
        status, output = commands.run(["data_prep.text", f"--dataset={killed}", *wrong])
        assert status == 2 and message in output and "Traceback" not in output
    sentence = ["data_prep.text", "--embed=push it", f"--output={tmp_path / 'text.npy'}"]
    status, output = commands.run([*sentence, f"--dataset={made}"])
    assert status == 0 and np.load(tmp_path / "text.npy").shape == (clip.WIDTH,), output
    status, output = commands.run(sentence)
    assert status == 2 and "name the encoder by --encoder" in output
    commands.close()
