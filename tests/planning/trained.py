"""Trains for a step on eight simulated CPU devices, and plans the same: a program of its own for `test_compiling`.

    python -m tests.planning.trained CONFIG.json WORKDIR OUTPUT.json

Every program that jax compiles meanwhile is recorded, whoever asks for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from tests import quick_compile

os.environ["XLA_FLAGS"] = quick_compile.with_devices(8)

import jax

from uwm_jax import config as config_lib
from uwm_jax.planning import compiling, rows, sizes
from uwm_jax.planning.rows import Question
from uwm_jax.train import train

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "accumulated": (2, 4, 2)}  # data, fsdp, parts of a batch


def recorded() -> dict[str, dict[str, int]]:
    """{digest of the lowered text: the compiler's plan of the memory} of all programs from now on."""
    found: dict[str, dict[str, int]] = {}
    compile_ = jax.stages.Lowered.compile

    def recording(self, *args, **kwargs):
        compiled = compile_(self, *args, **kwargs)
        found[hashlib.sha256(self.as_text().encode()).hexdigest()] = compiling.memory_of(compiled)
        return compiled

    jax.stages.Lowered.compile = recording
    return found


def main(config_file: Path, workdir: Path, output: Path) -> None:
    programs, results = recorded(), {}
    for name, (data, fsdp, parts) in MESHES.items():
        config = config_lib.from_json(config_file.read_text(), str(config_file))
        config.mesh.data, config.mesh.fsdp, config.accumulation_steps = data, fsdp, parts
        programs.clear()
        train(config, workdir / name)
        ran = dict(programs)
        question = Question(sizes.of_data(config, "none.py"))
        prepared = compiling.prepare(rows.request(config, None, question))
        facts = compiling.facts_of(prepared, compiling.compiled(prepared.program.mesh, prepared.lowered))
        answer = {"facts": facts | compiling.evaluations(prepared), "seconds": 0.0, "cached": False}
        row = rows.row_of("here", config, None, question, answer)
        results[name] = {"ran": ran, "planned": facts["lowered_sha256"], "memory": facts["memory"], "row": row}
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
