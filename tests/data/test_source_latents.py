"""Which latents a sample gets: the frames, variants and draws of the caches that it names."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.caches.latents.files import Block, write_caches
from uwm_jax import reading
from uwm_jax.config import base, source
from uwm_jax.data.faults import BadRecord, UnreadRecord
from uwm_jax.data.images import NUMBERS
from uwm_jax.data.latents import LatentCache, Layout, folder, numbers_of, part_file
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.data.source_latents import LatentUse, expected_fields
from uwm_jax.errors import UserError

WRIST, EXTERIOR = "observation/wrist", "observation/exterior"
USE = LatentUse("vae", ("next_obs",), moments=False)
SHAPE = (2, 3, 4)


def data_config(dataset: Path):
    c = base().data
    c.path, c.cameras, c.val_ratio = str(dataset), ("wrist", "exterior"), 0.3
    c.action, c.normalize = (("action", "identity"),), "none"
    c.window.action, c.window.next_obs = (1, 2, 3, 4), (5, 6)
    c.num_streams, c.num_threads = 4, 1
    c.resize, c.crop = (18, 20), (16, 16)
    return c


def told(camera: str, variant: int, episode: int, step: int) -> list[int]:
    """Numbers, exact in float16, that name a frame."""
    return [int(camera == WRIST) + 1, variant, episode, step]


def write(
    dataset: Path, config, variants=2, moments=False, keys=(WRIST, EXTERIOR), episodes=None, overwrite=False, **more
):
    """Caches whose latents name their frames, in the first column of the first row."""
    opened = Dataset(dataset)
    sizes = {WRIST: (16, 16), EXTERIOR: (24, 32)}
    made_with = {
        key: {
            **expected_fields(config, "vae", "train", key, sizes[key]),
            **{"encoder": "ab", "variants": variants, "seed": 9, "latent": list(SHAPE), "moments": moments},
            **{"dtype": "float16", "steps_per_part": 30},
            **more,
        }
        for key in keys
    }
    episodes = np.arange(opened.num_episodes) if episodes is None else np.asarray(episodes)

    def blocks(layout: Layout, part: int):
        first, last = layout.parts[part]
        places = [(e, s) for e in layout.episodes[first:last] for s in range(opened.episode_lengths[e])]
        for variant in range(variants):
            for start in range(0, len(places), 13):
                some = places[start : start + 13]
                found = {key: np.zeros((len(some), *layout.shape)) for key in keys}
                for key, latents in found.items():
                    latents[:, 0, 0, :4] = [told(key, variant, *place) for place in some]
                yield Block(variant, start, found)
        if part == layout.black[0]:
            yield Block(-1, 0, {key: np.full((1, *layout.shape), -7.0) for key in keys})

    return write_caches(opened, made_with, episodes, blocks, command="again", overwrite=overwrite, say=lambda _: None)


@pytest.fixture
def dataset(tiny_dataset, tmp_path) -> Path:
    return shutil.copytree(tiny_dataset, tmp_path / "data")


def first_batch(config, use=USE):
    data = RunData(config, seed=3, latents=use)
    loader = Loader(data, batch_size=16)
    batch = next(iter(loader))
    places = [loader.describe(row) for row in range(16)]
    data.close()
    return batch, places


def test_a_sample_has_the_latents_and_draws_of_its_own_frames(dataset):
    config = data_config(dataset)
    write(dataset, config)
    batch, places = first_batch(config)
    assert "next_obs/wrist" not in batch and batch["obs/wrist"].shape == (16, 2, 16, 16, 3)
    assert batch["next_obs_latent"].shape == (16, 2, 2, *SHAPE) and batch["next_obs_latent"].dtype == np.float16
    variants = set()
    for row, place in enumerate(places):
        for view, camera in enumerate((EXTERIOR, WRIST)):
            found = batch["next_obs_latent"][row, view, :, 0, 0]
            variant = int(found[0, 1])
            variants.add((row, view, variant))
            expected = [told(camera, variant, place.episode, place.origin + i) for i in (5, 6)]
            np.testing.assert_array_equal(found, expected)
            numbers = numbers_of(9, place.episode, camera, variant)
            np.testing.assert_array_equal(batch["augmentation"][row, view], numbers)
    assert {v for *_, v in variants} == {0, 1}, "both variants are drawn"
    assert any((row, 0, 0) in variants and (row, 1, 1) in variants for row in range(16)), "each view by itself"
    again, _ = first_batch(config)
    np.testing.assert_array_equal(batch["next_obs_latent"], again["next_obs_latent"])


def test_numbers_are_uniform_and_depend_on_all_that_names_a_variant():
    found = np.stack([numbers_of(0, episode, WRIST, 0) for episode in range(2000)])
    assert found.dtype == np.float32 and found.shape == (2000, NUMBERS) and 0 <= found.min() and found.max() < 1
    np.testing.assert_allclose(found.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(found.T), np.eye(NUMBERS), atol=0.08)
    others = [numbers_of(*name) for name in ((1, 0, WRIST, 0), (0, 1, WRIST, 0), (0, 0, EXTERIOR, 0), (0, 0, WRIST, 1))]
    assert all(np.abs(numbers_of(0, 0, WRIST, 0) - other).max() > 0.05 for other in others)


def test_views_without_a_camera_have_the_latents_of_what_they_show(dataset):
    config = data_config(dataset)
    config.path = ""
    robot = source(path=str(dataset))
    for fill in ("same", "none", "random"):
        config.sources = {"robot": robot, "video": source(path=str(dataset), use_actions=False, fill_views=fill)}
        config.sources.video.cameras = ("wrist",)
        config.sources.robot.cameras = ("wrist", "exterior")
        config.cameras = ("one", "two")
        if fill == "same":
            write(dataset, config)
            with pytest.raises(UserError, match=r"source 'video'.*shows observation/wrist in views of 2 sizes"):
                RunData(config, seed=3, latents=USE)
        config.sources.robot.cameras = ("wrist", "wrist")
        write(dataset, config, overwrite=True)
        batch, places = first_batch(config)
        rows = [row for row, place in enumerate(places) if place.source == "video"]
        assert rows
        for row in rows:
            found = batch["next_obs_latent"][row, :, :, 0, 0]
            named = [told(WRIST, int(x[0, 1]), places[row].episode, places[row].origin + 5) for x in found]
            own = [x[0].tolist() == name for x, name in zip(found, named, strict=True)]
            if fill == "same":
                assert own == [True, True]
            elif fill == "none":
                assert sorted(own) == [False, True]
                black = own.index(False)
                np.testing.assert_array_equal(batch["next_obs_latent"][row, black], np.float16(-7))
                assert not batch["obs/" + ("one", "two")[black]][row].any()
            else:
                assert own[0] and found[1][0, 0] == 2
                numbers = numbers_of(9, int(found[1][0, 2]), WRIST, int(found[1][0, 1]))
                np.testing.assert_array_equal(batch["augmentation"][row, 1], numbers)


def test_without_draws_batches_have_no_numbers_and_moments_have_both_halves(dataset):
    config = data_config(dataset)
    config.augment.update(random_crop=False, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    write(dataset, config, variants=1, moments=True)
    batch, _ = first_batch(config, LatentUse("vae", ("obs", "next_obs"), moments=True))
    assert {"obs_moments", "next_obs_moments"} <= batch.keys() and "obs/wrist" not in batch
    assert batch["obs_moments"].shape == (16, 2, 2, 2, 3, 8) and "augmentation" not in batch
    mode, _ = first_batch(config)
    np.testing.assert_array_equal(mode["next_obs_latent"], batch["next_obs_moments"][..., :4])


def test_caches_that_do_not_fit_are_refused_by_name(dataset):
    config = data_config(dataset)
    config.path = ""
    config.sources = {"robot": source(path=str(dataset))}

    def refused(*words, use=USE, **fields):
        changed = config.copy_and_resolve_references()
        changed.update(**fields)
        with pytest.raises(UserError) as e:
            RunData(changed, seed=0, latents=use)
        assert all(word in str(e.value) for word in ("source 'robot'", "config.data.latents='vae'", *words)), e.value

    refused("no latents here", "python -m data_prep.latents --config")
    write(dataset, config, keys=(WRIST,))
    refused(folder("vae", EXTERIOR, "train"), "no latents here")
    (dataset / folder("vae", EXTERIOR, "train")).mkdir(parents=True)
    shutil.copy(dataset / folder("vae", WRIST, "train") / "sidecar.json", dataset / folder("vae", EXTERIOR, "train"))
    refused("part-00000.latents is missing")
    shutil.rmtree(dataset / folder("vae", EXTERIOR, "train"))
    write(dataset, config, keys=(EXTERIOR,))
    RunData(config, seed=0, latents=USE).close()
    refused("crop: expected [14, 16], found [16, 16]", crop=(14, 16))
    refused("resize: expected [18, 21], found [18, 20]", resize=(18, 21))
    refused("augment.hue: expected 0.1, found 0.2", augment={"hue": 0.1})
    refused("--moments", "posterior", use=LatentUse("vae", ("next_obs",), moments=True))
    write(dataset, config, episodes=[0, 1, 2, 4, 5], overwrite=True)
    refused("lacks 1 of the 6 episodes", "the first is episode 3", "--episodes=all")


def test_a_damaged_record_is_named(dataset):
    config = data_config(dataset)
    write(dataset, config)
    opened = Dataset(dataset)
    cache = LatentCache(opened, "vae", WRIST)
    into = np.empty((2, *SHAPE), np.float16)
    assert len(cache.layout.parts) > 2
    for episode, length in enumerate(opened.episode_lengths):
        for steps in ([0, int(length) - 1], [2, 2], [int(length) - 2, int(length) - 1]):
            cache.read(episode, steps, 1, into)
            np.testing.assert_array_equal(into[:, 0, 0], [told(WRIST, 1, episode, step) for step in steps])
    cache.close()
    part, number = cache.layout.locate(2, 7, 1)
    file = dataset / folder("vae", WRIST, "train") / part_file(part)
    content = bytearray(file.read_bytes())
    content[number * cache.layout.record + 5] ^= 1
    file.write_bytes(content)
    cache.read(2, [5, 6], 1, into)
    with pytest.raises(UserError, match=rf"{part_file(part)}: record {number} has another checksum"):
        cache.read(2, [6, 7], 1, into)
    cache.close()
    # A record of another cache of the same shape does not pass.
    write(dataset, config, overwrite=True, seed=10)
    other = file.read_bytes()
    write(dataset, config, overwrite=True)
    cache = LatentCache(opened, "vae", WRIST)
    file.write_bytes(other)
    with pytest.raises(UserError, match="another checksum"):
        cache.read(2, [6, 7], 1, into)


def test_a_read_is_tried_on_a_new_handle_and_given_up_once(dataset, monkeypatch):
    config = data_config(dataset)
    write(dataset, config)
    cache, into = LatentCache(Dataset(dataset), "vae", WRIST), np.empty((2, *SHAPE), np.float16)
    cache.read(2, [5, 6], 1, into)
    (stale,) = (file.fileno() for file in cache._open.values())
    monkeypatch.setattr(reading, "AGAIN_SECONDS", (0.0, 0.0, 0.0))
    pread, calls = os.pread, []

    def of_a_server(descriptor, count, offset):
        calls.append(descriptor)
        if descriptor == stale or offset == dead * cache.layout.record:
            raise OSError(errno.ESTALE, "stale")
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", of_a_server)
    part, dead = cache.layout.locate(2, 7, 1)
    held = list(cache._open.values())  # as by another thread that reads
    cache.read(2, [5, 6], 1, into)
    np.testing.assert_array_equal(into[:, 0, 0], [told(WRIST, 1, 2, step) for step in (5, 6)])
    assert len(calls) == 2 and calls[0] == stale and held
    for _ in range(2):
        with pytest.raises(UnreadRecord, match=rf"record {dead}: .*4 attempts") as caught:
            cache.read(2, [7, 8], 1, into)
    assert len(calls) == 2 + 4 and caught.value.record.endswith(f"{part_file(part)}#{dead}")


def test_a_part_that_is_cut_short_has_its_lost_records_named(dataset):
    config = data_config(dataset)
    write(dataset, config)
    cache, into = LatentCache(Dataset(dataset), "vae", WRIST), np.empty((2, *SHAPE), np.float16)
    part, lost = cache.layout.locate(2, 7, 1)
    with (dataset / folder("vae", WRIST, "train") / part_file(part)).open("r+b") as file:
        file.truncate(lost * cache.layout.record + 9)
    cache.read(2, [5, 6], 1, into)
    for steps in ([6, 7], [7, 8]):
        with pytest.raises(BadRecord, match=f"ends in record {lost}") as caught:
            cache.read(2, steps, 1, into)
        assert caught.value.record.endswith(f"#{lost}")


def test_a_layout_closes_parts_and_bounds_their_number():
    layout = Layout(np.array([5, 7, 3, 9, 1]), np.array([0, 1, 3, 4]), (1, 1, 2), "float32", 3, 10)
    assert layout.parts == [(0, 2), (2, 3), (3, 4)] and [layout.steps(p) for p in range(3)] == [12, 9, 1]
    assert layout.record == 12 and layout.total_bytes == 12 * (3 * 22 + 1)
    assert layout.has.tolist() == [True, True, False, True, True] and layout.black == (2, 3)
    assert layout.locate(1, 6, 2) == (0, 35) and layout.locate(3, 8, 1) == (1, 17)
    many = Layout(np.full(1000, 3), np.arange(1000), (1,), "float16", 1, 2)
    assert len(many.parts) <= 128 and sum(many.steps(p) for p in range(len(many.parts))) == 3000
