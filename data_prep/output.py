"""Directories that the jobs make: whole or not at all, and nothing is deleted that a job did not make."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from uwm_jax.errors import UserError


def is_vacant(output: Path) -> bool:
    """Whether there is nothing at `output`, or an empty directory."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


def check_output(
    output: Path, is_ours: Callable[[Path], bool], what: str, *, overwrite: bool, source: Path | None = None
) -> None:
    """Checks that a job may put a new directory at `output`.

    Args:
        is_ours: whether a directory is one that the job makes, so that `overwrite` may replace it.
        what: names such directories in messages.
        source: what the job reads; neither may lie inside the other, as replacing one would delete both.
    Raises:
        UserError: it may not.
    """
    if source is not None:
        a, b = source.resolve(), output.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise UserError(
                f"--output={output} and the input {source} are the same directory, or one lies inside the other. "
                "Choose an --output beside the input."
            )
    if is_vacant(output):
        return
    if not overwrite:
        raise UserError(f"{output} exists. Choose another --output, or replace it with --overwrite.")
    if not output.is_dir() or not is_ours(output):
        raise UserError(
            f"{output} exists and is not {what}, so --overwrite does not replace it. "
            "Choose another --output, or remove it yourself."
        )


@contextlib.contextmanager
def building(output: Path) -> Iterator[Path]:
    """A new directory beside `output` that takes its place when the block ends well.

    What was there stays until then, and stays if the block fails: then the new directory is removed.

    Raises:
        UserError: the directory cannot be made there.
    """
    target = output.resolve()  # a link stays, and what it points at is replaced
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.building")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
    except OSError as e:
        raise UserError(f"{output} cannot be made: {e.filename}: {e.strerror}. Choose another --output.") from e
    try:
        yield new
        _replace(target, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(target: Path, new: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = new.with_suffix(".replaced")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
