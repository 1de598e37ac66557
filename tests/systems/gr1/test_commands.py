"""Official GR1 weights through the real commands: convert, sample, convert back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden import reference
from tests.golden.commands import Converted
from uwm_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.slow
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")


@pytest.fixture(scope="module", params=reference.GR1_NAMES)
def golden(request, tmp_path_factory):
    return Converted.make(request.param, tmp_path_factory.mktemp(request.param))


def expected_frames(golden, key: str) -> tuple[np.ndarray, int]:
    """(B, V, T, h, w, 3) in units of images, and the step between the pixels that are stored."""
    step = 1 if key in golden.g else 5
    stored = golden.g[key if step == 1 else f"{key}_s5"]
    return reference.channels_last(stored) * IMAGENET_STD + IMAGENET_MEAN, step


def test_samples_match_the_official_code(golden):
    out = golden.sample("joint", {}, "--float_frames")
    frames = {f"{kind}/{camera}" for kind in ("next_obs", "next_obs_float") for camera in CAMERAS}
    assert out.keys() == {"action", "action_normalized"} | frames
    for key in ("action", "action_normalized"):
        np.testing.assert_allclose(out[key], golden.g[f"joint/{key}"], rtol=0, atol=1e-4, err_msg=key)
    expected, step = expected_frames(golden, "joint/next_obs_image")
    for view, camera in enumerate(CAMERAS):
        found = out[f"next_obs_float/{camera}"]
        np.testing.assert_allclose(found[..., ::step, ::step, :], expected[:, view], rtol=0, atol=1e-4 * 0.225)
        assert found.min() < -0.01 or found.max() > 1.01  # not clipped
        pictures = out[f"next_obs/{camera}"]
        assert pictures.dtype == np.uint8
        assert np.abs(pictures - np.clip(found, 0, 1) * 255).max() <= 0.51


def test_one_evaluation_matches_the_official_code(golden):
    for prefix, draws in (("", {}), ("masked/", {"action_mask": golden.g["action_mask"]})):
        out = golden.sample("denoise", draws)
        assert out.keys() == {"loss/action", "loss/next_obs", "obs_feat"}
        for key, name in (("loss/action", f"{prefix}loss/action"), ("loss/next_obs", f"{prefix}loss/next_obs")):
            np.testing.assert_allclose(out[key], golden.g[name], rtol=2e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(out["obs_feat"], golden.g["obs_tokens"], rtol=2e-5, atol=2e-5)


def test_the_round_trip_is_bit_exact(golden):
    golden.assert_round_trip()
    described = json.loads((golden.folder / "back.json").read_text())
    assert described["images"]["mean"] == list(IMAGENET_MEAN)
    assert described["config"]["system"] == "gr1"
