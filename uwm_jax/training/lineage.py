"""All data that a run's parameters ever learned from, its own and that of the runs it goes back to.

A run's held-out episodes may be training episodes of its origin: of the same dataset with another
`config.data.val_ratio`, other episodes are held out. A checkpoint's assets keep what was learned from
(`learned_from`), and a text about held-out episodes that were not held out of it (`leak`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from uwm_jax.data.run_data import RunData
from uwm_jax.data.sources import of_episodes
from uwm_jax.data.windows import split_episodes
from uwm_jax.parallel.distributed import say

# Entries of the assets that a run keeps from its start; `branched_from` are the checkpoints, DIR@STEP, that it and the
# runs before it went on from (`config.branch_from`), the oldest first; `converted_from` are the names of the files of
# an official checkpoint, and which of its parameters were taken.
KEYS = ("learned_from", "leak", "latent_sizes", "branched_from", "converted_from")

# One dataset: {"fingerprint", "split", "val_ratio", "selection": which of its episodes, in words; "" for all}
Learned = Sequence[Mapping[str, Any]]

UNKNOWN = (
    "the origin does not say what it was trained on, so that episodes which are held out here may be among those it "
    "learned from"
)

_UNTOLD = f"Held out of this run's own training; {UNKNOWN}."


def kept(assets: Mapping[str, Any], branch: str = "") -> dict[str, Any]:
    """Entries that the next checkpoint of a run takes over from one before.

    Args:
      branch: DIR@STEP where the one before is another run's, else "".
    """
    entries = {key: assets[key] for key in KEYS if key in assets}
    return entries | {"branched_from": [*entries.get("branched_from", []), branch]} if branch else entries


def unknown() -> dict[str, Any]:
    """The entries of a converted training state, which does not tell what it was trained on."""
    return {"learned_from": None, "leak": _UNTOLD}


def begin(data: RunData, learned: Learned | None, has_origin: bool) -> dict[str, Any]:
    """The entries `learned_from` and `leak` of the assets of a run that starts; a leak is said.

    Args:
      data: its data.
      learned: what its parameters learned from before; None where an origin does not tell.
    """
    if not has_origin:
        return {"learned_from": of_data(data), "leak": None}
    told = leak(learned, data)
    if told:
        say(f"warning: {told}")
    return {"learned_from": None if learned is None else [*learned, *of_data(data)], "leak": told}


def of_data(data: RunData) -> list[dict[str, Any]]:
    """Datasets that a run itself learns from."""
    return [
        {
            "fingerprint": source.dataset.fingerprint,
            "split": source.dataset.split,
            "val_ratio": float(data.config.val_ratio),
            "selection": str(source.selection),
        }
        for source in data.sources.values()
    ]


def of_checkpoint(assets: Mapping[str, Any], data_iter: Mapping[str, Any], config: ConfigDict) -> Learned | None:
    """Datasets that a checkpoint's parameters learned from; None where it does not tell (a converted one).

    Args:
      assets: of the checkpoint.
      data_iter: its position in its data; {} for none.
      config: of its run.
    """
    if "learned_from" in assets:
        return assets["learned_from"]
    if not data_iter.get("datasets") or config.init_from:  # older ones do not tell what their origin knew
        return None
    splits = {name: s.split or config.data.split for name, s in config.data.sources.items()}
    datasets = {name: of_episodes(identity) for name, identity in data_iter["datasets"].items()}
    return [
        {
            "fingerprint": identity.partition(" (")[0],
            "split": splits.get(name, config.data.split),
            "val_ratio": float(config.data.val_ratio),
            "selection": identity.partition(" (")[2].removesuffix(")"),
        }
        for name, identity in datasets.items()
    ]


def leak(learned: Learned | None, data: RunData) -> str | None:
    """A sentence about held-out episodes that parameters learned from; None where there are none.

    Args:
      learned: what they learned from before this run, as `of_checkpoint` gives it.
      data: of this run.
    """
    if learned is None:
        return _UNTOLD
    parts = []
    for name, source in data.sources.items():
        dataset, here = source.dataset, set(source.held_out.tolist())
        seen: set[int] = set()
        ratios, some = [], ""
        for entry in learned:
            if (entry["fingerprint"], entry["split"]) == (dataset.fingerprint, dataset.split):
                trained, _ = split_episodes(dataset.num_episodes, entry["val_ratio"])
                if here & set(trained.tolist()):
                    seen |= here & set(trained.tolist())
                    ratios.append(f"{entry['val_ratio']:g}")
                    # Of those that it chose, no more is known than the rule.
                    if entry.get("selection", "") not in ("", str(source.selection)):
                        some = "up to "
        if seen:
            here_and_there = f"{data.config.val_ratio:g} here, {' and '.join(ratios)} there"
            parts.append(
                f"{some}{len(seen)} of {len(here)} held-out episodes of {name!r} were training episodes of the run "
                f"that this one started from (config.data.val_ratio={here_and_there})"
            )
    return "; ".join(parts) + "." if parts else None
