"""Copies a dataset between a bucket and a local folder, in parallel and verified; a killed copy continues.

    python -m data_prep.copy --input=gs://BUCKET/droid --output=/mnt/disk/droid
    python -m data_prep.copy --input=$UWM_DATA_DIR/mine --output=gs://BUCKET/mine

Copies all files of a folder: a training dataset with its sidecars, an RLDS dataset, or any other. Files are compared
with the CRC-32C that the dataset lists, else with the one that the bucket states. Start the same command again after it
was killed: files that are there are compared and kept, and a file that was read in part is continued. `manifest.json`
comes last, so that a copy that is not complete is not taken for a dataset. Files in the target that the source lacks
are never removed.
"""

from __future__ import annotations

from absl import flags
from tqdm import tqdm

from data_prep.jobs.copying import Copied, Copy
from data_prep.jobs.job_folder import size_in_words
from uwm_jax import cli, files
from uwm_jax.errors import UserError
from uwm_jax.files import Place

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("input", None, "folder to copy: local, mounted or gs://bucket/key")
    flags.DEFINE_string("output", None, "folder to copy it to: local, mounted or gs://bucket/key")
    flags.DEFINE_integer("in_flight", 16, "reads of 8 MiB, or files that are written, at a time", 1, 256)
    flags.DEFINE_bool("overwrite", False, "replace files of other content in a complete output")


def main(call: cli.Call) -> None:
    source, target = (files.place(cli.required(name), f"--{name}") for name in ("input", "output"))
    copied = copy(source, target, overwrite=FLAGS.overwrite, in_flight=FLAGS.in_flight)
    there = f", {copied.kept} of them were there" if copied.kept else ""
    hidden = f"; {copied.hidden} hidden files of the source were left out" if copied.hidden else ""
    print(f"{target}: {copied.files} files, {size_in_words(copied.size)}{there}{hidden}")


def copy(source: Place, target: Place, *, overwrite: bool = False, in_flight: int = 16) -> Copied:
    """Copies the files of a folder to another one, with a progress bar.

    Raises:
        UserError: as `Copy`; one lies inside the other.
    """
    if files.is_remote(source) == files.is_remote(target):
        a, b = source.resolve(), target.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise UserError(f"--output={target} and --input={source} are the same folder, or one is inside the other.")
    made = Copy(source, target, overwrite=overwrite, in_flight=in_flight)
    with tqdm(total=made.size, desc="copying", unit="B", unit_scale=True) as bar:
        return made.run(bar.update)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
