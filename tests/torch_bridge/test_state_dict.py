"""Names without wrappers' prefixes, and the averaged weights that a file may hold as well."""

from __future__ import annotations

import pytest

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import state_dict

NAMES = ("noise_pred_net.pos_embed", "obs_encoder.img_encoder.model.fc.weight", "obs_encoder.vae.scale")


def choose(names: list[str], which: str = "model") -> tuple[list[str], list[str]]:
    """The names that are left of tensors with these names, each of which holds its place; and the notes."""
    found, notes = state_dict.choose({name: i for i, name in enumerate(names)}, which, "--input: x.pt")
    assert list(found.values()) == [i for i, name in enumerate(names) if i in found.values()]
    return list(found), notes


def test_official_names_stay_as_they_are() -> None:
    assert choose(list(NAMES)) == (list(NAMES), [])


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "state_dict.", "module._orig_mod.", "model.module._orig_mod.module."]
)
def test_prefixes_in_any_nesting_are_taken_off_and_told(prefix: str) -> None:
    found, notes = choose([prefix + name for name in NAMES])
    assert found == list(NAMES)
    (note,) = notes
    assert all(f"{part + '.'!r} from 3" in note for part in prefix.strip(".").split("."))


def test_a_part_that_was_wrapped() -> None:
    found, notes = choose(["noise_pred_net._orig_mod.module.pos_embed", *NAMES[1:]])
    assert found == list(NAMES) and "'_orig_mod.' from 1" in notes[0]


def test_the_average_is_taken_where_asked_for() -> None:
    names = [f"model.{name}" for name in NAMES] + [f"ema.module.{name}" for name in NAMES] + ["ema.n_averaged"]
    found, notes = state_dict.choose({name: name for name in names}, "model", "x")
    assert list(found.values()) == names[:3] and any("--weights=ema takes them" in note for note in notes)
    found, notes = state_dict.choose({name: name for name in names}, "ema", "x")
    assert list(found) == list(NAMES) and list(found.values()) == names[3:6]
    assert any("averaged weights" in note for note in notes)
    # A file of nothing else needs no flag.
    found, notes = state_dict.choose({name: name for name in names[3:]}, "model", "x")
    assert list(found) == list(NAMES) and any("averaged" in note for note in notes)


@pytest.mark.parametrize("outer", ["", "state_dict.", "module.", "model._orig_mod."])
@pytest.mark.parametrize("key", state_dict.EMA_KEYS)
def test_an_average_inside_of_containers_is_one(outer: str, key: str) -> None:
    names = [f"{outer}model.{name}" for name in NAMES] + [f"{outer}{key}.module.{name}" for name in NAMES]
    for which, expected in (("model", names[:3]), ("ema", names[3:])):
        found, _ = state_dict.choose({name: name for name in names}, which, "x")
        assert list(found) == list(NAMES) and list(found.values()) == expected


def test_what_cannot_be_chosen() -> None:
    with pytest.raises(UserError, match="two of its tensors are called"):
        choose([f"{key}.{NAMES[0]}" for key in state_dict.EMA_KEYS[:2]], "ema")
    with pytest.raises(UserError, match="--weights=ema: it holds no tensors under ema"):
        choose(list(NAMES), "ema")
    with pytest.raises(UserError, match="two of its tensors are called noise_pred_net.pos_embed"):
        choose([NAMES[0], f"module.{NAMES[0]}"])


def test_only_the_entries_of_a_checkpoint_that_hold_weights_are_searched() -> None:
    stored = {"model": {"module": {"a": 1.0, "b": "no tensor"}}, "optimizer": {"state": {0: {"exp_avg": 2.0}}}}
    assert state_dict.flatten(state_dict.containers(stored), float) == {"model.module.a": 1.0}
    bare = {"a": 1.0, "optimizer": {"x": 2.0}}
    assert state_dict.flatten(state_dict.containers(bare), float) == {"a": 1.0}
