"""Makes the demonstration dataset: PushT solved by a sampling-MPC expert.

    python -m data_prep.demo

With no flags this makes the dataset that `configs/quickstart.py` reads: the training layout in `$UWM_DATA_DIR/pusht`
(default `data/pusht`), and next to it, in `pusht_rlds`, the RLDS dataset that it was cut from, readable by TFDS. An
episode depends on the seed and its number alone, so the number of worker processes affects only the time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from data_prep.jobs.output import building, check_output, is_vacant, local_output, local_place
from data_prep.jobs.workers import pool
from uwm_jax import cli
from uwm_jax.envs.parallel import cores
from uwm_jax.envs.pusht_expert import PushTExpert
from uwm_jax.envs.pusht_simulator import Renderer, make_env, read_state
from uwm_jax.errors import UserError
from uwm_jax.files import data_dir, write_text
from uwm_jax.reading import read_json

FLAGS = flags.FLAGS

SEEDS_PER_RUN = 1_000_000  # `--seed=0` and `--seed=1` have no episode in common
RECORD = "demo.json"
VAL_RATIO = 0.1  # of configs/quickstart.py: the codec is fitted on the other episodes


@dataclasses.dataclass(frozen=True)
class Demo:
    """The settings that determine the dataset."""

    episodes: int = 216
    image_size: int = 64
    seed: int = 0
    candidates: int = 24
    max_steps: int = 300


@dataclasses.dataclass(frozen=True)
class Episode:
    """T steps of the environment are T + 1 steps of RLDS: the last one holds only an observation.

    images: T + 1 PNG files; agent_pos (T + 1, 2) float32; action (T, 2) float32; reward (T,) float32.
    """

    seed: int
    images: list[bytes]
    agent_pos: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    coverage: float
    solved: bool


def define_flags() -> None:
    default = Demo()
    flags.DEFINE_integer("episodes", default.episodes, "demonstrations to keep", lower_bound=1)
    flags.DEFINE_integer("image_size", default.image_size, "height and width of the frames", lower_bound=8)
    flags.DEFINE_integer("seed", default.seed, "of the starts and of the expert", lower_bound=0)
    flags.DEFINE_integer("candidates", default.candidates, "pushes the expert simulates per decision", lower_bound=1)
    flags.DEFINE_integer("workers", 0, "processes; 0 = all cores", lower_bound=0)
    flags.DEFINE_string("output", None, "directory of the dataset; default $UWM_DATA_DIR/pusht")
    flags.DEFINE_bool("overwrite", False, "replace a dataset made with other flags")


def main(call: cli.Call) -> None:
    demo = Demo(FLAGS.episodes, FLAGS.image_size, FLAGS.seed, FLAGS.candidates)
    make(demo, _output(), FLAGS.workers, FLAGS.overwrite)


def _output() -> Path:
    return local_output() if FLAGS.output else local_place(data_dir() / "pusht", "UWM_DATA_DIR")


def make(demo: Demo, output: str | os.PathLike[str], workers: int = 0, overwrite: bool = False) -> None:
    """Makes the dataset in `output` and its RLDS source in `<output>_rlds`; existing ones of these settings are kept.

    Each replaces an older one only when it is complete, so an interrupted run loses nothing.

    Raises:
        UserError: another dataset is there, the extra `demo` is not installed, or the expert fails too often.
    """
    from data_prep.conversion.training_layout import (  # worker processes import this module without it
        is_training_dataset,
        reshard,
    )

    output = Path(output)
    source = Path(f"{os.path.abspath(output)}_rlds")
    made = _read_record(source)
    same = made is not None and made["demo"] == dataclasses.asdict(demo)
    if made is not None and same and made.get("fingerprint", "unfinished") == _fingerprint(output):
        if _is_current(output):
            print(f"{output}: {demo.episodes} demonstrations exist already, made with the same flags.")
            return
        print(f"{output} has the layout of another version; cutting it again from {source}.")
        overwrite = True
    if not is_vacant(output) and not overwrite:
        found = f"made with {made['demo']}" if made and not same else f"not cut from {source}"
        raise UserError(
            f"{output} holds another dataset ({found}); requested: {dataclasses.asdict(demo)}. "
            "Pass --overwrite to replace it, or another --output."
        )
    check_output(output, is_training_dataset, "a training dataset", overwrite=overwrite)
    if made is None or not same:
        _require_packages()
        check_output(source, _is_source, "the source of such a dataset", overwrite=overwrite)
        made = _write_source(demo, source, workers)
    reshard(source / made["dataset"], output, val_ratio=VAL_RATIO, workers=workers, overwrite=overwrite)
    # Last, so that a dataset that was not replaced is never mistaken for one made from this source.
    _write_record(source, made | {"fingerprint": _fingerprint(output)})
    print(f"{output}: {demo.episodes} demonstrations, {made['steps']} steps; {made['failed']} failed and were dropped.")


def _fingerprint(output: Path) -> str | None:
    """The fingerprint of a training dataset of any version; None if there is none, or it cannot be read."""
    from uwm_jax.data.records import fingerprint

    try:
        return fingerprint(read_json(output / "manifest.json"))
    except (OSError, UserError):
        return None


def _is_current(output: Path) -> bool:
    """Whether a training dataset is in the layout that this version reads."""
    from uwm_jax.data.records import read_manifest

    try:
        return bool(read_manifest(output))
    except UserError:
        return False


def episodes(demo: Demo, workers: int = 0) -> Iterator[tuple[int, Episode]]:
    """An endless iterator over (number, episode), solved and failed.

    Args:
        workers: processes; 0 = all cores, 1 = in this process.
    """
    workers = workers or cores()
    if workers == 1:
        yield from ((i, run_episode(i, demo)) for i in range(SEEDS_PER_RUN))
        return
    executor = pool(workers)
    try:
        waiting: collections.deque = collections.deque()
        for i in range(SEEDS_PER_RUN):
            waiting.append((i, executor.submit(run_episode, i, demo)))
            if len(waiting) > 2 * workers:  # so that no worker idles while a long episode runs
                number, future = waiting.popleft()
                yield number, future.result()
    finally:
        executor.shutdown(cancel_futures=True)


@functools.cache
def _tools(image_size: int, candidates: int) -> tuple[Any, PushTExpert, Renderer]:
    env = make_env()
    return env, PushTExpert(candidates=candidates), Renderer(env, image_size)


def run_episode(number: int, demo: Demo) -> Episode:
    """Episode `number`, until the block covers 95 % of the goal or `max_steps` have passed."""
    env, expert, render = _tools(demo.image_size, demo.candidates)
    seed = demo.seed * SEEDS_PER_RUN + number
    env.reset(seed=seed)
    expert.reset(seed)
    state = read_state(env)
    images, agent = [_png(render())], [state[:2]]
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    solved, coverage = False, 0.0
    while not solved and len(actions) < demo.max_steps:
        action = expert.act(state)
        _, reward, solved, _, info = env.step(action)
        state = read_state(env)
        coverage = float(info["coverage"])
        images.append(_png(render()))
        agent.append(state[:2])
        actions.append(action)
        rewards.append(reward)
    return Episode(
        seed,
        images,
        np.asarray(agent, np.float32),
        np.asarray(actions, np.float32),
        np.asarray(rewards, np.float32),
        coverage,
        bool(solved),
    )


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def rlds_record(episode: Episode) -> dict[str, Any]:
    """The episode in the form that TFDS writes.

    The last step repeats the last action (RLDS leaves it undefined; a zero would widen the range of the actions); its
    reward and discount are 0."""
    steps = len(episode.action)
    action = np.concatenate([episode.action, episode.action[-1:]])
    return {
        "steps": [
            {
                "observation": {"image": episode.images[t], "agent_pos": episode.agent_pos[t]},
                "action": action[t],
                "reward": episode.reward[t] if t < steps else np.float32(0),
                "discount": np.float32(t < steps),
                "is_first": t == 0,
                "is_last": t == steps,
                "is_terminal": t == steps and episode.solved,
            }
            for t in range(steps + 1)
        ],
        "episode_metadata": {"seed": episode.seed, "final_coverage": np.float32(episode.coverage)},
    }


def _require_packages() -> None:
    missing = [name for name in ("gym_pusht", "tensorflow_datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: not installed. Run `pip install 'uwm_jax[demo]'` (or `-e '.[demo]'` in a clone)."
        )


def _write_source(demo: Demo, directory: Path, workers: int) -> dict[str, Any]:
    """Writes the RLDS dataset with TFDS, episodes ordered by number; returns its record."""
    import tensorflow_datasets as tfds

    from data_prep.sources.pusht_rlds import PushtExpert

    tfds.disable_progress_bar()
    counts = {"episodes": 0, "failed": 0, "steps": 0}

    def records() -> Iterator[dict[str, Any]]:
        pause = 0.5 if sys.stderr.isatty() else 10.0  # seconds between lines of a log file
        with tqdm(total=demo.episodes, desc="demonstrations", unit="episode", mininterval=pause) as bar:
            for number, episode in episodes(demo, workers):
                if not episode.solved:
                    counts["failed"] += 1
                    bar.set_postfix(failed=counts["failed"])
                    if counts["failed"] > 10 + 2 * counts["episodes"]:
                        raise UserError(
                            f"the expert failed in {counts['failed']} of the first {number + 1} episodes: "
                            f"--candidates={demo.candidates} is too few (24 solve nearly all)."
                        )
                    continue
                yield rlds_record(episode)
                counts["episodes"] += 1
                counts["steps"] += len(episode.images)
                bar.update()
                if counts["episodes"] == demo.episodes:
                    return

    with building(directory) as new:
        builder = PushtExpert(demo.image_size, records, data_dir=new, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it reports a download
            builder.download_and_prepare()
        record = {"demo": dataclasses.asdict(demo), "dataset": os.path.relpath(builder.data_dir, new), **counts}
        _write_record(new, record)
    return record


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")


def _read_record(directory: Path) -> dict[str, Any] | None:
    """The record that `_write_record` wrote: the flags, `dataset` (the builder's directory), counts, and `fingerprint`
    of the training dataset once it is cut; None if this command did not make the directory."""
    try:
        record = read_json(directory / RECORD)
    except (OSError, UserError):
        return None
    return record if isinstance(record, dict) and {"demo", "dataset"} <= record.keys() else None


def _is_source(directory: Path) -> bool:
    return _read_record(directory) is not None


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
