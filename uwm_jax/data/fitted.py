"""Image codecs fitted to a dataset's training episodes, stored in the dataset's directory.

`<dataset>/codec/<name>.npz` holds `<camera>/<array>` for arrays with one entry per camera, `<array>` for the others,
`image_size` (2,), `val_ratio`, the dataset's `fingerprint`, and `digest`, the `content_digest` of all these.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from uwm_jax.data.records import fingerprint, read_manifest, short_key
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, as_place
from uwm_jax.reading import again

# Codecs that data_prep.reshard fits, with the side of their patches in pixels unless its flags say otherwise.
PATCHES = {"pca": 8}


def read_fitted(
    dataset: AnyPath,
    name: str,
    axes: Mapping[str, Sequence[str]],
    cameras: Sequence[str] | Mapping[str, str],
    *,
    crop: tuple[int, int],
    val_ratio: float,
) -> dict[str, np.ndarray]:
    """The arrays of a codec from `<dataset>/codec/<name>.npz`.

    Args:
      axes: {array: names of its axes}; those whose first axis is `view` are put together from the cameras'.
      cameras: camera keys, with or without `observation/`; or {camera's name in the model: key in the dataset}.
      crop: (height, width) of the frames that the model sees.
      val_ratio: share of episodes that the run holds out; the codec must not have seen them.

    Returns:
      float32 {array: with these axes}, cameras sorted.

    Raises:
      UserError: there is none, it is damaged or edited, or it was fitted to other cameras, another size, another
        split or another dataset.
    """
    path = as_place(dataset) / "codec" / f"{name}.npz"
    if not path.is_file():
        advice = "; the data jobs do not fit it"
        if name in PATCHES:
            advice = (
                ", which data_prep.reshard fits on the training episodes, by itself where all cameras have one size. "
                f"{_codec_size(crop, PATCHES[name])}"
            )
        raise UserError(
            f"config.model.codec.name={name!r} needs {path}{advice}, or use config.model.codec.name='pixels'."
        )
    stored = read_stored(dataset, name)
    keys = [short_key(cameras[c] if isinstance(cameras, Mapping) else c) for c in sorted(cameras)]
    per_view = [array for array, names in axes.items() if names[:1] == ("view",)]
    missing = [key for key in keys if any(f"{key}/{array}" not in stored for array in per_view)]
    if missing:
        known = sorted({key.rpartition("/")[0] for key in stored if "/" in key})
        raise UserError(f"{path}: holds no codec for camera {missing[0]!r}; it has {', '.join(known)}.")
    arrays = {
        array: np.stack([stored[f"{key}/{array}"] for key in keys]) if array in per_view else stored[array]
        for array in axes
    }
    fitted_ratio = float(stored["val_ratio"])
    size = tuple(int(n) for n in stored["image_size"])
    if size != tuple(crop):
        raise UserError(
            f"{path} was fitted on {size[0]}x{size[1]} images, but config.data.crop is {tuple(crop)}. Set "
            f"config.data.resize and config.data.crop to {size}. Or: {_codec_size(crop, int(stored.get('patch', 1)))}."
        )
    if not np.isclose(fitted_ratio, val_ratio):
        raise UserError(
            f"{path} was fitted with {fitted_ratio:g} of the episodes held out, but config.data.val_ratio is "
            f"{val_ratio:g}, so it may have seen validation episodes: set config.data.val_ratio={fitted_ratio:g}, "
            f"or reshard with --val_ratio={val_ratio:g}."
        )
    return {array: value.astype(np.float32) for array, value in arrays.items()}


def read_stored(dataset: AnyPath, name: str) -> dict[str, np.ndarray]:
    """All arrays of `<dataset>/codec/<name>.npz`, which exists.

    Raises:
      UserError: it is damaged or edited, or was fitted on another dataset.
    """
    path = as_place(dataset) / "codec" / f"{name}.npz"
    try:
        with np.load(io.BytesIO(again(path.read_bytes, path)), allow_pickle=False) as npz:
            stored = {name: npz[name] for name in npz.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again, or reshard the dataset again.") from e
    if str(stored.pop("digest", "")) != content_digest(stored):
        raise UserError(
            f"{path} has been damaged or edited (its digest differs from that of its content). Copy it again, or "
            "reshard the dataset again."
        )
    if (fitted_on := str(stored["fingerprint"])) != (found := fingerprint(read_manifest(dataset))):
        raise UserError(
            f"{path} was fitted on another dataset (fingerprint {fitted_on[:12]}, this one is {found[:12]}). "
            "Reshard the dataset again, or copy codec/pca.npz together with it."
        )
    return stored


def _codec_size(crop: tuple[int, int], patch: int) -> str:
    """Advice for a codec, of patches of `patch` pixels, that fits the frames of a model."""
    size = tuple(max(patch, n // patch * patch) for n in crop)
    reshard = f"reshard the dataset again with --codec_size={size[0]},{size[1]}"
    if size == tuple(crop):
        return f"For a codec of this size, {reshard}"
    return f"A codec has whole patches of {patch} pixels: set config.data.crop to {size} and {reshard}"


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of arrays with their names, dtypes and shapes, independent of their order."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
