"""Not in `test_reshard`: sizes, and the choice of frames when there are too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.conversion import codec
from uwm_jax.codecs import fit_pca
from uwm_jax.data.windows import split_episodes
from uwm_jax.errors import UserError


@pytest.mark.parametrize(
    ("cameras", "patch", "expected"),
    [
        ({"a": (64, 64), "b": (64, 64)}, 8, (64, 64)),
        ({"a": (180, 320)}, 8, (176, 320)),
        ({"a": (180, 320), "b": (180, 321)}, 8, None),
        ({"a": (7, 64)}, 8, None),
        ({}, 8, None),
    ],
)
def test_common_size(cameras: dict[str, tuple[int, int]], patch: int, expected: tuple[int, int] | None) -> None:
    assert codec.common_size(cameras, patch) == expected


def test_the_paper_like_options_are_accepted() -> None:
    codec.check_options(None, 8, 192, 0.0)
    codec.check_options((240, 320), 8, 1, 0.999)


class _Frames:
    """Stands for a Dataset: every frame is its episode and step, and reading one is recorded."""

    cameras = {"observation/a": (8, 8)}
    fingerprint = "none"

    def __init__(self, lengths: list[int]):
        self.episode_lengths, self.num_episodes = np.asarray(lengths), len(lengths)
        self.read: list[tuple[int, int]] = []

    def frames(self, episode: int, steps: dict[str, list[int]], into: dict[str, np.ndarray]) -> None:
        for key, indices in steps.items():
            for place, step in enumerate(indices):
                rng = np.random.default_rng([episode, step])
                into[key][place] = rng.integers(0, 256, (8, 8, 3))
                self.read.append((episode, step))


def _fit(dataset: Any, tmp_path: Path, **options: Any) -> dict[str, np.ndarray]:
    arguments = {"size": (8, 8), "patch": 4, "channels": 3, "val_ratio": 0.3} | options
    codec.fit_codec(dataset, tmp_path / "codec" / "pca.npz", **arguments)
    with np.load(tmp_path / "codec" / "pca.npz", allow_pickle=False) as stored:
        return dict(stored)


def test_too_many_steps_are_thinned_evenly_over_training_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_FRAMES", 10)
    dataset = _Frames([30, 1, 40, 29, 12, 7, 90])
    stored = _fit(dataset, tmp_path)
    train, _ = split_episodes(7, 0.3)
    places = [(int(e), t) for e in train for t in range(dataset.episode_lengths[e])]
    indices = [places.index(p) for p in dataset.read]
    assert indices[0] == 0 and indices[-1] == len(places) - 1 and len(indices) == 10 == int(stored["num_frames"])
    assert np.ptp(np.diff(indices)) <= 1
    frames = np.stack([np.random.default_rng(p).integers(0, 256, (1, 8, 8, 3)) for p in dataset.read])
    expected = fit_pca(frames.astype(np.uint8), 4, 3)
    np.testing.assert_array_equal(stored["a/components"], expected["components"][0])
    assert float(stored["val_ratio"]) == 0.3


def test_all_steps_are_used_where_they_are_few(tmp_path: Path) -> None:
    dataset = _Frames([3, 5])
    assert int(_fit(dataset, tmp_path, val_ratio=0.0)["num_frames"]) == 8
    assert dataset.read == [(0, t) for t in range(3)] + [(1, t) for t in range(5)]


def test_options_are_checked_here_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pca_channels=49: expected 1 to 48"):
        _fit(_Frames([3, 5]), tmp_path, channels=49)
    assert list(tmp_path.iterdir()) == []


def test_the_advice_for_cameras_of_two_sizes_can_be_followed() -> None:
    cameras = {"observation/front": (481, 640), "observation/wrist": (128, 130)}
    advice = codec.why_not_fitted(cameras, 8)
    assert "front 481x640, wrist 128x130" in advice and "--codec_size=128,128" in advice
    assert codec.common_size(cameras, 8) is None
    codec.check_options((128, 128), 8, 12, 0.05)
    with pytest.raises(UserError, match="--codec_size=116,120: .*multiples of --pca_patch=8, such as 112,120"):
        codec.check_options((116, 120), 8, 12, 0.05)
    small = codec.why_not_fitted({"observation/a": (4, 30), "observation/b": (30, 30)}, 8)
    assert "--codec_size=8,24" in small
    assert codec.why_not_fitted({}, 8) == "there are no cameras"
