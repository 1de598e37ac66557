"""Image preprocessing on the device: uint8 frames to float images of the model's size, augmented for training.

The official order (torchvision's transforms on float tensors): resize, crop, colour jitter. All of it is pure
JAX meant to run inside the jitted step. What it costs, per frame of 240 x 320 -> 224 x 224: resize and
crop are one small product along each axis that changes size (only cropped pixels are computed; 0.1 GFLOP,
against 208 for SDXL's VAE); the jitter is about 150 operations per pixel and 20 passes over the image's memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.errors import UserError

LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision has them
BLENDS = ("brightness", "contrast", "saturation")
ORDERS = np.array(list(itertools.permutations(range(len(BLENDS) + 1))))  # of the blends and the hue
NUMBERS = 2 + len(BLENDS) + 1 + 1  # that decide a draw: crop's row and column, blends, hue, order

Planes = tuple[jax.Array, jax.Array, jax.Array]


class Jitter(NamedTuple):
    """One draw of colour jitter; every field has the draw's batch shape.

    Attributes:
        factor: {brightness, contrast, saturation: multiplier, 1 = unchanged}.
        hue: shift of the hue in turns, [-0.5, 0.5].
        rank: {operation: place in the order, 0 to 3}.
    """

    factor: dict[str, jax.Array]
    hue: jax.Array
    rank: dict[str, jax.Array]


def preprocess(
    current: Mapping[str, jax.Array],
    following: Mapping[str, jax.Array] | None,
    *,
    resize: tuple[int, int],
    crop: tuple[int, int],
    augment: Mapping[str, Any] | None = None,
    keys: jax.Array | None = None,
    numbers: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Images for the encoder and, where there are following frames, for the codec.

    Args:
        current: {camera: (B, T, H, W, 3) uint8}; cameras may differ in H and W.
        following: the same for the frames after the action chunk, or None.
        resize: (height, width) that every frame is resized to: bilinear, half-pixel centres, antialiased.
        crop: (height, width) cut out of it, without keys in the centre.
        augment: {random_crop: bool; brightness, contrast, saturation, hue: half-widths of their ranges, 0 = off;
            draw: "sample" = one draw per row and view, "batch" = one per view, from a key that all rows share}.
        keys: (B,) keys of the rows, or None for no augmentation. A row's draw depends on its own key only
            (draw "sample"), and all frames of a row and view, current and following, share it.
        numbers: (B, V, NUMBERS) float32 in [0, 1) that decide the draws in place of keys, or None.
    Returns:
        current and following images, (B, V, T, h, w, 3) float32 in [0, 1], cameras in sorted order.
    Raises:
        UserError: the crop is larger than the resized image.
    """
    if crop[0] > resize[0] or crop[1] > resize[1]:
        raise UserError(
            f"config.data.crop {tuple(crop)} is larger than config.data.resize {tuple(resize)}; "
            "make the crop smaller or the resize larger"
        )
    cameras = sorted(current)
    num_current = current[cameras[0]].shape[1]
    frames = {
        camera: current[camera] if following is None else jnp.concatenate([current[camera], following[camera]], 1)
        for camera in cameras
    }
    if numbers is None and keys is not None and augment is not None:
        numbers = _numbers(keys, len(cameras), augment["draw"])
    if numbers is None or augment is None:
        offsets, jitter = None, None
    else:
        offsets, jitter = _draw(numbers, resize, crop, augment)
    views = [
        _resize_and_crop(frames[camera], resize, crop, None if offsets is None else offsets[:, view])
        for view, camera in enumerate(cameras)
    ]
    planes = jnp.stack(views, axis=1)
    if jitter is not None and augment is not None:
        planes = color_jitter(planes, jitter, {name for name in (*BLENDS, "hue") if augment[name] > 0})
    images = jnp.moveaxis(planes, -3, -1)
    return images[:, :, :num_current], None if following is None else images[:, :, num_current:]


def is_augmented(resize: tuple[int, int], crop: tuple[int, int], augment: Mapping[str, Any]) -> bool:
    """Whether draws of the augmentation can differ at all."""
    moves = augment["random_crop"] and tuple(crop) != tuple(resize)
    return bool(moves) or any(augment[name] > 0 for name in (*BLENDS, "hue"))


def _numbers(keys: jax.Array, num_views: int, draw: str) -> jax.Array:
    """(B, V, NUMBERS) uniform numbers in [0, 1) of the rows' keys (B,)."""
    if draw == "batch":
        keys = jnp.broadcast_to(keys[:1], keys.shape)
    # one call of the generator: it is what is dear to compile and to run in a draw this small
    return jax.vmap(lambda key: jax.random.uniform(key, (num_views, NUMBERS)))(keys)


def _draw(
    numbers: jax.Array, resize: tuple[int, int], crop: tuple[int, int], augment: Mapping[str, Any]
) -> tuple[jax.Array | None, Jitter]:
    """Crop offsets (B, V, 2), None for the centre, and jitter with fields (B, V), of numbers (B, V, NUMBERS)."""
    uniform = jnp.moveaxis(numbers, -1, 0)

    def below(u: jax.Array, count: int) -> jax.Array:
        return jnp.minimum((u * count).astype(jnp.int32), count - 1)

    offsets = jnp.stack([below(uniform[axis], resize[axis] - crop[axis] + 1) for axis in (0, 1)], axis=-1)
    factor = {
        name: jnp.maximum(1 + augment[name] * (2 * u - 1), 0.0) for name, u in zip(BLENDS, uniform[2:5], strict=True)
    }
    hue = augment["hue"] * (2 * uniform[5] - 1)
    rank = jnp.moveaxis(jnp.asarray(ORDERS)[below(uniform[6], len(ORDERS))], -1, 0)
    jitter = Jitter(factor, hue, dict(zip((*BLENDS, "hue"), rank, strict=True)))
    return (offsets if augment["random_crop"] else None), jitter


# --- geometry ------------------------------------------------------------------------------------------------


def _resize_and_crop(
    frames: jax.Array, resize: tuple[int, int], crop: tuple[int, int], offsets: jax.Array | None
) -> jax.Array:
    """(B, T, H, W, 3) uint8 -> (B, T, 3, h, w) float32 in [0, 1]; offsets (B, 2) or None for the centre.

    Colours become planes here, while a pixel is one byte: products along the axes and the jitter want them so.
    """
    sizes = frames.shape[2:4]
    for axis in (0, 1):  # uint8 frames are cropped before they become floats four times as large
        if sizes[axis] == resize[axis] != crop[axis]:
            frames = _window(frames, crop[axis], axis + 2, _offset(offsets, resize, crop, axis))
    planes = jnp.moveaxis(frames, -1, -3).astype(jnp.float32) / 255
    for axis, formula in ((1, "btchm,...im->btchi"), (0, "btcmw,...im->btciw")):  # the cheaper product first
        if sizes[axis] != resize[axis]:
            matrix = jnp.asarray(resize_matrix(sizes[axis], resize[axis]))
            offset = _offset(offsets, resize, crop, axis)
            if offsets is None:
                rows, batch = _window(matrix, crop[axis], 0, offset), ""
            else:
                rows, batch = _window(matrix[None].repeat(len(frames), axis=0), crop[axis], 1, offset), "b"
            planes = jnp.einsum(formula.replace("...", batch), planes, rows, precision=jax.lax.Precision.HIGHEST)
    return planes


def _offset(offsets: jax.Array | None, resize: tuple[int, int], crop: tuple[int, int], axis: int) -> jax.Array | int:
    return round((resize[axis] - crop[axis]) / 2) if offsets is None else offsets[:, axis]


def _window(x: jax.Array, size: int, axis: int, offset: jax.Array | int) -> jax.Array:
    """`size` entries of `axis` from the offset, which may be (B,), one for each entry of the first axis."""
    if isinstance(offset, int):
        return jax.lax.slice_in_dim(x, offset, offset + size, axis=axis)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size, axis - 1))(x, offset)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) float32 weights of bilinear resampling with half-pixel centres.

    Shrinking widens the triangle to the new pixel's footprint (antialiasing); at the edges the weights are
    renormalised. Applied along each axis it is torch's `interpolate(..., "bilinear", antialias=True)`.
    """
    step = old / new
    centres = (np.arange(new) + 0.5) * step - 0.5
    distance = np.abs(np.arange(old)[None, :] - centres[:, None]) / max(step, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


# --- colour --------------------------------------------------------------------------------------------------


def color_jitter(planes: jax.Array, jitter: Jitter, enabled: set[str] | None = None) -> jax.Array:
    """Brightness, contrast, saturation and hue in the drawn order, as torchvision does on float images.

    Args:
        planes: images (*batch, T, 3, H, W) float32 in [0, 1].
        jitter: the draw, fields of shape `batch`.
        enabled: the operations to do, by default all four.
    Returns:
        images as planes, clamped to [0, 1] by each operation. Contrast is about a frame's own mean.

    The order differs from row to row, and a batched `switch` would compute all four operations in each of the
    four places. Instead: three of them are one formula, factor * x + rest, whose `rest` is the grey (saturation), its
    mean (contrast) or nothing; so a place is one blend with a row's own coefficients. And the hue, dear to
    compute, is computed once: three blends go before it and three after it, and a row uses each of its blends on
    the side that its order asks for and factor 1, which changes nothing, on the other.
    """
    enabled = set(jitter.rank) if enabled is None else enabled
    blends = [name for name in BLENDS if name in enabled]
    lead = jitter.hue.shape
    jitter = jax.tree.map(lambda x: x.reshape(*lead, *(1,) * (planes.ndim - 1 - len(lead))), jitter)
    # places among the enabled blends, without gaps
    rank = {a: sum((jitter.rank[a] > jitter.rank[b]).astype(jnp.int32) for b in blends) for a in blends}

    def blend_where(rgb: Planes, active: Mapping[str, jax.Array]) -> Planes:
        """Every row's blends in its order, of those that are active in the row."""

        def chosen(place: int, name: str) -> jax.Array:
            """factor - 1 of the operation, if it is the active one in this place."""
            if name not in blends:
                return jnp.zeros_like(jitter.hue)
            return jnp.where(active[name] & (rank[name] == place), jitter.factor[name] - 1, 0.0)

        places = [{name: chosen(place, name) for name in BLENDS} for place in range(len(blends))]

        def step(rgb: Planes, change: dict[str, jax.Array]) -> tuple[Planes, None]:
            gray = LUMA[0] * rgb[0] + LUMA[1] * rgb[1] + LUMA[2] * rgb[2]
            rest = -change["saturation"] * gray
            if "contrast" in blends:
                rest -= change["contrast"] * jnp.mean(gray, axis=(-2, -1), keepdims=True)
            factor = 1 + sum(change.values())
            r, g, b = (jnp.clip(factor * x + rest, 0.0, 1.0) for x in rgb)
            return (r, g, b), None

        # A loop, not for its length: XLA would otherwise fuse the blends into one expression, in which every
        # channel recomputes the three channels before it (minutes on a CPU).
        return jax.lax.scan(step, rgb, jax.tree.map(lambda *x: jnp.stack(x), *places))[0]

    everywhere = {name: jnp.ones_like(jitter.rank[name], bool) for name in blends}
    early = {name: jitter.rank[name] < jitter.rank["hue"] for name in blends} if "hue" in enabled else everywhere
    rgb: Planes = (planes[..., 0, :, :], planes[..., 1, :, :], planes[..., 2, :, :])
    if blends:
        rgb = blend_where(rgb, early)
    if "hue" in enabled:
        rgb = shift_hue(rgb, jitter.hue)
        if blends:
            rgb = blend_where(rgb, {name: ~value for name, value in early.items()})
    return jnp.stack(rgb, axis=-3)


def shift_hue(rgb: Planes, shift: jax.Array) -> Planes:
    """Turns the hue of red, green and blue planes by `shift` turns; keeps HSV's value and saturation.

    The same colours as torchvision's conversion to HSV and back, without the saturation (it cancels): the largest
    channel stays, and channel n becomes largest - chroma * clip(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6.
    """
    r, g, b = rgb
    largest = jnp.maximum(jnp.maximum(r, g), b)
    chroma = largest - jnp.minimum(jnp.minimum(r, g), b)
    red, green = largest == r, largest == g
    difference = jnp.where(red, g - b, jnp.where(green, b - r, r - g))
    sector = jnp.where(red, 0.0, jnp.where(green, 2.0, 4.0))
    hue = sector + difference / jnp.where(chroma > 0, chroma, 1.0) + 6 * shift  # in sixths of a turn
    hue = hue - 6 * jnp.floor(hue / 6)

    def channel(n: int) -> jax.Array:
        k = hue + n
        k = jnp.where(k >= 6, k - 6, k)
        return largest - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

    return channel(5), channel(3), channel(1)
