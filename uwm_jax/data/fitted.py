"""The PCA image codec, which the data jobs fit on a dataset's training episodes."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uwm_jax.data.records import fingerprint, read_manifest, short_key
from uwm_jax.errors import UserError
from uwm_jax.reading import again

_PATCH = 8  # of data_prep.reshard, unless --pca_patch says otherwise


def read_pca(
    dataset: str | os.PathLike[str],
    cameras: Sequence[str] | Mapping[str, str],
    crop: tuple[int, int],
    val_ratio: float,
) -> dict[str, np.ndarray]:
    """The arrays of a `PCACodec` from `<dataset>/codec/pca.npz`.

    Args:
      cameras: camera keys, with or without `observation/`; or {camera's name in the model: key in the dataset}.
      crop: (height, width) of the frames that the model sees.
      val_ratio: share of episodes that the run holds out; the codec must not have seen them.

    Returns:
      float32 {"mean": (V, H, W, 3), "components": (V, patch*patch*3, C), "scale": ()}, cameras sorted.

    Raises:
      UserError: there is none, it is damaged or edited, or it was fitted for other cameras, another size, another
        split or another dataset.
    """
    path = Path(dataset) / "codec" / "pca.npz"
    if not path.is_file():
        raise UserError(
            f"config.model.codec.name='pca' needs {path}, which data_prep.reshard fits on the training episodes, by "
            "itself where all cameras have one size. "
            f"{_codec_size(crop, _PATCH)}, or use config.model.codec.name='pixels'."
        )
    try:
        with np.load(io.BytesIO(again(path.read_bytes, path)), allow_pickle=False) as npz:
            stored = {name: npz[name] for name in npz.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again, or reshard the dataset again.") from e
    if str(stored.pop("digest", "")) != content_digest(stored):
        raise UserError(
            f"{path} is not as data_prep.reshard wrote it: its digest is not that of its content. Copy it again, or "
            "reshard the dataset again."
        )
    if (fitted_on := str(stored["fingerprint"])) != (found := fingerprint(read_manifest(dataset))):
        raise UserError(
            f"{path} was fitted on another dataset (fingerprint {fitted_on[:12]}, this one is {found[:12]}). "
            "Reshard the dataset again, or copy codec/pca.npz together with it."
        )
    keys = [short_key(cameras[c] if isinstance(cameras, Mapping) else c) for c in sorted(cameras)]
    missing = [key for key in keys if f"{key}/mean" not in stored]
    if missing:
        known = sorted(k.removesuffix("/mean") for k in stored if k.endswith("/mean"))
        raise UserError(f"{path}: holds no codec for camera {missing[0]!r}; it has {', '.join(known)}.")
    arrays = {
        "mean": np.stack([stored[f"{key}/mean"] for key in keys]).astype(np.float32),
        "components": np.stack([stored[f"{key}/components"] for key in keys]).astype(np.float32),
        "scale": stored["scale"].astype(np.float32),
    }
    fitted_ratio = float(stored["val_ratio"])
    size = arrays["mean"].shape[1:3]
    if size != tuple(crop):
        raise UserError(
            f"{path} was fitted on {size[0]}x{size[1]} images, but config.data.crop is {tuple(crop)}. Set "
            f"config.data.resize and config.data.crop to {size}. Or: {_codec_size(crop, int(stored['patch']))}."
        )
    if not np.isclose(fitted_ratio, val_ratio):
        raise UserError(
            f"{path} was fitted with {fitted_ratio:g} of the episodes held out, but config.data.val_ratio is "
            f"{val_ratio:g}, so it may have seen validation episodes: set config.data.val_ratio={fitted_ratio:g}, "
            f"or reshard with --val_ratio={val_ratio:g}."
        )
    return arrays


def _codec_size(crop: tuple[int, int], patch: int) -> str:
    """Advice for a codec of the frames that a model sees; it consists of patches of `patch` pixels."""
    size = tuple(max(patch, n // patch * patch) for n in crop)
    reshard = f"reshard the dataset again with --codec_size={size[0]},{size[1]}"
    if size == tuple(crop):
        return f"Make one of this size: {reshard}"
    return f"A codec has whole patches of {patch} pixels: set config.data.crop to {size} and {reshard}"


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of arrays with their names, dtypes and shapes, whatever their order."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
