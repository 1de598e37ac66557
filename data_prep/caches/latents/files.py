"""Writes caches of latents, a camera each, in parts: a job that was killed continues with the parts that it lacks.

Parts are independent of each other, so that many processes may write a share of them each. The caches of one job are
written together, because its cameras are encoded together. What makes the latents is up to the caller:
`data_prep.caches.latents.encoding` encodes frames, a benchmark may draw random numbers.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.jobs.job_folder import claimed
from uwm_jax.data.latents import EPISODES_FILE, KIND, Layout, folder, part_file, salt_of
from uwm_jax.data.places import local_dataset
from uwm_jax.data.records import Dataset
from uwm_jax.data.sidecar import Sidecar, SidecarWriter, is_begun, state_of, writing_sidecar
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import replacing, writing

STEPS_PER_PART = 2048


class Block(NamedTuple):
    """Latents of consecutive steps of a part.

    Attributes:
        variant: k. start: the first step, counted from the part's first.
        latents: {step key of the camera: (n, h, w, C)}; a part's last block may be the black frame (`Layout.black`),
            whose `variant` is -1.
    """

    variant: int
    start: int
    latents: Mapping[str, np.ndarray]


Blocks = Callable[[Layout, int], Iterator[Block]]  # (layout, part) -> its blocks


def layout_of(dataset: Dataset, fields: Mapping[str, Any], episodes: np.ndarray) -> Layout:
    """The layout of a cache made with `fields` that holds some episodes (n,)."""
    height, width, channels = fields["latent"]
    shape = (height, width, channels * (2 if fields["moments"] else 1))
    steps, variants = int(fields["steps_per_part"]), int(fields["variants"])
    return Layout(dataset.episode_lengths, episodes, shape, fields["dtype"], variants, steps)


def write_caches(
    dataset: Dataset,
    fields: Mapping[str, Mapping[str, Any]],
    episodes: np.ndarray,
    blocks: Blocks,
    *,
    command: str,
    overwrite: bool = False,
    share: Sequence[int] | None = None,
    progress: Callable[[int], Any] = lambda steps: None,
    say: Callable[[str], Any] = print,
) -> list[Sidecar]:
    """Makes the caches of some cameras, or completes them.

    Args:
        fields: {step key of the camera: what its cache is made with}, as `uwm_jax.data.latents` reads them; all of one
            layout.
        episodes: (n,) numbers of the episodes, rising.
        blocks: makes the latents; called for the parts that are lacking, in order.
        command: the command line that continues the job.
        overwrite: replace caches of other settings, and complete ones; a share leaves those of the same settings.
        share: only write these parts, while others write theirs; None: write all, and finish the caches.
        progress: is told how many steps are done, those of an earlier job too.
    Returns:
        The caches that are complete: all of them, without `share`.
    Raises:
        UserError: a cache of other settings is there, or another process writes it.
        RunError: a latent is not finite in the dtype of the cache.
    """
    layout = layout_of(dataset, next(iter(fields.values())), episodes)
    with _writing(dataset, fields, command, overwrite=overwrite, alone=share is None) as writers:
        salts = {key: salt_of(dataset.fingerprint, made_with) for key, made_with in fields.items()}
        if all(writer.complete for writer in writers.values()):
            say(f"nothing to do: the latents of {', '.join(fields)} are complete")
        else:
            parts = range(len(layout.parts)) if share is None else share
            if done := sum(_is_done(writers, part) for part in parts):
                say(f"continuing: {done} of {len(parts)} parts are done already")
            _write_parts(layout, writers, salts, parts, blocks, progress)
        if share is not None:
            return [writer.complete for writer in writers.values() if writer.complete]
        return [_finish(writer, layout, len(dataset.episode_lengths)) for writer in writers.values()]


def finish_caches(
    dataset: Dataset, fields: Mapping[str, Mapping[str, Any]], episodes: np.ndarray, *, command: str
) -> list[Sidecar]:
    """Finishes caches of which `parts_left` is empty.

    Args:
        as `write_caches` has them.
    Raises:
        UserError: another process writes them, or as `write_caches`; a part has another size than it must have.
    """
    layout = layout_of(dataset, next(iter(fields.values())), episodes)
    with _writing(dataset, fields, command, overwrite=False, alone=True) as writers:
        return [_finish(writer, layout, len(dataset.episode_lengths)) for writer in writers.values()]


def refuse_others(dataset: Dataset, fields: Mapping[str, Mapping[str, Any]], *, command: str) -> None:
    """Raises UserError where unfinished caches of other settings are there, naming the settings."""
    begun = {
        key: made_with
        for key, made_with in fields.items()
        if is_begun(dataset.directory, folder(made_with["codec"], key, dataset.split))
    }
    with _writing(dataset, begun, command, overwrite=False, alone=False):
        pass


@contextlib.contextmanager
def _writing(
    dataset: Dataset, fields: Mapping[str, Mapping[str, Any]], command: str, *, overwrite: bool, alone: bool
) -> Iterator[dict[str, SidecarWriter]]:
    with contextlib.ExitStack() as closing:
        writers: dict[str, SidecarWriter] = {}
        for key, made_with in fields.items():
            where = folder(made_with["codec"], key, dataset.split)
            one = writing_sidecar(dataset.directory, where, KIND, made_with, command, overwrite=overwrite, alone=alone)
            writers[key] = closing.enter_context(one)
        yield writers


def parts_left(dataset: Dataset, fields: Mapping[str, Mapping[str, Any]], layout: Layout) -> list[int]:
    """The parts that a cache of these lacks; those of other settings do not count."""
    directory = local_dataset(dataset.directory)
    places = {key: folder(made_with["codec"], key, dataset.split) for key, made_with in fields.items()}
    states = {key: state_of(directory, place, KIND, fields[key]) for key, place in places.items()}
    parts = range(len(layout.parts))
    if "" in states.values():
        return list(parts)
    unfinished = [directory / places[key] for key, state in states.items() if state == "begun"]
    return [part for part in parts if not all((place / part_file(part)).exists() for place in unfinished)]


def _is_done(writers: Mapping[str, SidecarWriter], part: int) -> bool:
    """Whether all caches have a part."""
    return all(writer.complete or (writer.directory / part_file(part)).exists() for writer in writers.values())


def _write_parts(
    layout: Layout,
    writers: Mapping[str, SidecarWriter],
    salts: Mapping[str, int],
    parts: Sequence[int],
    blocks: Blocks,
    progress: Callable[[int], Any],
) -> None:
    """Writes the parts that are lacking; those on which another process is at work come last."""
    unfinished = [writer.directory for writer in writers.values() if not writer.complete]
    waiting = collections.deque((part, False) for part in parts)
    while waiting:
        part, wait = waiting.popleft()
        with contextlib.ExitStack() as claims:
            files = [directory / part_file(part) for directory in unfinished]
            # Who has the first of them gets the others.
            if not all(claims.enter_context(claimed(file, wait=wait or file != files[0])) for file in files):
                waiting.append((part, True))
            elif _is_done(writers, part):
                progress(layout.steps(part))
            else:
                _write_part(layout, writers, salts, part, blocks, progress)


def _write_part(
    layout: Layout,
    writers: Mapping[str, SidecarWriter],
    salts: Mapping[str, int],
    part: int,
    blocks: Blocks,
    progress: Callable[[int], Any],
) -> None:
    # All cameras again, also where one has this part already: what a program computes of a camera may differ in the
    # last bit from what a program of fewer cameras does.
    open_ones = [key for key, writer in writers.items() if not writer.complete]
    with contextlib.ExitStack() as closing:
        outputs = {}
        for key in open_ones:
            file = closing.enter_context(replacing(writers[key].directory / part_file(part)))
            outputs[key] = closing.enter_context(open(file, "r+b"))
            outputs[key].truncate(layout.records(part) * layout.record)
        for variant, start, latents in blocks(layout, part):
            count = len(next(iter(latents.values())))
            place = layout.black[1] if variant < 0 else variant * layout.steps(part) + start
            for key in open_ones:
                _require_finite(key, latents[key], layout)
                _write(outputs[key].fileno(), layout.pack(latents[key], salts[key]), place * layout.record)
            if variant == layout.variants - 1:
                progress(count)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _require_finite(key: str, latents: np.ndarray, layout: Layout) -> None:
    with np.errstate(over="ignore"):
        stored = latents.astype(layout.dtype)
    if not np.isfinite(stored).all():
        largest = float(np.abs(latents[np.isfinite(latents)]).max(initial=0.0))
        raise RunError(
            f"{key}: a latent is not finite in {layout.dtype.name} (the largest that is has the absolute value "
            f"{largest:.3g}): the codec is damaged, or its latents need --dtype=float32."
        )


def _finish(writer: SidecarWriter, layout: Layout, num_episodes: int) -> Sidecar:
    if writer.complete:
        return writer.complete
    files = [part_file(part) for part in range(len(layout.parts))]
    for part, name in enumerate(files):
        file, size = writer.directory / name, layout.records(part) * layout.record
        if (found := file.stat().st_size) != size:
            raise UserError(f"{file}: expected {size} bytes, found {found}: remove it, and start the job again.")
    if len(layout.episodes) < num_episodes:
        with writing(Path(writer.directory / EPISODES_FILE), "wb") as out:
            np.save(out, layout.episodes, allow_pickle=False)
        files.append(EPISODES_FILE)
    steps = sum(layout.steps(part) for part in range(len(layout.parts)))
    facts = {"episodes": len(layout.episodes), "steps": steps}
    with tqdm(total=layout.total_bytes, desc="checksums", unit="B", unit_scale=True, delay=1) as bar:
        return writer.finish(files, facts, bar.update)


def random_blocks(cameras: Sequence[str], seed: int = 0) -> Blocks:
    """Random latents in place of encoded ones, for benchmarks of reading."""

    def blocks(layout: Layout, part: int) -> Iterator[Block]:
        rng = np.random.default_rng((seed, part))

        def draw(count: int) -> dict[str, np.ndarray]:
            return {key: rng.normal(size=(count, *layout.shape)).astype(layout.dtype) for key in cameras}

        for variant in range(layout.variants):
            yield Block(variant, 0, draw(layout.steps(part)))
        if part == layout.black[0]:
            yield Block(-1, 0, draw(1))

    return blocks
