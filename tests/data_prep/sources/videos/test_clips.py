"""Frames of clips by time, against the numbers that the pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.decoding import Video, VideoError
from data_prep.sources.videos.clips import Clip, Request, Sampling, Unusable, read_clip
from tests.data_prep.clips import number_of, write_clip
from uwm_jax.data.records import decode_image

SIZE = (48, 64)


def decoded(jpegs: Sequence[bytes], size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    images = [np.empty((*size, 3), np.uint8) for _ in jpegs]
    for jpeg, image in zip(jpegs, images, strict=True):
        decode_image(jpeg, image)
    return images


def read(*files: Path, **sampling: object) -> Clip | Unusable:
    return read_clip(Request(files, Sampling(SIZE, **{"min_steps": 1, **sampling})), lambda number: None)


def numbers(clip: Clip | Unusable, camera: int = 0) -> list[int]:
    assert isinstance(clip, Clip), clip
    return [number_of(image) for image in decoded(clip.frames[camera])]


def reason(clip: Clip | Unusable) -> tuple[str, int]:
    assert isinstance(clip, Unusable), clip
    return clip.reason, clip.file


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mp4", "libx264"),
        ("a.mp4", "libx265"),
        ("a.webm", "libvpx"),
        ("a.webm", "libvpx-vp9"),
        ("a.webm", "libsvtav1"),
        ("a.avi", "mpeg4"),
        ("a.avi", "libx264"),
        ("a.mkv", "libx265"),
    ],
)
def test_codecs_and_containers(tmp_path: Path, name: str, codec: str) -> None:
    write_clip(tmp_path / name, range(22), codec=codec)  # 10 frames/s
    clip = read(tmp_path / name, fps=Fraction(4))
    # Times 0, 0.25, 0.5, ...; of two frames that are equally near, the later one.
    assert numbers(clip) == [0, 3, 5, 8, 10, 13, 15, 18, 20]
    assert isinstance(clip, Clip)
    np.testing.assert_allclose(clip.times, np.asarray(numbers(clip)) / 10, atol=1e-3)


def test_the_nearest_frame_of_a_variable_rate(tmp_path: Path) -> None:
    stamps = np.cumsum([0, *np.random.default_rng(0).uniform(0.01, 0.1, 23)]).round(3)
    write_clip(tmp_path / "a.mp4", range(24), stamps.tolist())
    clip = read(tmp_path / "a.mp4", fps=Fraction(5))
    wanted = np.arange(0, stamps[-1], 0.2)
    assert numbers(clip) == np.abs(stamps[None] - wanted[:, None]).argmin(axis=1).tolist()
    assert isinstance(clip, Clip) and clip.remarks == ("variable rate",)


@pytest.mark.parametrize("rate, fps, expected", [(10, 10, 22), (10, 5, 11), (30, 10, 8), (24, 10, 9)])
def test_no_frame_is_taken_twice(tmp_path: Path, rate: int, fps: int, expected: int) -> None:
    write_clip(tmp_path / "a.webm", range(22), fps=rate, codec="libvpx-vp9")  # times in whole milliseconds
    found = numbers(read(tmp_path / "a.webm", fps=Fraction(fps)))
    assert len(found) == expected and (np.diff(found) > 0).all()


def test_slower_clips_are_too_slow(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", range(22))
    assert reason(read(tmp_path / "a.mp4", fps=Fraction(11))) == ("too slow", 0)
    stamps = [i / 10 if i < 10 else 0.5 + i / 10 for i in range(20)]  # a gap of 0.6 s
    write_clip(tmp_path / "gap.mp4", range(20), stamps)
    assert reason(read(tmp_path / "gap.mp4", fps=Fraction(5))) == ("too slow", 0)


@pytest.mark.parametrize("frames, steps", [(38, 19), (39, 19), (37, 18)])
def test_the_official_rule_needs_38_frames_for_19_steps(tmp_path: Path, frames: int, steps: int) -> None:
    write_clip(tmp_path / "a.mp4", range(frames), fps=30)
    clip = read(tmp_path / "a.mp4", every=2, min_steps=19)
    if steps < 19:
        assert reason(clip) == ("too short", 0)
    else:
        assert numbers(clip) == [number % 24 for number in range(0, 38, 2)]


def test_every_needs_no_time_stamps(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", range(9), format="h264")
    assert reason(read(tmp_path / "a.mp4", fps=Fraction(5))) == ("no time stamps", 0)
    clip = read(tmp_path / "a.mp4", every=3)
    assert numbers(clip) == [0, 3, 6]
    assert isinstance(clip, Clip) and clip.remarks == ("no time stamps",)


def test_resized_to_cover_and_cropped_in_the_centre(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", [2], size=(96, 256), codec="libx264")
    clip = read(tmp_path / "a.mp4", every=1)
    assert isinstance(clip, Clip)
    (image,) = decoded(clip.frames[0])
    # 96 x 256 becomes 48 x 128, of which the columns 32 to 96 are kept: the bright quarter ends in the middle.
    red = image[:20, :, 0].mean(axis=0)
    assert red[:28].min() - red[36:].max() > 20
    assert number_of(image) == 2


def test_a_lower_quality_has_fewer_bytes(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", [5])
    high, low = (read(tmp_path / "a.mp4", every=1, quality=quality) for quality in (95, 30))
    assert isinstance(high, Clip) and isinstance(low, Clip)
    assert len(low.frames[0][0]) < len(high.frames[0][0]) and numbers(low) == numbers(high) == [5]


def test_properties_that_are_taken_into_account_are_remarked(tmp_path: Path) -> None:
    write_clip(tmp_path / "turned.mp4", range(3), turn={"degrees": 90})
    write_clip(tmp_path / "deep.mp4", range(3), codec="libx265", pixels="yuv420p10le")
    write_clip(tmp_path / "odd.mp4", range(3), pixels="yuv444p", size=(47, 61))
    write_clip(tmp_path / "wide.mkv", range(3), pixel_aspect=Fraction(3, 2))
    for name, remark in (
        ("turned.mp4", "rotated or mirrored by metadata"),
        ("deep.mp4", "more than 8 bits a channel"),
        ("odd.mp4", "odd size"),
        ("wide.mkv", "pixels not square"),
    ):
        clip = read(tmp_path / name, every=1)
        assert numbers(clip) == [0, 1, 2]
        assert isinstance(clip, Clip) and clip.remarks == (remark,)


def test_cameras_are_joined_by_time(tmp_path: Path) -> None:
    # The second camera starts 0.2 s later, is offset by 0.03 s, and ends earlier.
    write_clip(tmp_path / "a.mp4", range(20))
    write_clip(tmp_path / "b.mkv", range(12), [0.23 + i / 10 for i in range(12)])
    for sampling in ({"fps": Fraction(10)}, {"every": 1}):
        clip = read(tmp_path / "a.mp4", tmp_path / "b.mkv", **sampling)
        assert numbers(clip) == list(range(2, 14))
        assert numbers(clip, 1) == list(range(12))


def test_cameras_of_different_rates(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", range(12))
    write_clip(tmp_path / "b.webm", range(24), fps=20, codec="libvpx-vp9")
    clip = read(tmp_path / "a.mp4", tmp_path / "b.webm", fps=Fraction(10))
    assert numbers(clip) == list(range(12)) and numbers(clip, 1) == list(range(0, 24, 2))
    clip = read(tmp_path / "a.mp4", tmp_path / "b.webm", every=2)
    assert numbers(clip) == [0, 2, 4, 6, 8, 10] and numbers(clip, 1) == [0, 4, 8, 12, 16, 20]
    assert reason(read(tmp_path / "b.webm", tmp_path / "a.mp4", every=1)) == ("too slow", 1)


def test_cameras_that_do_not_overlap(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", range(5))
    write_clip(tmp_path / "b.mkv", range(5), [9 + i / 10 for i in range(5)])
    for sampling in ({"fps": Fraction(10)}, {"every": 1}):
        found = read(tmp_path / "a.mp4", tmp_path / "b.mkv", **sampling)
        assert reason(found) == ("cameras do not overlap in time", 0)


def test_the_damaged_file_of_several_is_named(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(tmp_path / name, range(20))
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.mp4").read_bytes()[:3000])
    files = [tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4")]
    assert reason(read(*files, every=1)) == ("video cannot be opened", 1)


def test_an_episode_that_would_not_fit_into_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "a.mp4", range(20))
    monkeypatch.setattr("data_prep.sources.videos.clips.MAX_ENCODED_BYTES", 5_000)
    assert reason(read(tmp_path / "a.mp4", every=1)) == ("oversized episode", 0)
    monkeypatch.setattr("data_prep.sources.decoding.MAX_PIXELS", 48 * 64 - 1)
    assert reason(read(tmp_path / "a.mp4", every=1)) == ("oversized picture", 0)
    with pytest.raises(VideoError, match="has 64x48 pixels"):  # before its frames take memory
        Video(tmp_path / "a.mp4")
