"""Fits the PCA image codec of a dataset on frames of its training episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from uwm_jax.data.fitted import content_digest
from uwm_jax.data.records import Dataset, short_key
from uwm_jax.data.windows import split_episodes
from uwm_jax.errors import UserError
from uwm_jax.files import writing

MAX_FRAMES = 2000
_MAX_BYTES = 1 << 26  # of decoded frames: bounds memory and time, and leaves enough patches


def check_options(size: tuple[int, int] | None, patch: int, channels: int, val_ratio: float) -> None:
    """Raises UserError that names the first option of `fit_codec` that is invalid for every dataset."""
    if patch < 1:
        raise UserError(f"--pca_patch={patch}: expected at least 1 pixel.")
    if not 1 <= channels <= patch * patch * 3:
        raise UserError(f"--pca_channels={channels}: expected 1 to {patch * patch * 3} for --pca_patch={patch}.")
    if size is not None and (min(size) < 1 or any(n % patch for n in size)):
        near = ",".join(str(max(patch, round(n / patch) * patch)) for n in size)
        raise UserError(
            f"--codec_size={size[0]},{size[1]}: expected positive multiples of --pca_patch={patch}, such as {near} "
            "(then config.data.resize and config.data.crop must be the same)."
        )
    if not 0 <= val_ratio < 1:  # false for NaN too
        raise UserError(f"--val_ratio={val_ratio}: expected a share of the episodes, 0 <= ratio < 1.")


def common_size(cameras: dict[str, tuple[int, int]], patch: int) -> tuple[int, int] | None:
    """The cameras' size, rounded down to whole patches; None if they differ or are smaller than a patch."""
    if len(set(cameras.values())) != 1:
        return None
    height, width = next(iter(cameras.values()))
    size = height // patch * patch, width // patch * patch
    return size if min(size) > 0 else None


def why_not_fitted(cameras: dict[str, tuple[int, int]], patch: int) -> str:
    """The reason why `common_size` is None, and the remedy."""
    if not cameras:
        return "there are no cameras"
    shapes = ", ".join(f"{short_key(key)} {h}x{w}" for key, (h, w) in cameras.items())
    height, width = (max(patch, min(size[axis] for size in cameras.values()) // patch * patch) for axis in (0, 1))
    return (
        f"the cameras have no common size that is a multiple of the patch ({shapes}). A config with the `pca` codec "
        f"needs it at the size of config.data.crop: reshard with --codec_size={height},{width} and set "
        "config.data.resize and config.data.crop to the same, or choose another size"
    )


def fit_codec(dataset: Dataset, file: Path, size: tuple[int, int], patch: int, channels: int, val_ratio: float) -> int:
    """Fits a codec per camera, with a common scale, at `size` (height, width), and writes it to `file`.

    The file is an npz with `<camera>/mean` (H, W, 3) float32 in [0, 1], `<camera>/components` (patch*patch*3, channels)
    float32, `scale` (), `patch`, `channels`, `image_size` (2,), `val_ratio`, `num_frames`, the dataset's `fingerprint`,
    and `digest`, the `content_digest` of these.

    Returns:
        The number of steps whose frames were used: evenly spaced over the training episodes of `val_ratio`.
    Raises:
        UserError: as `check_options`.
    """
    from uwm_jax.codecs import fit_pca  # imports JAX, which resharding's workers do not need

    check_options(size, patch, channels, val_ratio)
    cameras = sorted(dataset.cameras)
    height, width = size
    train, _ = split_episodes(dataset.num_episodes, val_ratio)
    ends = np.cumsum(dataset.episode_lengths[train])
    count = max(1, min(MAX_FRAMES, int(ends[-1]), _MAX_BYTES // (len(cameras) * height * width * 3)))
    frames = np.empty((count, len(cameras), height, width, 3), np.uint8)
    raw = {c: np.empty((1, *dataset.cameras[c], 3), np.uint8) for c in cameras}
    for i, step in enumerate(np.linspace(0, ends[-1] - 1, count).astype(np.int64)):
        e = int(np.searchsorted(ends, step, side="right"))
        offset = int(step - (ends[e - 1] if e else 0))
        dataset.frames(int(train[e]), dict.fromkeys(cameras, [offset]), raw)
        for v, camera in enumerate(cameras):
            frames[i, v] = _resized(raw[camera][0], size)
    params = fit_pca(frames, patch, channels)
    names = [short_key(c) for c in cameras]
    arrays = {f"{name}/{part}": params[part][v] for v, name in enumerate(names) for part in ("mean", "components")}
    about = dict(patch=patch, channels=channels, image_size=size, val_ratio=val_ratio, num_frames=count)
    arrays |= {"scale": params["scale"], **about, "fingerprint": dataset.fingerprint}
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    with writing(file, "wb") as out:
        np.savez(out, allow_pickle=False, **arrays, digest=content_digest(arrays))
    return count


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
