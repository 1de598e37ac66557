"""Rows of sources that lack cameras or have frames of another size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from uwm_jax.config import base, source
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.data.samples import Clip, cover
from uwm_jax.errors import UserError

VIEWS = ("wrist", "exterior")  # not sorted: a source's keys stand for the model's in the config's order
OBS, NEXT = (0, 1), (5, 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("samples")
    rlds_source.make(root / "source", [21, 30, 25, 32])
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, chunk_steps=8, workers=1)
    return root / "out"


@pytest.fixture
def config(made: Path) -> ConfigDict:
    c = base().data
    c.path, c.cameras = str(made), VIEWS
    c.window.action, c.window.next_obs = (1, 2, 3, 4), NEXT
    c.num_streams, c.num_threads = 8, 0
    return c


def _loader(config: ConfigDict, **fields: Any) -> Loader:
    video = source(use_actions=False, weight=3, **fields)
    config.sources = ConfigDict({"robot": source(), "video": video})
    return Loader(RunData(config, seed=5), batch_size=16)


def _videos(loader: Loader, count: int = 48) -> list[tuple[dict[str, np.ndarray], Any]]:
    """({key: (4, H, W, 3) frames of a view}, trace) of the rows without actions among the first samples."""
    found = []
    for position in range(count):
        trace = loader.describe(position)
        if trace.source == "video":
            batch = loader.data.spec.empty(1)
            for name in batch:
                batch[name].fill(7)  # what is not written would show
            loader.load(batch, 0, 3, position)
            assert not batch["action_mask"][0] and not batch["action"].any() and batch["row"][0] == 3
            frames = {v: np.concatenate([batch[f"obs/{v}"][0], batch[f"next_obs/{v}"][0]]) for v in VIEWS}
            found.append((frames, trace))
    assert len(found) > count / 2
    return found


def _frames(config: ConfigDict, camera: str, trace: Any) -> np.ndarray:
    dataset = Dataset(config.path)
    key = f"observation/{camera}"
    out = np.empty((4, *dataset.cameras[key], 3), np.uint8)
    dataset.frames(trace.episode, {key: [trace.origin + i for i in OBS + NEXT]}, {key: out})
    return out


def _covered(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([cover(frame, size) for frame in frames])


@pytest.mark.parametrize("camera", ["wrist", "exterior"])
def test_same_copies_the_clip_to_every_view(config: ConfigDict, camera: str) -> None:
    for frames, trace in _videos(_loader(config, cameras=(camera,))):
        own = _frames(config, camera, trace)
        np.testing.assert_array_equal(frames["wrist"], _covered(own, (16, 16)))
        np.testing.assert_array_equal(frames["exterior"], _covered(own, (24, 32)))


def test_a_robots_one_camera_fills_two_views(config: ConfigDict) -> None:
    """The first of the two has the size of what it shows, and so has the other."""
    config.sources = ConfigDict({"robot": source(cameras=("wrist", "wrist"))})
    loader = Loader(RunData(config, seed=5), batch_size=16)
    assert loader.data.spec.cameras == dict.fromkeys(sorted(VIEWS), (16, 16))
    windows = loader.data.training_windows(8)
    for batch in (next(iter(loader)), windows.batch(0, 8)):
        assert batch["action_mask"].all()
        for group in ("obs", "next_obs"):
            np.testing.assert_array_equal(batch[f"{group}/wrist"], batch[f"{group}/exterior"])
    np.testing.assert_array_equal(
        np.concatenate([batch["obs/exterior"][0], batch["next_obs/exterior"][0]]),
        _frames(config, "wrist", Clip(int(windows.episodes[0]), int(windows.origins[0]))),
    )


def test_none_shows_the_clip_in_one_random_view(config: ConfigDict) -> None:
    loader = _loader(config, cameras=("wrist",), fill_views="none")
    shown = []
    for frames, trace in _videos(loader):
        (view,) = (v for v in VIEWS if frames[v].any())
        shown.append(view)
        size = {"wrist": (16, 16), "exterior": (24, 32)}[view]
        np.testing.assert_array_equal(frames[view], _covered(_frames(config, "wrist", trace), size))
    assert 0.25 < np.mean([view == "wrist" for view in shown]) < 0.75
    again = _videos(_loader(config, cameras=("wrist",), fill_views="none"))
    assert shown == [next(v for v in VIEWS if f[v].any()) for f, _ in again]


def test_random_shows_other_clips_in_the_other_views(config: ConfigDict) -> None:
    others = set()
    first = _videos(_loader(config, cameras=("wrist",), fill_views="random"))
    for frames, trace in first:
        np.testing.assert_array_equal(frames["wrist"], _frames(config, "wrist", trace))
        # A frame's colours tell its episode and step.
        episode, step = (
            round(float(frames["exterior"][0, ..., 0].mean()) / 20),
            frames["exterior"][0, ..., 1].mean() / 6,
        )
        clip = trace._replace(episode=episode, origin=round(float(step)))
        np.testing.assert_array_equal(frames["exterior"], _covered(_frames(config, "wrist", clip), (24, 32)))
        others.add((clip.episode, clip.origin))
        assert clip.origin + max(NEXT) < Dataset(config.path).episode_lengths[clip.episode]
    assert len(others) > len(first) / 2
    again = _videos(_loader(config, cameras=("wrist",), fill_views="random"))
    for (a, _), (b, _) in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["exterior"], b["exterior"])


@pytest.mark.parametrize("fill", ["same", "none", "random"])
def test_with_all_cameras_nothing_is_filled(config: ConfigDict, fill: str) -> None:
    for cameras in ((), ("wrist", "exterior")):
        for frames, trace in _videos(_loader(config, cameras=cameras, fill_views=fill), 16):
            for view in VIEWS:
                np.testing.assert_array_equal(frames[view], _frames(config, view, trace))


def test_a_source_without_actions_needs_none(config: ConfigDict, tmp_path: Path) -> None:
    config.low_dim, config.text = ("state",), "embedding"
    config.action = (("action", "identity"),)
    copy = Path(shutil.copytree(config.path, tmp_path / "silent"))
    manifest = json.loads((copy / "manifest.json").read_text())
    for key in ("action", "observation/state", "embedding"):
        del manifest["step_features"][key]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for path, has_text in ((config.path, True), (str(copy), False)):
        loader = _loader(config, cameras=("wrist",), path=path)
        _videos(loader, 24)
        position = next(n for n in range(100) if loader.describe(n).source == "video")
        batch = loader.data.spec.empty(1)
        loader.load(batch, 0, 0, position)
        assert not batch["obs/state"].any() and batch["obs/text"].any() == has_text
    with pytest.raises(UserError, match=r"no camera 'front'; it has: observation/exterior, observation/wrist"):
        _loader(config, cameras=("front",))


@pytest.mark.parametrize(
    ("shape", "size", "scaled"),
    [
        ((24, 32), (16, 16), (16, 22)),  # 21.33 rounded up
        ((16, 16), (24, 32), (32, 32)),
        ((90, 160), (180, 320), (180, 320)),
        ((360, 640), (180, 320), (180, 320)),
        ((240, 426), (180, 320), (181, 320)),
        ((49, 7), (7, 7), (49, 7)),
    ],
)
def test_cover_scales_by_the_larger_ratio_and_crops_the_centre(shape, size, scaled) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = cover(frame, size)
    assert found.shape == (*size, 3) and found.dtype == np.uint8
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    whole = np.asarray(Image.fromarray(frame).resize(scaled[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found, whole[top : top + size[0], left : left + size[1]])
