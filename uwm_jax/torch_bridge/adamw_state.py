"""The state of torch's AdamW in an official checkpoint, `optimizer`, under the names of the parameters.

The official code makes `torch.optim.AdamW(model.parameters())`, frozen parameters included, and saves its
`state_dict()`: `state` maps the index of a parameter to {`step`, `exp_avg`, `exp_avg_sq`} and has no entry for a
parameter without a gradient; the one group of `param_groups` holds the indices and the numbers of the update. Index i
is the i-th tensor of `model` in its own order, buffers left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uwm_jax.errors import UserError

FLAG = "--optimizer"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FIELDS = {"step", *_MOMENTS}
_UNLIKE = {"amsgrad": True, "maximize": True, "decoupled_weight_decay": False}  # of the group; ours does none of it


@dataclass(frozen=True)
class AdamWState:
    """AdamW after some steps.

    Attributes:
      first, second: {official name: array in the parameter's layout} of the parameters that have been updated: moving
        averages of the gradient and of its square, without the correction of their bias.
      updates: how often each of them was updated, from 1 on.
      steps: finished steps of the run. Less than that were updates where a step had a gradient that was not finite, and
        mixed precision skipped it.
      learning_rate: the peak, which a schedule scales; rate: the one of the next step.
      b1, b2, eps, weight_decay: as in `config.optimizer`.
    """

    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]
    updates: int
    steps: int
    learning_rate: float
    rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float


def read(optimizer: Any, step: Any, names: Sequence[str], where: str) -> AdamWState:
    """A stored `optimizer`.

    Args:
      optimizer: the dictionary, its tensors as numpy arrays; None where the file has none.
      step: the checkpoint's `step`: number of its last finished step, counted from 0; None where the file has none.
      names: of the parameters, in the order of `model`.
      where: names the file in messages.

    Raises:
      UserError: it is not the state of one AdamW over these parameters; names the entry.
    """
    where = f"{FLAG}: {where}: its `optimizer`"
    if not isinstance(optimizer, Mapping) or not optimizer.keys() >= {"state", "param_groups"}:
        raise UserError(
            f"{where} should be the state of torch.optim.AdamW, with the keys state and param_groups; found "
            f"{_kind(optimizer)}. Leave {FLAG} out to take the weights alone."
        )
    state, numbers = optimizer["state"], _group(optimizer["param_groups"], len(names), where)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{where} holds no moments: no step was made with it. Leave {FLAG} out.")
    moments: dict[str, dict[str, np.ndarray]] = {part: {} for part in _MOMENTS}
    counts: dict[str, int] = {}
    for index, entry in state.items():
        if type(index) is not int or not 0 <= index < len(names):
            raise UserError(
                f"{where}: state[{index!r:.40}]: expected indices from 0 to {len(names) - 1}, as in `model`."
            )
        place = f"{where}: state[{index}] ({names[index]})"
        if not isinstance(entry, Mapping) or entry.keys() != _FIELDS:
            raise UserError(f"{place} should hold {', '.join(sorted(_FIELDS))}; found {_kind(entry)}.")
        for part in _MOMENTS:
            if not isinstance(entry[part], np.ndarray):
                raise UserError(f"{place}: {part} should be a tensor, found {_kind(entry[part])}.")
            moments[part][names[index]] = entry[part]
        counts[names[index]] = _count(entry["step"], place)
    updates = next(iter(counts.values()))
    if others := [name for name, count in counts.items() if count != updates]:
        raise UserError(
            f"{where}: {next(iter(counts))} was updated {updates} times, {others[0]} {counts[others[0]]} times. Only "
            "parameters that were trained from the same step on can continue."
        )
    return AdamWState(
        first=moments["exp_avg"],
        second=moments["exp_avg_sq"],
        updates=updates,
        steps=_finished(step, updates, where),
        **numbers,
    )


def _group(groups: Any, count: int, where: str) -> dict[str, float]:
    """The numbers of the one parameter group."""
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], Mapping):
        found = f"{len(groups)} groups" if isinstance(groups, list) else _kind(groups)
        raise UserError(f"{where}: param_groups should be one group of all parameters, found {found}.")
    (group,) = groups
    if group.get("params") != list(range(count)):
        listed = group.get("params")
        found = f"{len(listed)} indices" if isinstance(listed, list) else _kind(listed)
        raise UserError(
            f"{where}: param_groups[0]['params'] should be 0 to {count - 1}, one for each of the {count} tensors of "
            f"`model` that are no buffers; found {found}."
        )
    for name, value in _UNLIKE.items():
        if group.get(name, not value) is value:
            raise UserError(f"{where}: param_groups[0]['{name}'] is {value}, which our AdamW does not have.")
    betas = group.get("betas")
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise UserError(f"{where}: param_groups[0]['betas'] should be two numbers, found {betas!r:.60}.")
    values: dict[str, Any] = {name: group.get(name) for name in ("lr", "eps", "weight_decay")}
    values |= {"b1": betas[0], "b2": betas[1], "learning_rate": group.get("initial_lr", group.get("lr"))}
    numbers = {name: _number(value, f"{where}: param_groups[0]: {name}") for name, value in values.items()}
    numbers["rate"] = numbers.pop("lr")
    return numbers


def _number(value: Any, where: str) -> float:
    """A finite number from 0 on, which may be an array of one."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iuf" or not 0 <= (number := float(array.reshape(()))) < np.inf:
        raise UserError(f"{where} should be a number from 0 on, found {value!r:.60}.")
    return number


def _count(value: Any, where: str) -> int:
    number = _number(value, f"{where}: step")
    if number < 1 or number != int(number) or number >= 2**31:
        raise UserError(f"{where}: step should count updates from 1 on, found {number:g}.")
    return int(number)


def _finished(step: Any, updates: int, where: str) -> int:
    """Finished steps of the run. Its last one has a number counted from 0; that of another loop may count from 1."""
    if step is None:
        return updates
    last = _number(step, f"{where.removesuffix('its `optimizer`')}its `step`")
    if last != int(last) or last >= 2**31 - 1 or last + 1 < updates:
        raise UserError(
            f"{where} was updated {updates} times, which does not fit a checkpoint whose last finished step has the "
            f"number {last:g}, counted from 0."
        )
    return updates if last == updates else int(last) + 1


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary with {', '.join(map(str, list(value)[:6])) or 'nothing'}"
    return "none" if value is None else type(value).__name__
