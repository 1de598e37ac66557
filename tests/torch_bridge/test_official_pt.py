"""The `.pt` that is written is what the official code loads; what is read runs nothing, whatever entry holds it."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import official_pt

pytestmark = pytest.mark.torch

MODULES = ("datasets", "datasets.utils", "datasets.utils.normalizer")
TENSORS = {"net.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "net.bias": np.float32([-0.0, np.nan])}
PAIRS = {
    "action": (np.float32([2, 1 / 3]), np.float32([1, -1])),
    "gripper_position": (np.float32([0.5]), np.float32([0.25])),
}


@pytest.fixture
def official_classes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Classes with the official names and calls, of our own words."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    class LinearNormalizer:
        def __init__(self, scale: np.ndarray, offset: np.ndarray):
            self.scale, self.offset = scale, offset

        def __call__(self, raw: np.ndarray) -> np.ndarray:
            return (raw - self.offset) / self.scale

        def reconstruct(self, normalized: np.ndarray) -> np.ndarray:
            return normalized * self.scale + self.offset

    class NestedDictLinearNormalizer(dict):
        def __init__(self, stats: dict[str, Any]):
            super().__init__({key: LinearNormalizer(*pair) for key, pair in stats.items()})

        def __call__(self, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {key: self[key](value) if key in self else value for key, value in raw.items()}

    module = sys.modules[MODULES[-1]]
    for kind in (LinearNormalizer, NestedDictLinearNormalizer):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    return module


def test_the_official_code_loads_what_is_written(tmp_path: Path, official_classes: ModuleType) -> None:
    import torch

    official_pt.write(tmp_path / "models.pt", TENSORS, PAIRS, 4)
    stored = torch.load(tmp_path / "models.pt", map_location="cpu", weights_only=False)
    assert list(stored) == ["model", "action_normalizer", "lowdim_normalizer", "step"]
    assert stored["step"] + 1 == 4  # with which the official code goes on
    assert type(stored["action_normalizer"]) is official_classes.LinearNormalizer
    assert type(stored["lowdim_normalizer"]) is official_classes.NestedDictLinearNormalizer

    module = torch.nn.Module()
    module.net = torch.nn.Linear(3, 2)
    module.load_state_dict(stored["model"])  # strictly
    assert module.net.weight.detach().numpy().tobytes() == TENSORS["net.weight"].tobytes()
    action, low_dim = stored["action_normalizer"], stored["lowdim_normalizer"]
    np.testing.assert_array_equal(action(np.float32([[3, 0]])), np.float32([[1, 3]]))
    np.testing.assert_array_equal(action.reconstruct(np.float32([1, 3])), np.float32([3, 0]))
    assert action.scale[None].shape == (1, 2) and action.scale.dtype == np.float32
    given = {"gripper_position": np.float32([0.75]), "other": np.float32([7])}
    assert {key: value.tolist() for key, value in low_dim(given).items()} == {"gripper_position": [1.0], "other": [7.0]}


def test_the_restricted_reader_gets_the_same_bits(tmp_path: Path) -> None:
    official_pt.write(tmp_path / "models.pt", TENSORS, PAIRS, 4)
    assert not any(name in sys.modules for name in MODULES[1:])
    found = official_pt.read(tmp_path / "models.pt")
    assert list(found.tensors) == [f"model.{name}" for name in TENSORS]
    for name, value in TENSORS.items():
        assert found.tensors[f"model.{name}"].tobytes() == value.tobytes()
    assert found.normalizers.keys() == PAIRS.keys()
    for key, pair in PAIRS.items():
        for ours, theirs in zip(pair, found.normalizers[key], strict=True):
            assert ours.tobytes() == theirs.tobytes() and ours.dtype == theirs.dtype
    assert (found.step, found.optimizer) == (3, None)

    official_pt.write(tmp_path / "none.pt", TENSORS, {}, 0)  # the official code: None where a run has no normaliser
    assert official_pt.read(tmp_path / "none.pt").normalizers == {}


def test_numpy_is_named_as_its_first_version_has_it(tmp_path: Path) -> None:
    """The official environment has numpy 1, to which `numpy._core` is unknown."""
    official_pt.write(tmp_path / "models.pt", TENSORS, PAIRS, 4)
    assert b"numpy._core" not in pickle_of(tmp_path / "models.pt")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(stored: Any, file: Any, **more: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: .*models\.pt"):
        official_pt.write(tmp_path / "models.pt", TENSORS, PAIRS, 4)
    assert list(tmp_path.iterdir()) == []


# --- hostile files ----------------------------------------------------------------------------------


class Runs:
    """Pickles as a call that leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


ENTRIES = (
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "action_normalizer",
    "lowdim_normalizer",
    "step",
    "ema",
    "other",
)


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_entry_may_call_anything(tmp_path: Path, entry: str, optimizer: bool) -> None:
    import torch

    trace = tmp_path / "trace"
    stored = {"model": {"a": torch.zeros(1)}}
    for deep in (Runs(trace), {0: [Runs(trace)]}, OrderedDict(a=Runs(trace))):
        torch.save({**stored, entry: deep}, tmp_path / "models.pt")
        with pytest.raises(
            UserError, match=r"not a checkpoint of tensors and normalisers alone: it holds posix\.mkdir"
        ):
            official_pt.read(tmp_path / "models.pt", optimizer=optimizer)
        assert not trace.exists()


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "os system", "functools partial", "sys modules"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    repack(tmp_path / "models.pt", named(name) + pickle.STOP)
    with pytest.raises(UserError, match=rf"it holds (builtins\.)?{name.removeprefix('builtins ').replace(' ', '.')}"):
        official_pt.read(tmp_path / "models.pt", optimizer=True)


def named(name: str) -> bytes:
    return pickle.PROTO + b"\x02" + pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"


def test_types_that_are_allowed_are_not_numpy_s_own(tmp_path: Path) -> None:
    """`numpy.ndarray` can be called with a buffer: of objects, it would take any bytes for their addresses."""
    dtype = named("numpy dtype")[2:] + b"X\x02\0\0\0O8" + pickle.TUPLE1 + pickle.REDUCE
    shape, address = b"K\x01" + pickle.TUPLE1, b"X\x08\0\0\0" + b"\x01" * 8
    for code in (dtype, dtype.replace(b"O8", b"f8")):
        called = named("numpy ndarray") + shape + code + address + pickle.TUPLE3 + pickle.REDUCE
        repack(tmp_path / "models.pt", called + pickle.STOP)
        with pytest.raises(UserError, match="not a checkpoint of tensors and normalisers alone"):
            official_pt.read(tmp_path / "models.pt")


def test_what_the_process_allows_elsewhere_is_not_allowed_here(tmp_path: Path) -> None:
    import torch

    torch.save({"model": {"a": torch.zeros(1)}, "other": Path("x")}, tmp_path / "models.pt")
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([type(Path("x"))]):
        torch.load(tmp_path / "models.pt", weights_only=True)
        with pytest.raises(UserError, match="it holds pathlib"):
            official_pt.read(tmp_path / "models.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def repack(path: Path, content: bytes) -> None:
    """A `.pt` with another pickle."""
    official_pt.write(path, TENSORS, PAIRS, 4)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, value in parts.items():
            file.writestr(name, content if name.endswith("data.pkl") else value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_ends_in_a_message(tmp_path: Path) -> None:
    """Any byte of the pickle may differ: a UserError, or values of the kinds that the reader makes; never another."""
    official_pt.write(tmp_path / "whole.pt", TENSORS, PAIRS, 4)
    whole, rng = pickle_of(tmp_path / "whole.pt"), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(2, len(whole), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        repack(tmp_path / "models.pt", bytes(damaged))
        try:
            found = official_pt.read(tmp_path / "models.pt", optimizer=True)
            assert all(isinstance(value, np.ndarray) for value in found.tensors.values())
        except UserError as e:
            assert "models.pt" in str(e)
            refused += 1
    assert refused > 50


def test_a_dictionary_that_is_part_of_itself(tmp_path: Path) -> None:
    import torch

    stored: dict[str, Any] = {"a": torch.zeros(1)}
    stored["again"] = stored
    torch.save({"model": stored}, tmp_path / "models.pt")
    with pytest.raises(UserError, match="part of itself"):
        official_pt.read(tmp_path / "models.pt")
