"""Weights & Biases. What belongs to wandb is set by its own variables: WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY,
WANDB_MODE=offline, WANDB_DIR."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping
from typing import Any

from PIL import Image

from uwm_jax.errors import UserError
from uwm_jax.files import Place, is_remote, write_text
from uwm_jax.reading import parse_json
from uwm_jax.training.telemetry.tracker import CLOSE_SECONDS, RunFacts, Tracker

PROJECT = "uwm_jax"  # where WANDB_PROJECT names none
LOGIN_SECONDS = 10.0  # for a person at the terminal to say who they are

_FILE = "wandb.json"  # of a workdir


class Wandb(Tracker):
    """A run of wandb, which the restarts of a run continue: its id is kept in the workdir.

    `step` is a metric of its own, which the others are drawn over: the step that wandb counts only rises, and drops the
    lines that a run repeats after it was killed.
    """

    _run: Any = None

    def start(self, run: RunFacts) -> None:
        import wandb

        settings = wandb.Settings(console="off", login_timeout=LOGIN_SECONDS, finish_timeout=CLOSE_SECONDS)
        self._wandb = wandb
        self._run = wandb.init(
            id=_id(run),
            resume="allow",
            name=run.name,
            group=run.group or None,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            config=dict(run.config),
            dir=None if "WANDB_DIR" in os.environ or is_remote(run.workdir) else str(run.workdir),
            reinit="create_new",  # members of a sweep have one each, at the same time
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Place]) -> None:
        shown = {}
        for name, file in pictures.items():
            with Image.open(io.BytesIO(file.read_bytes())) as image:
                shown[name] = self._wandb.Image(image.convert("RGB"))
        self._run.log({"step": step, **scalars, **shown})

    def close(self, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def _id(run: RunFacts) -> str:
    """The id of wandb's run, which the first start of a run makes."""
    file = run.workdir / _FILE
    if file.exists():
        kept = parse_json(file.read_bytes(), str(file))
        if not isinstance(kept, dict) or not isinstance(kept.get("id"), str):
            raise UserError(f"{file}: expected {{'id': ...}}; delete it, and the run gets a new page.")
        return kept["id"]
    made = secrets.token_hex(4)
    write_text(file, f'{{"id": "{made}"}}\n')
    return made
