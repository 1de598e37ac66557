"""A recorded episode through a live server: each fault is made, and its line is found, printed and in the page."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.seeing_model import Change, SeeingBackend, drive, of_frames, without_normalizer
from uwm_jax.actor import Actor
from uwm_jax.errors import RunError, UserError
from uwm_jax.serving import replay
from uwm_jax.serving.batching import SIZES, Engine
from uwm_jax.serving.connections import Server, in_thread
from uwm_jax.serving.contract import Contract
from uwm_jax.serving.recorded_episode import RecordedEpisode, parse_place
from uwm_jax.serving.replay import Replay, much_nearer, run
from uwm_jax.serving.replay_page import replay_page

SWAPPED: Change = lambda seen: seen | {"obs/left": seen["obs/right"], "obs/right": seen["obs/left"]}  # noqa: E731
BGR = of_frames(lambda x: x[..., ::-1], "left", "right")


@pytest.fixture(autouse=True)
def few_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_DECISIONS", 10)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drive(tmp_path_factory.mktemp("driven") / "robot")


@contextlib.contextmanager
def replayed(place: Path, backend: SeeingBackend, **options: Any) -> Iterator[Replay]:
    actor = Actor(backend, sizes=SIZES)
    contract = Contract(actor, execute=2, **options)
    server = Server(contract, Engine(actor), port=0, token="a-token")
    server.warm()
    episode = RecordedEpisode(f"{place}:1", actor, keys=options.get("keys"))
    with in_thread(server) as address:
        yield run(address, episode, token="a-token")
    episode.close()


FAULTS: dict[str, tuple[Change, str]] = {
    "swapped": (SWAPPED, "the cameras obs/left and obs/right are exchanged"),
    "bgr": (BGR, "the frames of all cameras are BGR, blue first"),
    "rows": (of_frames(lambda x: x[::-1], "left", "right"), "the frames of all cameras are upside down"),
    "columns": (of_frames(lambda x: x[:, ::-1], "left", "right"), "the frames of all cameras are mirrored"),
    "turned": (of_frames(lambda x: x[::-1, ::-1], "left", "right"), "the frames of all cameras are turned by 180"),
    "one": (of_frames(lambda x: x[::-1], "right"), "the frames of obs/right are upside down"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(tmp_path: Path, name: str) -> None:
    change, line = FAULTS[name]
    place = drive(tmp_path / name, change)
    with replayed(place, SeeingBackend()) as found:
        pass
    assert len(found.faults) == 1 and found.faults[0].fault.startswith(line)
    assert found.as_sent.error > 0.3 and found.faults[0].error < 0.15
    printed = [text for text in found.lines() if "LOOKS WRONG" in text]
    assert len(printed) == 1 and line in printed[0] and "nothing looks wrong" not in "".join(found.lines())
    assert re.search(rf"LOOKS WRONG:</span> {line}", replay_page(found))


def test_a_missing_normaliser_is_named(recorded: Path) -> None:
    with replayed(recorded, without_normalizer()) as found:
        pass
    assert [fault.fault for fault in found.faults] == ["the served model lacks its normaliser"]
    assert found.as_sent.error > 2 and found.faults[0].error < 0.4
    assert any("LOOKS WRONG: the served model lacks its normaliser" in line for line in found.lines())
    assert "LOOKS WRONG:</span> the served model lacks its normaliser" in replay_page(found)


def test_what_fits_looks_right(recorded: Path) -> None:
    with replayed(recorded, SeeingBackend()) as found:
        pass
    assert not found.looks_wrong and found.as_sent.error < 0.15 < 0.3 < found.tried[0].error
    assert "nothing looks wrong: of 14 faults" in found.lines()[-1] and len(found.latency_ms) == 10
    page = replay_page(found)
    assert "Nothing looks wrong" in page and "LOOKS WRONG" not in page
    assert page.count("<svg") >= 3 and page.count("data:image/png;base64,") == 2
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page) and "<script" not in page
    # Predicted next to recorded actions, in raw units: the first column lies around 256.
    step = found.steps[3]
    np.testing.assert_allclose(found.as_sent.rows[step][0], found.recorded[step][0], atol=5, rtol=0)
    assert 230 < found.recorded[step][0, 0] < 280


def test_faults_that_would_not_show_are_told(tmp_path: Path) -> None:
    # The right camera shows the same colour everywhere, so that it may be turned at will.
    place = drive(tmp_path / "robot", of_frames(lambda x: np.broadcast_to(x[-1, 0], x.shape), "right"))
    with replayed(place, SeeingBackend()) as found:
        assert not found.looks_wrong
    turned = [f"the frames of obs/right are {how}" for how in ("mirrored", "turned by 180 degrees", "upside down")]
    assert [fault.partition(" (")[0] for fault in sorted(found.not_told_apart)] == turned
    assert sum("would not show" in line for line in found.lines()) == replay_page(found).count("Would not show") == 3


def test_two_faults_at_once_are_both_named(tmp_path: Path) -> None:
    place = drive(tmp_path / "robot", lambda seen: BGR(SWAPPED(seen)))
    with replayed(place, SeeingBackend()) as found:
        pass
    assert len(found.faults) == 1 and found.faults[0].error < 0.15
    for name in ("bgr", "swapped"):
        assert FAULTS[name][1] in found.looks_wrong[0] and FAULTS[name][1] in replay_page(found)


def test_names_that_the_server_exchanges_are_found(recorded: Path) -> None:
    right, wrong = {"left": "obs/left", "right": "obs/right"}, {"left": "obs/right", "right": "obs/left"}
    with replayed(recorded, SeeingBackend(), keys=right) as found:
        assert not found.looks_wrong and list(found.frames) == ["left", "right"]
    with replayed(recorded, SeeingBackend(), keys=wrong) as found:
        assert [fault.fault for fault in found.faults] == ["the cameras right and left are exchanged"]


def test_a_stepwise_server_is_replayed_too(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_STEPS", 20)
    with replayed(recorded, SeeingBackend(), stepwise=True) as found:
        assert not found.looks_wrong and len(found.latency_ms) == 20
    bad = drive(tmp_path / "bad", FAULTS["bgr"][0])
    with replayed(bad, SeeingBackend(), stepwise=True) as found:
        assert [fault.fault for fault in found.faults] == [FAULTS["bgr"][1]]


def test_a_model_that_sees_nothing_is_told_without_a_fault(recorded: Path) -> None:
    with replayed(recorded, SeeingBackend(blind=True)) as found:
        assert not found.faults
        assert "no nearer to the recording than the mean action" in found.looks_wrong[0]
        assert "no nearer to the recording" in replay_page(found)


def test_what_the_server_refuses_is_told(tmp_path: Path) -> None:
    place = drive(tmp_path / "robot", lambda seen: seen | {"obs/state": seen["obs/state"] * 1e6})
    with pytest.raises(UserError, match="the server refuses what was recorded: state is far outside"):
        with replayed(place, SeeingBackend()):
            pass


def test_a_server_that_does_not_answer_is_told(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(SeeingBackend):
        asked = 0

        def sample(self, *inputs: Any, **options: Any) -> dict[str, np.ndarray]:
            self.asked += 1
            if self.asked > 8:  # after the warm-up
                time.sleep(1)
            return super().sample(*inputs, **options)

    monkeypatch.setattr(replay, "PATIENCE", 0.3)
    with pytest.raises(RunError, match="--replay: .* no reply to request .* within the deadline"):
        with replayed(recorded, Stuck()):
            pass


def test_other_data_is_refused(tmp_path: Path) -> None:
    place, actor = drive(tmp_path / "robot", episodes=1), Actor(SeeingBackend())
    with pytest.raises(UserError, match="expected an episode from 0 to 0, found 1"):
        RecordedEpisode(f"{place}:1", actor)
    with pytest.raises(UserError, match="manifest"):
        RecordedEpisode(f"{tmp_path}:0", actor)
    actor.backend.config.data.cameras = ("left", "wrist")
    with pytest.raises(UserError, match="no camera 'wrist'"):
        RecordedEpisode(f"{place}:0", actor)


@pytest.mark.parametrize("text", ["pusht", "pusht:", "pusht:-1", ":3", "pusht:x"])
def test_the_flag_is_read_strictly(text: str) -> None:
    with pytest.raises(UserError, match="expected DATASET:EPISODE"):
        parse_place(text)
    assert parse_place("a:b/c:12") == ("a:b/c", 12)


def test_a_fault_is_named_only_where_the_error_falls_by_much_and_surely() -> None:
    before = np.full(8, 1.0)
    assert much_nearer(before, np.full(8, 0.2)) and not much_nearer(before, np.full(8, 0.85))
    assert not much_nearer(before, np.array([0.0, 0, 0, 0, 0, 0, 0, 4.0]))
    assert not much_nearer(before, np.array([0.1] * 7 + [np.inf]))
    assert not much_nearer(np.array([10.0, 0.1, 0.1, 0.1]), np.full(4, 0.1))  # one decision alone
