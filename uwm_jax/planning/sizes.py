"""Sizes of the data that a config reads: from its dataset where that is present, else as its file states them.

A config file states them in `data_sizes()` next to `get_config`: {key: size} of the keys that it reads, cameras as
(height, width), vectors as their width. Keys of the action are those of `config.data.action`, before its transforms.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import codecs
from uwm_jax import config as config_lib
from uwm_jax.data.choices import keys_of
from uwm_jax.data.fitted import read_fitted
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.places import dataset_dir
from uwm_jax.data.sources import keys_read, open_sources, spec_of
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.transforms import Columns, parse
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError, suggest

Sizes = Mapping[str, Any]  # {key: (height, width), or a width}

FLAG = "--sizes"


@dataclasses.dataclass(frozen=True)
class Data:
    """Sizes of the data of a run.

    Attributes:
      spec: the contents of a batch, without a normaliser.
      arrays: {name: shape} of a codec that was fitted to the dataset; None where the config's codec has its usual size.
      origin: where the sizes come from, for people.
    """

    spec: DataSpec
    arrays: dict[str, tuple[int, ...]] | None
    origin: str


def of_data(config: ConfigDict, file: str, given: Sequence[str] = ()) -> Data:
    """The sizes of the data of a config.

    Args:
      file: the flag `--config`.
      given: `KEY=SIZE` of `--sizes`, which count before `data_sizes()`.

    Raises:
      UserError: a size that nothing states, one of another type or of a key that the config does not read, a dataset
        that does not fit the config, or one that is present next to `given`.
    """
    stated = dict(map(_parsed, given))
    if _is_present(config.data):
        if stated:
            raise UserError(
                f"{FLAG} states sizes of data that are not there, but {dataset_dir(config.data.path)} is present and "
                f"has them: leave {FLAG} out, or name a config.data.path that does not exist."
            )
        sources = open_sources(config.data, 0)
        try:
            first = next(source for source in sources.values() if source.use_actions)
            place, cameras = first.dataset.directory, dict(first.samples.camera_keys)
            return Data(spec_of(list(sources.values())), _fitted(config, place, cameras), f"the dataset {place}")
        finally:
            for source in sources.values():
                source.dataset.close()
    spec = _stated(config, config_lib.data_sizes(file), stated, file.partition(":")[0])
    return Data(spec, None, f"{FLAG}, data_sizes() of {file}" if stated else f"data_sizes() of {file}")


def _is_present(data: ConfigDict) -> bool:
    """Whether the datasets of all sources are there."""
    places = [source.path or data.path for source in data.sources.values()] or [data.path]
    return all((dataset_dir(place) / "manifest.json").exists() for place in places)


def _fitted(config: ConfigDict, place: Any, cameras: Mapping[str, str]) -> dict[str, tuple[int, ...]] | None:
    kind, data = codecs.of_config(config), config.data
    if kind is None or not kind.arrays:
        return None
    arrays = read_fitted(place, kind.name, kind.arrays, cameras, crop=data.crop, val_ratio=data.val_ratio)
    return {name: array.shape for name, array in arrays.items()}


def _stated(config: ConfigDict, of_file: Sizes, given: Sizes, file: str) -> DataSpec:
    """The contents of a batch of the sizes that `--sizes` and, after it, `data_sizes()` of a file state."""
    data, stated, missing = config.data, {**of_file, **given}, []
    for name in (*data.cameras, data.text):  # a choice has the size of its first key
        first, *_ = keys_of(name, data.choices)
        if first in stated:
            stated.setdefault(name, stated[first])
    window = WindowSpec.from_config(data.window)
    (action,) = list(keys_read(data)["action"].values())[:1]
    parts = parse(action) if window.action else []
    cameras = sorted(data.cameras) if window.obs or window.next_obs else []
    examples = dict.fromkeys(cameras, "180x320")
    examples |= dict.fromkeys([*sorted(data.low_dim), *([data.text] if data.text else [])], "7")
    for columns, transform in parts:
        examples[columns.key] = str(transform.in_dim or 7) if columns == Columns(columns.key) else "7"
    for key in given:
        if key not in examples:
            raise UserError(
                f"{FLAG}: the config reads no {key!r}, expected {', '.join(examples)}.{suggest(key, list(examples))}"
            )
    for key, example in examples.items():
        if key not in stated:
            missing.append(f"{key}={example}")
        elif not _is_size(stated[key], 2 if key in cameras else 1):
            kind = "(height, width)" if key in cameras else "a width"
            raise UserError(
                f"{key}: expected {kind} of at least 1, found {stated[key]!r} in {FLAG} or data_sizes() of {file}."
            )
    if missing:
        raise UserError(
            f"the sizes of {len(missing)} key(s) of config.data are not known: there is no dataset at "
            f"{dataset_dir(data.path)}, and data_sizes() of {file} does not state them. Add them there, or state them: "
            f"{FLAG}={','.join(missing)} (sizes are examples)."
        )
    return DataSpec(
        window=window,
        cameras={name: (int(stated[name][0]), int(stated[name][1])) for name in cameras},
        low_dim={name: int(stated[name]) for name in sorted(data.low_dim)},
        action_dim=sum(t.width(str(columns), columns.width(int(stated[columns.key]))) for columns, t in parts),
        text_dim=int(stated[data.text]) if data.text else 0,
        normalizer=Normalizer(),
    )


def _is_size(value: Any, sides: int) -> bool:
    """Whether it is a positive integer, or as many of them as a camera has sides."""
    values = list(value) if sides > 1 and isinstance(value, list | tuple) else [value]
    return len(values) == sides and all(type(n) is int and n > 0 for n in values)


def _parsed(text: str) -> tuple[str, Any]:
    key, _, size = text.rpartition("=")
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if not key or not match:
        raise UserError(f"{FLAG}={text}: expected KEY=HEIGHTxWIDTH of a camera, or KEY=WIDTH of a vector.")
    return key, (int(match[1]), int(match[2])) if match[2] else int(match[1])
