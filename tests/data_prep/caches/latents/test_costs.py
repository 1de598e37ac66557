from __future__ import annotations

import pytest

from configs.droid import get_config
from data_prep.caches.latents.costs import Costs
from uwm_jax import codecs, synthetic
from uwm_jax.systems import make

STEPS = 27_000_000


def test_droid_costs_about_a_run_of_the_paper_and_half_a_terabyte():
    """Written out: 14.4 M samples of 6 frames; 208.4 GFLOP a frame; 158.7 GFLOP a sample for what is trained."""
    config = get_config()
    codec = codecs.from_config(config)
    system = make(config, synthetic.synthetic_spec(config, 10), codec)
    sample = system.flops()
    assert sample.training / (sample.training - sample.frozen) == pytest.approx(8.9, abs=0.05)
    found = Costs(
        frames=3 * STEPS,
        variants=1,
        record=28 * 28 * 4 * 2 + 4,
        frame_flops=codec.encode_flops(1, 224, 224),
        rate=1000.0,
        samples=config.total_steps * config.batch_size,
        sample_frames=6,
        trained=sample.training - sample.frozen,
        episodes=76_000,
    )
    assert found.disk == pytest.approx(0.5e12, rel=0.03)
    assert found.of_frames == pytest.approx(81 / 86.4) and 0.8 < found.of_runs < found.of_frames
    assert found.ratio == pytest.approx(8.9, abs=0.05)
    assert found.hours == pytest.approx(81e6 / 1000 / 3600)
    text = found.describe()
    assert "508 GB: 81,000,000 frames x 1 variant x 6,276 bytes" in text
    for words in ("computed", "8.9 times fewer", "one run   yes", "22.5 hours"):
        assert words in text, text
    assert "from the first program on" in text and "at most 76,000 of these 76,000 episodes" in text


def test_a_cache_of_many_variants_pays_only_for_several_runs_or_a_subset():
    found = Costs(600, 3, 100, frame_flops=10.0, rate=1.0, samples=40, sample_frames=6, trained=20.0, episodes=50)
    assert found.of_frames == 2.5 and found.ratio == 4.0
    assert found.of_runs == pytest.approx(600 * 10 / (40 * 80))
    assert found.runs_to_pay == 3
    # three runs: 3 * 40 * 80 from pixels, 600 * 10 + 3 * 40 * 20 from latents; two do not pay
    assert 600 * 10 + 3 * 40 * 20 < 3 * 40 * 80 and 600 * 10 + 2 * 40 * 20 > 2 * 40 * 80
    text = found.describe()
    assert "one run   no" in text and "from 3 programs on" in text and "at most 20 of these 50 episodes" in text
