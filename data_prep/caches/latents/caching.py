"""The job of `data_prep.latents`: which caches a config needs, what they cost, and making them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_prep.caches.latents.costs import Costs
from data_prep.caches.latents.encoding import Camera, Encoder
from data_prep.caches.latents.files import (
    STEPS_PER_PART,
    finish_caches,
    layout_of,
    parts_left,
    refuse_others,
    write_caches,
)
from data_prep.jobs import shares
from data_prep.jobs.output import warn_of_space
from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.codecs import Codec
from uwm_jax.data.images import is_augmented
from uwm_jax.data.latents import KIND, Layout, folder, part_file
from uwm_jax.data.places import local_dataset
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.data.sidecar import Sidecar, is_complete, open_sidecar
from uwm_jax.data.source_latents import expected_fields
from uwm_jax.errors import UserError
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.training import cached_latents, codec_store
from uwm_jax.training.build import Program, build


@dataclasses.dataclass(frozen=True)
class Options:
    """How caches are made.

    Attributes:
        variants: draws of crop and jitter of each episode and camera. seed: of these draws.
        moments: whether to store mean and log-variance in place of the mode.
        dtype: of the stored numbers.
        episodes: `all` of a dataset, or those `used` by the config's selection.
        steps_per_part: see `Layout`.
        task: (i, n) to encode only every n-th part from the i-th on, of 0 to n - 1; None: all, and finish the caches.
        assemble: only finish caches of which all parts are there.
    """

    variants: int = 1
    seed: int = 0
    moments: bool = False
    dtype: str = "float16"
    episodes: str = "all"
    steps_per_part: int = STEPS_PER_PART
    task: shares.Share | None = None
    assemble: bool = False


@dataclasses.dataclass(frozen=True)
class _Job:
    """The caches of one split of a dataset.

    Attributes:
        name: of the source, or sources. dataset: the open split. cameras: that are encoded.
        fields: {step key: what its cache is made with}. episodes: (n,) that are cached.
        first: number of its first part among those of all jobs, which shares count.
    """

    name: str
    dataset: Dataset
    cameras: list[Camera]
    fields: dict[str, dict[str, Any]]
    episodes: np.ndarray
    first: int

    def complete(self, overwrite: bool) -> list[Sidecar]:
        """The caches that are there.

        Args:
            overwrite: pass over those that will be replaced.
        Raises:
            UserError: one was made with other settings, or is damaged.
        """
        found = []
        for key, fields in self.fields.items():
            where = folder(fields["codec"], key, self.dataset.split)
            if is_complete(self.dataset.directory, where):
                try:
                    found.append(open_sidecar(self.dataset.directory, where, KIND, fields))
                except UserError:
                    if not overwrite:
                        raise
        return found

    def without(self, complete: Sequence[Sidecar]) -> _Job:
        """The job for the caches that are not there."""
        there = {cache.directory for cache in complete}
        places = {
            key: Path(local_dataset(self.dataset.directory), folder(fields["codec"], key, self.dataset.split))
            for key, fields in self.fields.items()
        }
        cameras = [camera for camera in self.cameras if places[camera.key] not in there]
        return dataclasses.replace(self, cameras=cameras, fields={c.key: self.fields[c.key] for c in cameras})

    @property
    def layout(self) -> Layout:
        return layout_of(self.dataset, next(iter(self.fields.values())), self.episodes)

    @property
    def parts_left(self) -> list[int]:
        """The parts that are not there."""
        return parts_left(self.dataset, self.fields, self.layout)

    def share(self, task: shares.Share | None) -> range:
        """The parts that a share does."""
        share, of = task or (0, 1)
        return range((share - self.first) % of, len(self.layout.parts), of)

    @property
    def frames(self) -> int:
        """That are encoded."""
        layout = self.layout
        return sum(map(layout.steps, range(len(layout.parts)))) * layout.variants * len(self.cameras)


def make(
    config: ConfigDict,
    options: Options,
    *,
    command: str,
    overwrite: bool = False,
    estimate: bool = False,
    say: Callable[[str], Any] = print,
) -> list[Sidecar]:
    """Makes the caches that training with `config` reads, of all its sources.

    Args:
        config: of a run; `config.data.latents` need not be set.
        command: the command line that continues the job.
        overwrite: replace caches that are there; a share of the work leaves complete ones of the same settings.
        estimate: only say what they cost.
    Returns:
        The caches, none with `estimate`.
    Raises:
        UserError: a system without latents, options that do not fit, a cache of other settings.
        RunError: a latent is not finite.
    """
    shares.check(options.task, options.assemble)
    if options.assemble and (estimate or overwrite):
        flag = "--estimate" if estimate else "--overwrite"
        raise UserError(f"--assemble only finishes what was encoded: leave {flag} out.")
    config = checked(config, options)
    with contextlib.closing(RunData(config.data, seed=config_lib.data_seed(config))) as data:
        codec, frozen = codec_store.open_codec(config, codec_store.in_dataset(config, data))
        assert codec is not None
        if options.moments and not codec.has_posterior:
            raise UserError(f"--moments: latents of the {codec.name} codec have no distribution. Leave it out.")
        if codec.has_posterior and config.model.codec.posterior == "sample" and not options.moments:
            raise UserError(
                "config.model.codec.posterior='sample' needs the mean and variance that --moments stores: "
                "give that, or set it to 'mode', here and for the run."
            )
        program = build(config, data.spec, codec, mesh_lib.data_mesh(jax.local_devices()))
        jobs = jobs_of(config, options, data, codec, frozen)
        # A share that a scheduler starts again, with all its flags, must not destroy what the shares have made.
        keep = not estimate and (not overwrite or options.task is not None)
        complete = [cache for job in jobs for cache in job.complete(overwrite)] if keep else []
        jobs = [job for job in (job.without(complete) for job in jobs) if job.cameras]
        if complete:
            again = "; without --task, --overwrite makes them anew" if overwrite else ""
            say(f"{len(complete)} caches are complete already{again}")
        if options.assemble:
            for job in jobs:
                refuse_others(job.dataset, job.fields, command=command)
            _require_all_parts(jobs)
            finished = [finish_caches(job.dataset, job.fields, job.episodes, command=command) for job in jobs]
            return complete + [cache for caches in finished for cache in caches]
        mine = jobs if estimate else [job for job in jobs if job.share(options.task)]
        if mine:
            encoder = _encoder(program, codec, frozen, mine[0], options)
            say(costs(config, program, codec, jobs, encoder.rate(mine[0].layout), options.task).describe())
        if estimate:
            return []
        made = complete
        for number, job in enumerate(mine):
            encoder = encoder if number == 0 else _encoder(program, codec, frozen, job, options)
            made += _write(job, encoder, options, command, overwrite, say)
        if options.task and jobs:
            _tell_what_is_left(jobs, options.task, say)
        return made


def _require_all_parts(jobs: Sequence[_Job]) -> None:
    """Raises UserError that names the parts of some jobs that are not there."""
    if left := [(job, part) for job in jobs for part in job.parts_left]:
        total = sum(len(job.layout.parts) for job in jobs)
        names = ", ".join(f"{job.name} {part_file(part)}" for job, part in left[:3]) + (", ..." if left[3:] else "")
        numbers = ", ".join(str(job.first + part) for job, part in left[:10]) + (", ..." if left[10:] else "")
        raise UserError(
            f"--assemble: {len(left)} of {total} parts are not done: {names}. Share I/N does those whose number is I "
            f"modulo N, and these have the numbers {numbers}. Do them with --task, or with neither flag, which does "
            "what is left and finishes the caches."
        )


def _tell_what_is_left(jobs: Sequence[_Job], share: shares.Share, say: Callable[[str], Any]) -> None:
    total, left = (sum(map(len, lists)) for lists in ([j.layout.parts for j in jobs], [j.parts_left for j in jobs]))
    rest = f"{left} of {total} parts are left for other shares" if left else "all parts are done"
    say(
        f"share {share[0]} of {share[1]} is done ({sum(len(job.share(share)) for job in jobs)} parts); {rest}. "
        "--assemble instead of --task finishes the caches."
    )


def checked(config: ConfigDict, options: Options) -> ConfigDict:
    """The config of a run from these caches.

    Raises:
        UserError: its system has no latents to read, or the options do not fit it.
    """
    if "codec" not in config.model or not systems.get(config.system).latents:
        raise UserError(f"config.system={config.system!r} reads no latents of a codec: there is nothing to cache.")
    config = config.copy_and_resolve_references()
    config.data.latents = config.model.codec.name
    config_lib.validate(config)
    data = config.data
    if options.variants > 1 and not is_augmented(data.resize, data.crop, data.augment):
        raise UserError(
            f"--variants={options.variants}: config.data.augment changes nothing here, so all variants would be the "
            "same. Use --variants=1, or turn on random crops or jitter."
        )
    return config


def jobs_of(config: ConfigDict, options: Options, data: RunData, codec: Codec, frozen: Any) -> list[_Job]:
    """The caches of a run's sources; sources of one split of a dataset share them."""
    views = sorted(data.spec.cameras)
    together: dict[tuple[str, str], list[Any]] = {}
    for source in data.sources.values():
        cached_latents.refuse_shared(source.where, codec, source.samples.shown_cameras)
        together.setdefault((str(source.dataset.directory), source.dataset.split), []).append(source)
    digests = [cached_latents.encoder_digest(codec, frozen, view) for view in range(len(views))]
    jobs: list[_Job] = []
    first = 0
    for sources in together.values():
        dataset = sources[0].dataset
        cameras: dict[str, Camera] = {}
        for source in sources:
            sizes = source.cameras_of(data.spec.cameras)
            for view, keys in source.samples.shown_cameras.items():
                for key in keys:
                    camera = Camera(key, views.index(view), sizes[key])
                    other = cameras.setdefault(key, camera)
                    if other.size != camera.size or digests[other.view] != digests[camera.view]:
                        raise UserError(
                            f"config.data.sources: {key} of {dataset.directory} is shown by {source.where} and by "
                            "another source in another way, but it has one cache: name it for the same view in both."
                        )
        kept = np.logical_or.reduce([source.selection.kept for source in sources])
        episodes = np.flatnonzero(kept) if options.episodes == "used" else np.arange(dataset.num_episodes)
        fields = {
            c.key: _fields(config, options, codec, digests[c.view], dataset, c, episodes) for c in cameras.values()
        }
        ordered = sorted(cameras.values(), key=lambda c: (c.view, c.key))
        jobs.append(_Job("+".join(s.name for s in sources), dataset, ordered, fields, episodes, first))
        first += len(jobs[-1].layout.parts)
    return jobs


def _fields(
    config: ConfigDict,
    options: Options,
    codec: Codec,
    digest: str,
    dataset: Dataset,
    camera: Camera,
    episodes: np.ndarray,
) -> dict[str, Any]:
    """What a camera's cache is made with."""
    of_all = len(episodes) == dataset.num_episodes
    *_, height, width, channels = codec.latent_shape(1, 1, *config.data.crop)
    return {
        **expected_fields(config.data, codec.name, dataset.split, camera.key, camera.size),
        "encoder": digest,
        "encoder_dtype": str(codec.dtype),
        "variants": options.variants,
        "seed": options.seed,
        "latent": [height, width, channels],
        "moments": options.moments,
        "dtype": options.dtype,
        "episodes": "all" if of_all else hashlib.sha256(episodes.astype("<i8").tobytes()).hexdigest(),
        "steps_per_part": options.steps_per_part,
    }


def costs(
    config: ConfigDict, program: Program, codec: Codec, jobs: list[_Job], rate: float, task: shares.Share | None
) -> Costs:
    """What the caches of some jobs cost, next to a run of the config.

    Args:
        rate: frames in a second. task: the share of the work that is asked for.
    """
    layout, window = jobs[0].layout, program.system.spec.window
    groups = systems.get(config.system).latents
    sample = program.system.flops()
    return Costs(
        frames=sum(job.frames for job in jobs),
        variants=layout.variants,
        record=layout.record,
        frame_flops=codec.encode_flops(1, *config.data.crop),
        rate=rate,
        samples=config.total_steps * config.batch_size,
        sample_frames=sum(len(window.groups[group]) for group in groups) * len(program.system.cameras),
        trained=sample.training - sample.frozen,
        episodes=sum(len(job.episodes) for job in jobs),
        shares=task[1] if task else 1,
    )


def _encoder(program: Program, codec: Codec, frozen: Any, job: _Job, options: Options) -> Encoder:
    data = program.config.data
    return Encoder(
        program,
        codec,
        frozen,
        job.dataset,
        job.cameras,
        seed=options.seed,
        augmented=is_augmented(data.resize, data.crop, data.augment),
        moments=options.moments,
        dtype="float32",
    )


def _write(
    job: _Job, encoder: Encoder, options: Options, command: str, overwrite: bool, say: Callable[[str], Any]
) -> list[Sidecar]:
    """Writes the parts of a job, or a share of them."""
    layout, parts = job.layout, job.share(options.task)
    needed = sum(map(layout.records, job.parts_left)) * layout.record * len(job.cameras)
    warn_of_space(local_dataset(job.dataset.directory), needed, f"what is left of the latents of {job.name}")
    with tqdm(total=sum(map(layout.steps, parts)), desc=f"encoding {job.name}", unit="step") as bar:
        return write_caches(
            job.dataset,
            job.fields,
            job.episodes,
            encoder.blocks,
            command=command,
            overwrite=overwrite,
            share=parts if options.task else None,
            progress=bar.update,
            say=say,
        )
