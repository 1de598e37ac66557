"""Writes small hdf5 files in the layouts of robomimic and LIBERO with h5py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.data_prep.clips import picture

SIZE = (32, 48)


def demo(number: int, length: int, *, pictures: Sequence[str], upside_down: bool) -> dict[str, np.ndarray]:
    """The arrays of a demonstration; pictures are numbered from `3 * number`."""
    rng = np.random.default_rng(number)
    frames = np.stack([picture(3 * number + i, SIZE) for i in range(length)])
    arrays: dict[str, np.ndarray] = {f"obs/{name}": frames[:, ::-1] if upside_down else frames for name in pictures}
    return arrays | {
        "actions": rng.normal(size=(length, 7)),
        "rewards": np.eye(1, length, length - 1)[0],
        "dones": np.eye(1, length, length - 1, dtype=np.int64)[0],
        "obs/ee_pos": rng.normal(size=(length, 3)),
        "obs/gripper": rng.normal(size=length).astype(np.float32),
    }


def write(
    file: Path,
    demos: Mapping[str, Mapping[str, np.ndarray]],
    attributes: Mapping[str, Any],
    masks: Mapping[str, Sequence[str]] | None = None,
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as out:
        data = out.create_group("data")
        for key, value in attributes.items():
            data.attrs[key] = value
        for name, arrays in demos.items():
            group = data.create_group(name)
            group.attrs["num_samples"] = len(arrays["actions"]) if "actions" in arrays else 0
            for key, array in arrays.items():
                group[key] = array
        for name, members in (masks or {}).items():
            out[f"mask/{name}"] = np.array([member.encode() for member in members])


def libero(file: Path, lengths: Sequence[int], language: Any = "open the drawer", states: int = 9) -> list[dict]:
    """A task of LIBERO: pictures upside down, as its simulator draws them. Returns the demonstrations."""
    pictures = ("agentview_rgb", "eye_in_hand_rgb")
    demos = [demo(i, n, pictures=pictures, upside_down=True) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        demos[i]["states"] = np.full((n, states), float(i))
    info = {"problem_name": "libero_kitchen", "language_instruction": language}
    env = {"env_name": "Libero_Kitchen", "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}
    attributes = {"problem_info": json.dumps(info), "env_args": json.dumps(env), "bddl_file_name": "task.bddl"}
    write(file, {f"demo_{i}": d for i, d in enumerate(demos)}, attributes)
    return demos


def robomimic(file: Path, lengths: Sequence[int], masks: Mapping[str, Sequence[str]] | None = None) -> list[dict]:
    """A file of robomimic, with the observations of the following steps and a depth picture."""
    demos = [demo(i, n, pictures=("agentview_image",), upside_down=False) for i, n in enumerate(lengths)]
    for d in demos:
        d["next_obs/ee_pos"] = d["obs/ee_pos"]
        d["obs/agentview_depth"] = np.zeros((len(d["actions"]), *SIZE, 1), np.float32)
    env = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}
    write(file, {f"demo_{i}": d for i, d in enumerate(demos)}, {"env_args": json.dumps(env), "total": 0}, masks)
    return demos
