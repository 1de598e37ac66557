"""A small dataset in the training layout whose episodes and steps have strings, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Instructions of each episode, as (steps, string) in order: constant, changing in the middle of a record, empty.
FIRST = [[(11, "push a block")], [(5, "pick it"), (9, "push it")], [(10, "")], [(9, "push a block")]]
SECOND = [[(11, "")], [(14, "pick")], [(4, "   "), (6, "put it down and push the button again")], [(9, "pick")]]
TASKS = ["push", "", "pick", "push"]
CHUNK_STEPS = 4


def strings(runs: list[tuple[int, str]]) -> list[str]:
    """The string of every step."""
    return [text for count, text in runs for _ in range(count)]


def make(root: Path) -> Path:
    """Writes a split `train` of four episodes and `val` of the last of them; returns the dataset's directory."""
    import tensorflow_datasets as tfds

    from data_prep.conversion.training_layout import reshard
    from tests.data import rlds_source

    f = tfds.features
    step = {
        "observation": f.FeaturesDict({"state": f.Tensor(shape=(2,), dtype=np.float32)}),
        "action": f.Tensor(shape=(2,), dtype=np.float32),
        "embedding": f.Tensor(shape=(3,), dtype=np.float32),
        "language_instruction": f.Text(),
        "language_instruction_2": f.Text(),
        "note": f.Tensor(shape=(1,), dtype=np.str_),
        "is_last": f.Scalar(dtype=np.bool_),
    }
    metadata = f.FeaturesDict({"file_path": f.Text(), "language_task": f.Text()})
    tree = f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": metadata})
    rng = np.random.default_rng(0)
    episodes = []
    for number, (first, second) in enumerate(zip(map(strings, FIRST), map(strings, SECOND), strict=True)):
        steps = [
            {
                "observation": {"state": rng.normal(size=2).astype(np.float32)},
                "action": rng.normal(size=2).astype(np.float32),
                "embedding": np.full(3, number, np.float32),
                "language_instruction": a,
                "language_instruction_2": b,
                "note": np.array([f"{number}"], dtype=object),
                "is_last": t == len(first) - 1,
            }
            for t, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        metadata_of = {"file_path": f"/{number}", "language_task": TASKS[number]}
        episodes.append(rlds_source.serialize(tree, {"steps": steps, "episode_metadata": metadata_of}))
    rlds_source.write(root / "source", {"train": [episodes[:2], episodes[2:]], "val": [episodes[3:]]}, tree)
    reshard(root / "source", root / "out", chunk_steps=CHUNK_STEPS, workers=1)
    return root / "out"
