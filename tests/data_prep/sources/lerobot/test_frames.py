"""A decoder that crashes or hangs costs its episode only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build
from data_prep.sources.decoding import VideoError
from data_prep.sources.lerobot import frames
from data_prep.sources.lerobot.episodes import corpus
from data_prep.sources.lerobot.frames import Decoder, Reader, Request
from data_prep.sources.pictures import Pictures
from tests.data_prep import lerobot_source
from tests.data_prep.clips import SIZE, number_of, write_clip
from uwm_jax.data.records import decode_image
from uwm_jax.errors import UserError

TOP = "observation.images.top"
FEATURES = {key: lerobot_source.FEATURES[key] for key in (TOP, "action")}


class Failing(Reader):
    """A decoder with two bugs: it crashes at 0.5 s and hangs at 1.5 s."""

    def __call__(self, request: Request | Path, mark: Callable[[int], None]) -> frames.Answer:
        if isinstance(request, Request) and request.times[0] == Fraction(1, 2):
            os.kill(os.getpid(), signal.SIGSEGV)
        if isinstance(request, Request) and request.times[0] == Fraction(3, 2):
            time.sleep(600)
        return super().__call__(request, mark)


class Crashing(Reader):
    def __call__(self, request: Request | Path, mark: Callable[[int], None]) -> frames.Answer:
        os.kill(os.getpid(), signal.SIGSEGV)
        return []


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Decoder]]:
    processes: list[Decoder] = []
    monkeypatch.setattr(frames, "_idle", processes)
    yield processes
    for process in processes:
        process.close()


def test_the_other_episodes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: list[Decoder]) -> None:
    monkeypatch.setattr(frames, "Reader", Failing)
    lerobot_source.make(tmp_path / "arm", "v3.0", [5] * 5, videos=[TOP], info={"features": FEATURES})
    source = corpus(tmp_path / "arm", seconds=5)
    options = Options(workers=1, max_skipped=0.5, pca_channels=4)
    manifest = build(source, tmp_path / "out", options)
    assert manifest is not None
    split = manifest["splits"]["train"]
    assert split["episodes"] == 3
    assert split["skipped"] == {"decoder crashed": 1, "decoder exceeded the time limit": 1}
    assert [note.split(" (")[0] for note in split["skipped_notes"]] == [
        f"episode 1: decoder crashed: {TOP}: SIGSEGV",
        f"episode 3: decoder exceeded the time limit: {TOP}: no result within 5 s",
    ]
    assert [decoder._child.started for decoder in idle] == [3]  # one, which serves until it fails


def test_a_camera_whose_decoder_crashes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: list[Decoder]
) -> None:
    monkeypatch.setattr(frames, "Reader", Crashing)
    lerobot_source.make(tmp_path / "arm", "v2.1", [3], videos=[TOP], info={"features": FEATURES})
    with pytest.raises(UserError, match=rf"(?s)no image of camera {TOP} can be read.*episode_000000.mp4: SIGSEGV"):
        corpus(tmp_path / "arm")


def request(file: Path, **fields: object) -> Request:
    values: dict = {"camera": TOP, "tolerance": Fraction(1, 20), "size": SIZE, "pictures": Pictures("png")}
    times = tuple(Fraction(i, 10) for i in range(3))
    return Request(file=file, times=times, **values | fields)  # type: ignore[arg-type]


def shown(encoded: list[bytes]) -> list[int]:
    image = np.empty((*SIZE, 3), np.uint8)
    numbers = []
    for data in encoded:
        decode_image(data, image)
        numbers.append(number_of(image))
    return numbers


def test_a_file_that_was_replaced_is_opened_again(tmp_path: Path) -> None:
    reader, file = Reader(), tmp_path / "a.mp4"
    for first in (0, 7):
        write_clip(tmp_path / "new.mp4", range(first, first + 5), fps=10)
        (tmp_path / "new.mp4").rename(file)
        answers = [reader(request(file), lambda _: None) for _ in range(2)]
        assert [shown(answer) for answer in answers] == [[first, first + 1, first + 2]] * 2  # type: ignore[arg-type]
    file.unlink()
    gone = reader(request(file), lambda _: None)
    assert isinstance(gone, frames.Unusable) and gone.reason == "unreadable file"


def test_an_episode_too_large_for_a_record(tmp_path: Path, idle: list[Decoder]) -> None:
    write_clip(tmp_path / "a.mp4", range(5), fps=10)
    with frames.decoder() as decoding:
        whole = decoding.frames(request(tmp_path / "a.mp4"), 60)
        total = sum(map(len, whole))
        assert decoding.frames(request(tmp_path / "a.mp4", max_bytes=total), 60) == whole
        with pytest.raises(VideoError, match="3 of its frames have") as raised:
            decoding.frames(request(tmp_path / "a.mp4", max_bytes=total - 1), 60)
    assert raised.value.reason == "oversized episode"


def test_a_decoder_left_amid_an_answer_is_replaced(tmp_path: Path, idle: list[Decoder]) -> None:
    write_clip(tmp_path / "a.mp4", range(5), fps=10)
    with pytest.raises(KeyboardInterrupt), frames.decoder() as decoding:
        assert decoding.size(tmp_path / "a.mp4", 60) == SIZE
        decoding._child._pipe.send((tmp_path / "a.mp4", 60.0))  # type: ignore[union-attr]
        raise KeyboardInterrupt
    with frames.decoder() as again:
        assert again is decoding and shown(again.frames(request(tmp_path / "a.mp4"), 60)) == [0, 1, 2]
