"""The places of datasets: in a folder, below $UWM_DATA_DIR, or in a bucket."""

from __future__ import annotations

from pathlib import Path

from uwm_jax import files
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, Place, data_dir, is_remote


def dataset_dir(path: AnyPath, flag: str = "config.data.path") -> Place:
    """A dataset's directory: `path` itself if absolute or in a bucket, else under $UWM_DATA_DIR; `flag` is for
    messages."""
    found = files.place(path, flag)
    if not isinstance(found, Path) or found.is_absolute():
        return found
    root = data_dir()
    return root / found if isinstance(root, Path) else files.place(f"{root}/{found.as_posix()}", flag)


def find_dataset(path: AnyPath, flag: str = "--dataset") -> Place:
    """The dataset of a command's flag: `path` relative to the current directory, else, as in a config, $UWM_DATA_DIR.

    A path without a dataset in either place is resolved as in a config.
    """
    here = files.place(path, flag)
    if is_remote(here) or (here / "manifest.json").exists():
        return here
    return dataset_dir(path, flag)


def local_dataset(directory: Place) -> Path:
    """The directory of a dataset that a job writes into.

    Raises:
        UserError: it lies in a bucket.
    """
    if not isinstance(directory, Path):
        raise UserError(
            f"{directory} lies in a bucket, into which this job does not write. Run it on a local copy, and copy what "
            f"it makes: python -m data_prep.copy --input=LOCAL_DIR --output={directory}."
        )
    return directory
