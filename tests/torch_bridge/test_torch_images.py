"""Torch's preprocessing against ours."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.data import images
from uwm_jax.data.images import BLENDS, Jitter

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from uwm_jax.torch_bridge import torch_images  # noqa: E402

AUGMENT = {"random_crop": True, "brightness": 0.2, "contrast": 0.4, "saturation": 0.6, "hue": 0.3}
OFF = dict.fromkeys(AUGMENT, 0.0)

# noise, greys, primaries and ties between channels, as two images of (3, 6, 5)
COLORS = np.concatenate([
    np.random.default_rng(3).uniform(size=(30, 3)),
    np.array(list(itertools.product((0.0, 0.5, 1.0), repeat=3))), np.full((3, 3), 0.25),
]).reshape(2, 6, 5, 3).transpose(0, 3, 1, 2).astype(np.float32)  # fmt: skip


def ours(planes, drawn):
    """`color_jitter` of `uwm_jax.data.images` with one draw for all images."""
    order = [name for name, _ in drawn] + [name for name in torch_images.OPERATIONS if name not in dict(drawn)]
    amounts = {**dict.fromkeys(BLENDS, 1.0), "hue": 0.0, **dict(drawn)}
    jitter = Jitter(
        {name: jnp.full((1,), amounts[name]) for name in BLENDS},
        jnp.full((1,), amounts["hue"]),
        {name: jnp.full((1,), order.index(name)) for name in order},
    )
    return images.color_jitter(jnp.asarray(planes)[None], jitter)[0]


@pytest.mark.parametrize("name", torch_images.OPERATIONS)
@pytest.mark.parametrize("amount", [-0.4, 0.0, 0.13, 0.5, 1.7])
def test_each_operation_alone(name, amount):
    if name == "hue" or amount >= 0:
        found = torch_images.color_jitter(torch.from_numpy(COLORS), [(name, amount)])
        np.testing.assert_allclose(found, ours(COLORS, [(name, amount)]), atol=3e-6)


def test_operations_in_drawn_order():
    torch.manual_seed(0)
    orders = set()
    for _ in range(8):
        drawn = torch_images.draw_jitter(AUGMENT)
        orders.add(tuple(name for name, _ in drawn))
        for name, amount in drawn:
            assert 0 < abs(amount - (name != "hue")) <= AUGMENT[name]
        found = torch_images.color_jitter(torch.from_numpy(COLORS), drawn)
        np.testing.assert_allclose(found, ours(COLORS, drawn), atol=5e-6)
    assert len(orders) > 4
    assert torch_images.draw_jitter(OFF) == []


def frames(*shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def tensors(views):
    return [torch.from_numpy(views[name]) for name in sorted(views)]


@pytest.mark.parametrize("crop", [(12, 14), (9, 11)])
def test_resizing_and_cropping(crop):
    current = {"a": frames(2, 2, 18, 21, seed=1), "b": frames(2, 2, 12, 14, seed=2)}
    following = {"a": frames(2, 1, 18, 21, seed=3), "b": frames(2, 1, 12, 14, seed=4)}
    sizes = {"resize": (12, 14), "crop": crop}
    wanted = images.preprocess(current, following, **sizes)
    found = torch_images.preprocess(tensors(current), tensors(following), **sizes)
    alone, nothing = torch_images.preprocess(tensors(current), None, **sizes)
    for a, b in zip((*found, alone), (*wanted, wanted[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert nothing is None


def test_frames_of_a_view_share_a_draw():
    torch.manual_seed(1)
    still = np.broadcast_to(frames(1, 1, 16, 16, seed=5), (2, 2, 16, 16, 3)).copy()
    views = [torch.from_numpy(still)] * 2
    current, following = torch_images.preprocess(views, views, resize=(16, 16), crop=(8, 8), augment=AUGMENT)
    for images_ in (current, following):
        assert torch.equal(images_[0, :, 0], images_[1, :, 1]) and torch.equal(images_, current)
    assert not torch.allclose(current[:, 0], current[:, 1], atol=0.01)
    centre, _ = torch_images.preprocess(views, None, resize=(16, 16), crop=(8, 8), augment=OFF)
    np.testing.assert_allclose(centre[0, 0, 0], still[0, 0, 4:12, 4:12] / 255, atol=1e-6)
