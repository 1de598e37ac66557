"""Calls of gcloud, the cloud's command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from launch.program import Program
from uwm_jax.errors import RunError


class Gcloud(Program):
    """Runs gcloud, or with `dry_run` prints the commands that would run.

    Args:
      project: of all calls; "" for the one that gcloud is configured with.
      say, sleep: as in `Program`.
    """

    def __init__(
        self,
        dry_run: bool = False,
        project: str = "",
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        sleep: Callable[[float], None] = time.sleep,
    ):
        advice = "Install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then `gcloud auth login`;"
        of_project = [f"--project={project}"] if project else []
        super().__init__("gcloud", advice, dry_run, [*of_project, "--quiet"], say, sleep)

    def read(self, *arguments: str) -> Any | None:
        """The JSON that a call prints; None in a dry run, and for what does not exist."""
        try:
            text = self.output(*arguments, "--format=json")
        except RunError as e:
            if "NOT_FOUND" in str(e):
                return None
            raise
        try:
            return json.loads(text) if text else None
        except ValueError as e:
            raise RunError(f"{self.line(*arguments)}: expected JSON, found {text[:200]!r}") from e
