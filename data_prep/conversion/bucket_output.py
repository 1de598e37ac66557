"""A training dataset in a bucket whose tasks Beam's workers do: parts are uploaded, the dataset is assembled on a disk.

The parts lie in `.<name>.building/<digest of the plan>/` next to the output, so that a job that was killed, or one that
failed, is continued by the next one of the same corpus and options, and by no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.conversion.cutting import Job
from data_prep.conversion.results import Result
from uwm_jax import files
from uwm_jax.errors import UserError
from uwm_jax.files import Place, RemotePath

MANIFEST = "manifest.json"


@contextlib.contextmanager
def staged(output: RemotePath, is_ours: Callable[[Place], bool], *, overwrite: bool) -> Iterator[Path]:
    """A path on the local disk ($TMPDIR); what the block makes there is uploaded to `output`, its manifest last.

    Raises:
        UserError: `output` exists and is not to be replaced, or is no dataset.
    """
    files.check_output(output, "--output")
    if output.exists():
        if not overwrite:
            raise UserError(f"{output} exists. Choose another --output, or replace it with --overwrite.")
        if not is_ours(output):
            raise UserError(f"{output} exists and is not a training dataset, so --overwrite does not replace it.")
    with tempfile.TemporaryDirectory(prefix="uwm_reshard_") as folder:
        made = Path(folder) / output.name
        yield made
        (output / MANIFEST).unlink(missing_ok=True)  # first: what is being replaced is no dataset
        files.remove(output, missing_ok=True)
        files.copy_tree(made, output, last=MANIFEST)
        files.remove(_building(output), missing_ok=True)


def parts_of(output: RemotePath, plan: Mapping[str, Any]) -> RemotePath:
    """The folder of the parts of a job with this plan."""
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    return _building(output) / digest[:16]


def fetched(tasks: Mapping[str, Sequence[tuple[Job, Result]]], parts: Path) -> dict[str, list[tuple[Job, Result]]]:
    """Tasks, with the parts of those that are done downloaded into the local folder `parts`."""
    found: dict[str, list[tuple[Job, Result]]] = {}
    for split, done in tasks.items():
        found[split] = []
        for job, result in done:
            local = dataclasses.replace(job, parts=parts)
            if job.is_done:
                files.copy_tree(job.folder, local.folder)
            found[split].append((local, result))
    return found


def _building(output: RemotePath) -> RemotePath:
    return output.with_name(f".{output.name}.building")
