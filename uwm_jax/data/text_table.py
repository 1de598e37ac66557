"""Embeddings of a dataset's strings, one for each distinct string, which `data_prep.text` computes.

A table is the sidecar (`uwm_jax.data.sidecar`) `text/<name>` with the fields `encoder` (sha256 of the text encoder) and
`keys`, the fact `encoder` (its name), and the files

- `embeddings.npy`: (N, E) float32, one row for each distinct string; row 0 is that of the empty string;
- `utf8.npy` uint8 and `ends.npy` (N,) int64: the strings, concatenated, in the order of their length;
- `<split>/<key>.first.npy` (R,) int64 and `<split>/<key>.row.npy` (R,) int32: runs of equal consecutive steps of an
  episode: the first step of each, counted over all episodes of the split, and its row.

All are memory-mapped, so that processes of a machine share them.
"""

from __future__ import annotations

import itertools
import shlex

import numpy as np

from uwm_jax.data.records import Dataset
from uwm_jax.data.sidecar import Sidecar, open_sidecar
from uwm_jax.data.spec import TextEncoder
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath

EMPTY = 0  # row of the empty string


def folder(name: str) -> str:
    """The folder of a table, relative to its dataset."""
    return f"text/{name}"


def run_files(split: str, key: str) -> tuple[str, str]:
    """The files of a key's runs: first steps, rows."""
    stem = f"{split}/{key.replace('/', '.')}"
    return f"{stem}.first.npy", f"{stem}.row.npy"


class Strings:
    """The distinct strings of a table, with their embeddings, whichever steps have them.

    Args:
        dataset: its directory.
        name: of the table, `config.data.text_table`.
    Raises:
        UserError: there is no complete table of this dataset, or it is damaged.

    Attributes:
        encoder: that made it.
        texts: the empty one first.
        embeddings: (N, E) float32, read-only.
    """

    def __init__(self, dataset: AnyPath, name: str):
        sidecar = open_sidecar(dataset, folder(name), "text", command=_command(dataset, "CLIP", f"--name={name}"))
        self.encoder = _encoder(sidecar)
        self.embeddings = sidecar.array("embeddings.npy")
        data, ends = sidecar.array("utf8.npy").tobytes(), sidecar.array("ends.npy").tolist()
        self.texts = [data[a:b].decode(errors="replace") for a, b in itertools.pairwise([0, *ends])]


class TextTable:
    """The embeddings of the strings of a split.

    Args:
        dataset: an open split.
        name: of the table, `config.data.text_table`.
    Raises:
        UserError: there is no complete table of this dataset, or it is damaged.

    Attributes:
        encoder: that made it.
        keys: those that it has, in full.
        width: E.
    """

    def __init__(self, dataset: Dataset, name: str):
        self._dataset, self._name = dataset, name
        self._sidecar = open_sidecar(dataset.directory, folder(name), "text", command=self._command("CLIP"))
        self.encoder = _encoder(self._sidecar)
        self.keys = [str(key) for key in self._sidecar.fields["keys"]]
        self._embeddings = self._sidecar.array("embeddings.npy")
        self.width = int(self._embeddings.shape[1])
        self._runs: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def has(self, key: str) -> bool:
        """Whether it has a key, named in full or without `observation/` or `episode_metadata/`."""
        return self._full(key) in self.keys

    def key(self, name: str) -> str:
        """The full name of a key, whose runs are opened now.

        Raises:
            UserError: the table lacks it.
        """
        key = self._full(name)
        if key not in self.keys:
            keys = ",".join([*self.keys, name])
            raise UserError(
                f"config.data.text: the table {self._sidecar.directory} has no key {name!r}; it has "
                f"{', '.join(self.keys)}. Make it with this key: "
                f"{self._command(self.encoder.name, f'--keys={keys}', '--overwrite')}"
            )
        first, row = (self._sidecar.array(file) for file in run_files(self._dataset.split, key))
        self._runs[key] = first, row
        return key

    def row(self, key: str, episode: int, step: int) -> int:
        """The row of a key's string at a step of an episode; `EMPTY` where it is empty."""
        first, row = self._runs[key]
        return int(row[np.searchsorted(first, self._dataset.episode_starts[episode] + step, side="right") - 1])

    def empty_steps(self, key: str) -> int:
        """Steps of the split whose string is empty."""
        first, row = self._runs[key]
        lengths = np.diff(first, append=int(self._dataset.episode_lengths.sum()))
        return int(lengths[row == EMPTY].sum())

    def embedding(self, row: int) -> np.ndarray:
        """(E,) float32."""
        return self._embeddings[row]

    def _command(self, encoder: str, *flags: str) -> str:
        """The command that makes this table."""
        return _command(self._dataset.directory, encoder, f"--name={self._name}", *flags)

    def _full(self, name: str) -> str:
        names = (name, f"observation/{name}", f"episode_metadata/{name}")
        return next((key for key in names if key in self.keys), name)


def _encoder(table: Sidecar) -> TextEncoder:
    return TextEncoder(str(table.facts["encoder"]), str(table.fields["encoder"]))


def _command(dataset: AnyPath, encoder: str, *flags: str) -> str:
    given = (f"--dataset={dataset}", f"--encoder={encoder}")
    return shlex.join(["python", "-m", "data_prep.text", *given, *flags])
