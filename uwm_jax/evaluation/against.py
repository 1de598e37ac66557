"""Another closed loop, read from its folder, that a new one is compared with on the same starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uwm_jax.envs import EnvSpec
from uwm_jax.envs.parallel import EpisodeResult
from uwm_jax.errors import UserError
from uwm_jax.evaluation.closed_loop import NO_ACTION, POLICY
from uwm_jax.files import Place
from uwm_jax.reading import read_json


class Against(NamedTuple):
    """A closed loop of before: what metrics call it, its folder, and the episodes of its policy, of whose actions and
    scores the best and the last are known alone."""

    name: str
    folder: Place
    episodes: list[EpisodeResult]

    def first_chunks(self, results: Sequence[EpisodeResult]) -> float | None:
        """The largest difference between the first chunks of episodes of both, normalised; None where they have none
        of one shape."""
        pairs = [(a.first_chunk, b.first_chunk) for a, b in zip(results, self.episodes, strict=True)]
        if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
            return None
        return max(float(np.abs(a - b).max()) for a, b in pairs if a is not None and b is not None)


def read(folder: Place, spec: EnvSpec, seeds: Sequence[int], flag: str = "--against") -> Against:
    """Reads the `episodes.json` of a folder that `rollout` wrote.

    Raises:
        UserError: there is none, it is damaged, or of another environment or other starts.
    """
    file = folder / "episodes.json"
    where = f"{flag}={folder}"
    try:
        how = read_json(file)
    except OSError as e:
        raise UserError(f"{where}: cannot read {file.name} ({e.strerror}). Expected a folder of a closed loop.") from e
    try:
        env, episodes = how["env"], [_episode(entry, spec) for entry in how["episodes"][POLICY]]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{file}: it is not as `rollout` writes it ({type(e).__name__}: {e}).") from e
    starts = [episode.seed for episode in episodes]
    if env != spec.name or how.get("max_steps") != spec.max_steps or starts != list(seeds):
        raise UserError(
            f"{where}: expected {len(seeds)} episodes of {spec.name} from seed {seeds[0]} on, of {spec.max_steps} "
            f"steps at most; found {len(starts)} of {env} from seed {starts[0] if starts else None} on. Give the same "
            "--env, --episodes and --first_seed."
        )
    name = folder.resolve().name
    if name in (POLICY, NO_ACTION):
        raise UserError(f"{where}: {name!r} names other metrics. Give the folder another name.")
    return Against(name, folder, episodes)


def _episode(entry: dict[str, Any], spec: EnvSpec) -> EpisodeResult:
    scores = np.array([float(entry[f"max_{spec.score}"]), float(entry[f"last_{spec.score}"])])
    if not np.isfinite(scores).all() or not isinstance(entry["success"], bool):
        raise ValueError("an episode lacks a finite score, or whether it was a success")
    chunk = entry.get("first_chunk")
    return EpisodeResult(
        int(entry["seed"]),
        scores,
        np.zeros((0, spec.action_dim)),
        entry["success"],
        math.nan if entry.get("seam") is None else float(entry["seam"]),
        None if chunk is None else np.asarray(chunk, np.float32),
    )
