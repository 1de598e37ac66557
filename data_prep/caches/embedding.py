"""Makes a table of embeddings of a dataset's strings (`uwm_jax.data.text_table` describes it)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from data_prep.caches import instructions
from data_prep.caches.instructions import Runs
from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.data.sidecar import Sidecar, open_sidecar, writing_sidecar
from uwm_jax.data.text_table import EMPTY, folder, run_files
from uwm_jax.errors import RunError
from uwm_jax.files import AnyPath, write_text, writing
from uwm_jax.reading import read_json
from uwm_jax.torch_bridge import clip_text

_PARTS, _PROGRESS = "parts", "embedded.json"


class Encoder(Protocol):
    """As `uwm_jax.torch_bridge.clip_text.ClipText`."""

    width: int

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...

    def too_long(self, texts: Sequence[str]) -> int: ...


def make_table(
    dataset: str | os.PathLike[str],
    name: str,
    encoder: str,
    *,
    keys: Sequence[str] = (),
    batch_size: int = 256,
    workers: int = 1,
    command: str,
    overwrite: bool = False,
) -> tuple[Sidecar, bool]:
    """The table `text/<name>` of a dataset; one that a killed job has begun is continued.

    Args:
        encoder: folder or hub name of CLIP, as `clip_text.files_of` takes it.
        keys: of strings; () = those whose name speaks of language, in any split.
        batch_size: strings that are embedded at once.
        workers: processes that read records.
        command: the command line that continues this job.
        overwrite: whether to replace a table of this name.
    Returns:
        the table, and whether it was complete before.
    Raises:
        UserError: a key without strings, an unusable encoder, or another table of this name.
        RunError: an embedding is not finite.
    """
    splits = {split: Dataset(dataset, split) for split in sorted(read_manifest(dataset)["splits"])}
    chosen = instructions.chosen_keys(next(iter(splits.values())), keys)
    fields = {"encoder": clip_text.fingerprint(encoder), "keys": chosen}
    with writing_sidecar(dataset, folder(name), "text", fields, command, overwrite=overwrite) as out:
        if out.complete:
            return out.complete, True
        parts = out.directory / _PARTS
        parts.mkdir(exist_ok=True)
        found = {split: instructions.find(opened, chosen, parts, workers) for split, opened in splits.items()}
        texts = _distinct(runs for of_split in found.values() for runs in of_split.values())
        files = _write_index(out.directory, texts, found)
        opened = clip_text.ClipText(encoder)
        cut_off = _embed(out.directory, texts, opened, batch_size)
        facts = {
            "encoder": encoder,
            "width": opened.width,
            "texts": len(texts),
            "cut_off": cut_off,
            "splits": {
                split: {
                    key: instructions.counts(
                        runs, splits[split].episode_starts, int(splits[split].episode_lengths.sum())
                    )
                    for key, runs in of_split.items()
                }
                for split, of_split in found.items()
            },
        }
        return out.finish(["embeddings.npy", *files], facts), False


def summary(table: Sidecar) -> str:
    """The content of a table, for people."""
    facts = table.facts
    lines = [f"{table.directory}: {facts['texts']} distinct strings, {facts['width']} numbers each, {facts['encoder']}"]
    if facts["cut_off"]:
        lines.append(f"  {facts['cut_off']} of them have more tokens than the encoder reads: their ends are cut off")
    for split, keys in facts["splits"].items():
        for key, count in keys.items():
            lines.append(
                f"  {split}, {key}: {count['episodes']} episodes; empty in {count['empty_episodes']}; "
                f"{count['changing_episodes']} change it; {count['empty_steps']} of {count['steps']} steps are empty"
            )
    return "\n".join(lines)


def _distinct(found: Iterable[Runs]) -> list[str]:
    """All strings, the empty one first: sorted by length, so that a batch needs little padding."""
    texts = {"", *(text for runs in found for text in runs.texts)}
    return sorted(texts, key=lambda text: (len(data := text.encode()), data))


def _write_index(directory: Path, texts: Sequence[str], found: Mapping[str, Mapping[str, Runs]]) -> list[str]:
    """Writes strings and runs; the names of the files."""
    rows = {text: row for row, text in enumerate(texts)}
    assert rows[""] == EMPTY
    data, ends = instructions.packed(texts)
    arrays = {"utf8.npy": data, "ends.npy": ends}
    for split, of_split in found.items():
        for key, runs in of_split.items():
            in_table = np.asarray([rows[text] for text in runs.texts], np.int32)
            first, row = run_files(split, key)
            arrays |= {first: runs.first.astype(np.int64), row: in_table[runs.row]}
    for name, array in arrays.items():
        with writing(directory / name, "wb") as file:
            np.save(file, array, allow_pickle=False)
    return list(arrays)


def _embed(directory: Path, texts: Sequence[str], encoder: Encoder, batch_size: int) -> int:
    """Fills `embeddings.npy` batch by batch, from where an earlier job left off; how many texts were cut off."""
    file, progress = directory / "embeddings.npy", directory / _PROGRESS
    shape = (len(texts), encoder.width)
    state = read_json(progress) if progress.exists() else {}
    done, cut_off = (state["rows"], state["cut_off"]) if "cut_off" in state else (0, 0)
    if not done:
        np.lib.format.open_memmap(file, "w+", np.float32, shape).flush()
    out: Any = np.lib.format.open_memmap(file, "r+")
    with tqdm(total=len(texts), initial=done, desc="embedding", unit=" strings") as bar:
        for start in range(done, len(texts), batch_size):
            stop = min(start + batch_size, len(texts))
            embeddings = encoder.embed(texts[start:stop])
            if not np.isfinite(embeddings).all():
                bad = texts[start + int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])]
                raise RunError(f"the embedding of {bad!r} is not finite: check the encoder's weights.")
            out[start:stop] = embeddings
            out.flush()
            cut_off += encoder.too_long(texts[start:stop])
            write_text(progress, json.dumps({"rows": stop, "cut_off": cut_off}) + "\n")  # after what it counts
            bar.update(stop - start)
    return cut_off


def write_embedding(sentence: str, output: Path, encoder: str, sha256: str = "") -> np.ndarray:
    """Writes the embedding of one sentence, (E,) float32, as npy: the `text` of a policy's observation.

    Args:
        sha256: that the encoder must have; "" for any.
    Raises:
        UserError: as `clip_text.embed`.
    """
    embedding = clip_text.embed(encoder, [sentence], sha256)[0]
    with writing(output, "wb") as file:
        np.save(file, embedding, allow_pickle=False)
    return embedding


def encoder_of(dataset: AnyPath, name: str) -> tuple[str, str]:
    """(name, sha256) of the encoder of a dataset's table.

    Raises:
        UserError: there is no complete one.
    """
    table = open_sidecar(dataset, folder(name), "text")
    return str(table.facts["encoder"]), str(table.fields["encoder"])
