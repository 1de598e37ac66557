from __future__ import annotations

import colorsys
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.data import images
from uwm_jax.data.images import BLENDS, Jitter, color_jitter, preprocess, resize_matrix
from uwm_jax.errors import UserError

AUGMENT = {
    "random_crop": True, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2, "draw": "sample",
}  # fmt: skip
NO_COLOR = {**AUGMENT, **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)}


def frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def keys(n: int, seed: int = 0) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(n))


# --- torchvision's float operations, written from their definitions on one (H, W, 3) image in float64 ---


def reference_blend(image: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    return np.clip(factor * image + (1 - factor) * other, 0, 1)


def reference_op(name: str, image: np.ndarray, amount: float) -> np.ndarray:
    gray = (image @ np.array([0.2989, 0.587, 0.114]))[..., None]
    if name == "brightness":
        return reference_blend(image, 0.0, amount)
    if name == "contrast":
        return reference_blend(image, gray.mean(), amount)
    if name == "saturation":
        return reference_blend(image, gray, amount)
    turned = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb((h + amount) % 1, s, v) for h, s, v in turned]).reshape(image.shape)


def draw(order: tuple[str, ...], amounts: dict[str, float]) -> Jitter:
    rank = {name: jnp.full((1,), order.index(name)) for name in order}
    factor = {name: jnp.full((1,), amounts[name]) for name in BLENDS}
    return Jitter(factor, jnp.full((1,), amounts["hue"]), rank)


def jitter_once(image: np.ndarray, drawn: Jitter, enabled: set[str] | None = None) -> np.ndarray:
    planes = jnp.asarray(image, jnp.float32).transpose(2, 0, 1)[None, None]
    return np.asarray(color_jitter(planes, drawn, enabled)[0, 0]).transpose(1, 2, 0)


COLORS = np.concatenate([
    np.random.default_rng(3).uniform(size=(60, 3)),
    np.array(list(itertools.product((0.0, 0.5, 1.0), repeat=3))),  # greys, primaries, ties between channels
    np.array([[0.2, 0.2, 0.7], [0.9, 0.1, 0.9], [1 / 3, 2 / 3, 2 / 3]]),
]).reshape(9, 10, 3)  # fmt: skip


@pytest.mark.parametrize("amount", [-0.5, 0.0, 0.13])
def test_hue_equals_colorsys(amount):
    drawn = draw(("hue", *BLENDS), {**dict.fromkeys(BLENDS, 1.0), "hue": amount})
    np.testing.assert_allclose(jitter_once(COLORS, drawn), reference_op("hue", COLORS, amount), atol=3e-6)


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("amount", [0.0, 0.6, 1.0, 1.7])
def test_each_blend_alone(name, amount):
    drawn = draw((*BLENDS, "hue"), {**dict.fromkeys(BLENDS, 1.5), "hue": 0.3, name: amount})
    np.testing.assert_allclose(jitter_once(COLORS, drawn, {name}), reference_op(name, COLORS, amount), atol=1e-6)


def test_every_order_equals_the_operations_one_after_another():
    orders = list(itertools.permutations((*BLENDS, "hue")))
    rng = np.random.default_rng(0)
    amounts = {name: rng.uniform(0.4, 1.6, len(orders)) for name in BLENDS}  # wide enough to clamp between operations
    amounts["hue"] = rng.uniform(-0.5, 0.5, len(orders))
    batch = rng.uniform(size=(len(orders), 2, 4, 5, 3))  # two frames, each with its own mean
    rank = {name: jnp.array([order.index(name) for order in orders]) for name in orders[0]}
    drawn = Jitter({n: jnp.array(amounts[n]) for n in BLENDS}, jnp.array(amounts["hue"]), rank)
    result = jax.jit(color_jitter)(jnp.asarray(batch, jnp.float32).transpose(0, 1, 4, 2, 3), drawn)
    for i, order in enumerate(orders):
        for frame in range(2):
            expected = batch[i, frame]
            for name in order:
                expected = reference_op(name, expected, amounts[name][i])
            np.testing.assert_allclose(result[i, frame].transpose(1, 2, 0), expected, atol=2e-5, err_msg=str(order))


@pytest.mark.parametrize("enabled", [("brightness", "contrast"), ("saturation", "hue"), ("contrast", "hue"), ()])
def test_disabled_operations_do_not_happen(enabled):
    amounts = {"brightness": 0.7, "contrast": 1.4, "saturation": 1.5, "hue": 0.2}
    jitter = jax.jit(functools.partial(color_jitter, enabled=set(enabled)))
    for order in itertools.permutations((*BLENDS, "hue")):
        expected = COLORS
        for name in order:
            if name in enabled:
                expected = reference_op(name, expected, amounts[name])
        result = jitter(jnp.asarray(COLORS, jnp.float32).transpose(2, 0, 1)[None, None], draw(order, amounts))
        np.testing.assert_allclose(result[0, 0].transpose(1, 2, 0), expected, atol=2e-5)


# --- geometry ---


@pytest.mark.torch
@pytest.mark.parametrize(
    "old, new", [((9, 16), (15, 20)), ((45, 80), (72, 96)), ((20, 31), (13, 10)), ((8, 6), (8, 24))]
)
def test_resize_equals_torch(old, new):
    torch = pytest.importorskip("torch")
    x = frames(2, 3, *old)
    ours, _ = preprocess({"cam": x}, None, resize=new, crop=new)
    planes = torch.from_numpy(x.reshape(6, *old, 3)).permute(0, 3, 1, 2).double() / 255
    theirs = torch.nn.functional.interpolate(planes, new, mode="bilinear", align_corners=False, antialias=True)
    np.testing.assert_allclose(ours.reshape(6, *new, 3), theirs.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_resize_equals_jax_image():
    x = frames(1, 1, 18, 32)
    ours, _ = preprocess({"cam": x}, None, resize=(24, 21), crop=(24, 21))
    theirs = jax.image.resize(x[0, 0].astype(np.float32) / 255, (24, 21, 3), "bilinear", precision="highest")
    np.testing.assert_allclose(ours[0, 0, 0], theirs, atol=1e-5)


def test_equal_sizes_are_not_resized():
    np.testing.assert_array_equal(resize_matrix(7, 7), np.eye(7))
    x = frames(2, 2, 8, 10)
    call = functools.partial(preprocess, resize=(8, 10), crop=(8, 10))
    np.testing.assert_allclose(call({"cam": x}, None)[0][:, 0], x.astype(np.float32) / 255, atol=1e-7)
    assert "dot_general" not in str(jax.make_jaxpr(lambda x: call({"cam": x}, None)[0])(x))


@pytest.mark.parametrize("raw", [(20, 17), (10, 17), (20, 8), (10, 8)])  # neither, one or both axes change size
def test_centre_crop(raw):
    x = frames(2, 1, *raw)
    whole, _ = preprocess({"cam": x}, None, resize=(20, 17), crop=(20, 17))
    cropped, _ = preprocess({"cam": x}, None, resize=(20, 17), crop=(15, 12))
    top, left = round((20 - 15) / 2), round((17 - 12) / 2)  # 2.5 -> 2, Python's rounding, as torchvision's
    assert (top, left) == (2, 2)
    np.testing.assert_array_equal(cropped, whole[:, :, :, top : top + 15, left : left + 12])


@pytest.mark.parametrize("raw", [(12, 14), (6, 7)])
def test_random_crop_is_a_crop_and_reaches_every_offset(raw):
    x = np.broadcast_to(frames(1, 1, *raw), (64, 1, *raw, 3))
    whole = np.asarray(preprocess({"cam": x[:1]}, None, resize=(12, 14), crop=(12, 14))[0][0, 0, 0])
    cropped, _ = preprocess({"cam": x}, None, resize=(12, 14), crop=(10, 13), augment=NO_COLOR, keys=keys(64))
    found = set()
    for image in np.asarray(cropped[:, 0, 0]):
        matches = [
            (i, j) for i in range(3) for j in range(2) if np.allclose(image, whole[i : i + 10, j : j + 13], atol=1e-6)
        ]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) == 6


# --- the draw ---

SIZE = {"resize": (12, 14), "crop": (9, 10)}


def augmented(x: dict, y: dict | None, k: jax.Array, **changes) -> tuple[jax.Array, jax.Array | None]:
    return jax.jit(lambda x, y, k: preprocess(x, y, **SIZE, augment={**AUGMENT, **changes}, keys=k))(x, y, k)


def test_shapes_order_and_range():
    x = {"b": frames(2, 2, 12, 14), "a": frames(2, 2, 6, 9, seed=1)}
    y = {"b": frames(2, 3, 12, 14), "a": frames(2, 3, 6, 9, seed=1)}
    current, following = augmented(x, y, keys(2))
    assert current.shape == (2, 2, 2, 9, 10, 3) and following.shape == (2, 2, 3, 9, 10, 3)
    assert current.dtype == following.dtype == jnp.float32
    assert 0 <= float(jnp.minimum(current.min(), following.min()))
    assert float(jnp.maximum(current.max(), following.max())) <= 1
    plain, none = preprocess(x, None, **SIZE)
    assert none is None
    np.testing.assert_array_equal(plain[:, 0], preprocess({"a": x["a"]}, None, **SIZE)[0][:, 0])


def test_current_and_following_share_the_draw():
    x = {"a": frames(3, 2, 12, 14), "b": frames(3, 2, 12, 14, seed=1)}
    current, following = augmented(x, x, keys(3))
    np.testing.assert_array_equal(current, following)
    assert not np.allclose(current[:, 0], preprocess({"a": x["a"]}, None, **SIZE)[0][:, 0], atol=1e-3)


def test_views_and_rows_draw_independently():
    same = np.broadcast_to(frames(1, 1, 12, 14), (4, 1, 12, 14, 3))
    images_, _ = augmented({"a": same, "b": same}, None, keys(4))
    flat = np.asarray(images_).reshape(8, -1)
    for i, j in itertools.combinations(range(8), 2):
        assert np.abs(flat[i] - flat[j]).max() > 1e-2


def test_a_rows_draw_is_a_function_of_its_key():
    x = {"a": frames(5, 2, 12, 14), "b": frames(5, 2, 12, 14, seed=1)}
    all_rows, _ = augmented(x, None, keys(5))
    for row in range(5):
        one, _ = augmented({c: v[row : row + 1] for c, v in x.items()}, None, keys(5)[row : row + 1])
        np.testing.assert_allclose(all_rows[row], one[0], atol=1e-6)


def test_batch_draw_is_one_for_all_rows_and_differs_between_views():
    same = np.broadcast_to(frames(1, 1, 12, 14), (4, 1, 12, 14, 3))
    images_, _ = augmented({"a": same, "b": same}, None, keys(4), draw="batch")
    np.testing.assert_allclose(images_, np.broadcast_to(images_[:1], images_.shape), atol=1e-6)
    assert np.abs(np.asarray(images_[:, 0] - images_[:, 1])).max() > 1e-2


def test_given_numbers_decide_the_draws():
    x = {"a": frames(5, 2, 12, 14), "b": frames(5, 2, 12, 14, seed=1)}
    given = jnp.stack([jax.random.uniform(key, (2, images.NUMBERS)) for key in keys(5)])
    fields = {**SIZE, "augment": {**AUGMENT, "draw": "sample"}}
    found = preprocess(x, x, **fields, numbers=given)
    expected = preprocess(x, x, **fields, keys=keys(5))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_augmentation_is_known_to_change_nothing():
    still = {"random_crop": True, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    assert not images.is_augmented((8, 8), (8, 8), still) and images.is_augmented((8, 9), (8, 8), still)
    assert images.is_augmented((8, 8), (8, 8), still | {"hue": 0.1})


def test_draws_cover_their_ranges():
    numbers = images._numbers(keys(4000), 1, "sample")
    offsets, jitter = images._draw(numbers, (8, 9), (6, 6), {**AUGMENT, "hue": 0.1})
    np.testing.assert_array_equal(np.unique(offsets[..., 0]), [0, 1, 2])
    np.testing.assert_array_equal(np.unique(offsets[..., 1]), [0, 1, 2, 3])
    for name in BLENDS:
        assert 0.8 <= float(jitter.factor[name].min()) < 0.81 and 1.19 < float(jitter.factor[name].max()) <= 1.2
    assert -0.1 <= float(jitter.hue.min()) < -0.099 and 0.099 < float(jitter.hue.max()) <= 0.1
    orders = np.stack([np.asarray(jitter.rank[name])[:, 0] for name in (*BLENDS, "hue")], -1)
    np.testing.assert_array_equal(np.sort(orders, -1), np.broadcast_to(np.arange(4), orders.shape))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 4000 / 24 * 0.6
    values = np.stack([*(np.asarray(jitter.factor[n])[:, 0] for n in BLENDS), np.asarray(jitter.hue)[:, 0]])
    assert np.abs(np.corrcoef(values) - np.eye(4)).max() < 0.06


def test_without_keys_nothing_is_augmented():
    x = {"a": frames(2, 1, 12, 14)}
    np.testing.assert_array_equal(
        preprocess(x, None, **SIZE, augment=AUGMENT)[0], preprocess(x, None, **SIZE, augment=None)[0]
    )


def test_crop_larger_than_resize_is_refused():
    with pytest.raises(UserError, match=r"crop \(9, 15\) is larger than config.data.resize \(12, 14\)"):
        preprocess({"a": frames(1, 1, 12, 14)}, None, resize=(12, 14), crop=(9, 15))
