"""The policy of `uwm_torch.py` against `uwm_jax.policy.Policy`, late answers, and the program that stands alone."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest

from tests.torch_bridge.exports import ARM, CAMERAS, Export, export
from uwm_jax.policy import Policy

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from uwm_jax.torch_bridge import uwm_torch  # noqa: E402

STEPS = 20
LIMITS = ([-0.5] * 6 + [0.0], [0.5] * 6 + [1.0])


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Chunks of eight actions from the present on, which are relative to the present pose."""
    window = {"data__window__action": tuple(range(1, 10)), "data__window__obs": (0, 2)}
    return export(tmp_path_factory.mktemp("arm") / "DIR", "dp", ARM, **window)


def observe(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    frames = {name: rng.integers(0, 256, (rows, *size, 3), np.uint8) for name, size in CAMERAS.items()}
    numbers = {"state": rng.normal(size=(rows, 4)), "pose": 0.3 * rng.normal(size=(rows, 7))}
    return {**frames, **numbers, "unread": np.zeros(3)}


def draw(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    return {"action": rng.normal(size=(rows, 9, 10)).astype(np.float32)}


@pytest.mark.parametrize(
    ("switch", "execute", "delay"),
    [("wait", 3, 0), ("wait", 2, 2), ("naive", 3, 2), ("replacement", 3, 2), ("guided", 4, 3)],
)
def test_it_acts_as_ours_does(arm, switch, execute, delay):
    how: dict[str, Any] = {"execute": execute, "delay": delay, "switch": switch, "limits": LIMITS}
    ours, theirs = Policy(arm.backend(), batch_size=2, **how), uwm_torch.load(arm.folder, **how)
    rng = np.random.default_rng(0)
    ours.reset((0, 1))
    theirs.reset(2)
    for step in range(STEPS):
        rows = [1] if step in (4, 5) else [0, 1]  # the first one lags behind, so that they ask at different steps
        observation, noise = observe(rng, len(rows)), draw(rng, len(rows))
        wanted, found = (p.act(observation, rows, noise) for p in (ours, theirs))
        assert found.dtype == np.float32 and found.shape == (len(rows), 7)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert (found >= LIMITS[0]).all() and (found <= LIMITS[1]).all()
    assert theirs.cut > 0
    if switch in ("wait", "naive"):  # rounding decides whether a promised action at a limit counts for ours
        assert theirs.cut == ours.actor.cut
    assert (theirs.late, theirs.stops) == (ours.late, ours.stops) == (0, 0)


def test_stated_limits_travel_with_the_export(arm, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(arm.folder / "model.safetensors")
    stored = json.loads((arm.folder / "model.json").read_text())
    stored["limits"] = {"low": [0.1] * 6 + [None], "high": [None] * 7}
    (tmp_path / "model.json").write_text(json.dumps(stored))
    rng = np.random.default_rng(1)
    observation, noise = observe(rng, 1), draw(rng, 1)
    free, limited = (uwm_torch.load(folder).act(observation, noise=noise) for folder in (arm.folder, tmp_path))
    np.testing.assert_array_equal(limited[:, :6], np.maximum(free[:, :6], np.float32(0.1)))
    assert (free[:, :6] < 0.1).any()
    np.testing.assert_array_equal(limited[:, 6], free[:, 6])
    tighter = uwm_torch.load(tmp_path, limits=(-10, 0.2)).act(observation, noise=noise)  # the export's hold as well
    np.testing.assert_array_equal(tighter, np.minimum(limited, np.float32(0.2)))


def test_noise_follows_the_seeds(arm):
    def run(seeds: Any, seed: int = 0) -> np.ndarray:
        policy, rng = uwm_torch.load(arm.folder, execute=2, seed=seed), np.random.default_rng(2)
        policy.reset(seeds)
        observations = [{key: x[:1].repeat(len(policy._seeds), 0) if x.ndim > 1 else x for key, x in
                         observe(rng, 1).items()} for _ in range(4)]  # fmt: skip
        return np.stack([policy.act(observation) for observation in observations], axis=1)

    both = run((7, 3))
    np.testing.assert_allclose(run((3,))[0], both[1], atol=1e-5)  # whatever else is acted on
    np.testing.assert_array_equal(run(2), run((0, 1)))
    assert np.abs(both[0] - both[1]).max() > 1e-3
    assert np.abs(run((7, 3), seed=1) - both).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"a": None}, r"missing a: expected uint8 \(1, 14, 18, 3\)"),
        ({"a": np.zeros((1, 14, 18, 3), np.float32)}, r"a: expected uint8 .*, found float32 \(1, 14, 18, 3\)"),
        ({"state": np.zeros((2, 4))}, r"state: expected float32 \(1, 4\), found float32 \(2, 4\)"),
        ({"state": np.full((1, 4), np.inf)}, "state: .*found values that are not finite"),
        ({"pose": None}, r"missing pose: expected float32 \(1, 7\), which the robot's actions are relative to"),
    ],
)
def test_unfit_observations_are_named(arm, change, told):
    policy = uwm_torch.load(arm.folder)
    observation = {k: x for k, x in {**observe(np.random.default_rng(0), 1), **change}.items() if x is not None}
    with pytest.raises(uwm_torch.UserError, match=told):
        policy.act(observation)


def test_unfit_rows_seeds_and_noise_are_named(arm):
    policy, observation = uwm_torch.load(arm.folder), observe(np.random.default_rng(0), 2)
    policy.reset(2)
    with pytest.raises(uwm_torch.UserError, match=r"rows: expected 0 to 1, as reset was told; found \[2\]"):
        policy.act(observation, [0, 2])
    with pytest.raises(uwm_torch.UserError, match="noise of action: expected 2 rows like the observation, found 1"):
        policy.act(observation, noise=draw(np.random.default_rng(0), 1))
    with pytest.raises(uwm_torch.UserError, match=r"noise/action: expected float32 \(B, 9, 10\)"):
        policy.act(observation, noise={"action": np.zeros((2, 9))})
    for seeds in ([0, -1], [0.5]):
        with pytest.raises(uwm_torch.UserError, match="seeds: expected integers from 0 on"):
            policy.reset(seeds)


def test_actions_that_are_not_finite_are_no_actions(arm):
    policy = uwm_torch.load(arm.folder)
    policy.model.noise_pred_net.output_decoder[2].bias[0] = np.nan
    with pytest.raises(uwm_torch.RunError, match="actions are not finite"):
        policy.act(observe(np.random.default_rng(0), 1))


def test_a_late_answer_is_used_late_or_stops_by_name(arm):
    policy = uwm_torch.load(arm.folder, execute=4, delay=2, switch="replacement", deadline=0.0)
    rng, held, chunks = np.random.default_rng(3), threading.Event(), policy.chunks
    policy.reset(1)

    def slow(*args: Any, **kwargs: Any) -> np.ndarray:
        assert held.wait(60)
        return chunks(*args, **kwargs)

    policy.chunks = slow  # type: ignore[method-assign]
    held.set()
    acted = [policy.act(observe(rng, 1))]  # the first chunk is waited for
    held.clear()
    acted += [policy.act(observe(rng, 1)) for _ in range(7)]  # asked for at step 4, due at 6: steps 6 and 7 are late
    assert (policy.late, policy.stops) == (2, 0)
    with pytest.raises(uwm_torch.LateAnswer, match=r"step 8 of row 0 has no action: .* asked for at step 4 was due at "
                       r"step 6 .*stop 1.*delay=2") as stop:  # fmt: skip
        policy.act(observe(rng, 1))
    assert np.isnan(stop.value.actions).all() and policy.stops == 1
    held.set()
    while not all(future.done() for _, future in policy._awaited):
        threading.Event().wait(0.01)
    after = policy.act(observe(rng, 1))
    assert np.isfinite(after).all() and policy.stops == 1
    np.testing.assert_array_equal(after[0], policy._chunks[0, 9 - 4])  # its row of step 9
    np.testing.assert_array_equal(policy._chunks[0, :2], np.concatenate(acted[4:6]))  # what was promised was executed
    policy.close()


def test_a_chunk_that_came_too_late_for_any_row_is_dropped(arm):
    policy = uwm_torch.load(arm.folder, execute=4, delay=2, switch="replacement", deadline=0.0)
    rng, held, chunks = np.random.default_rng(3), threading.Event(), policy.chunks
    policy.act(observe(rng, 1))

    def slow(*args: Any, **kwargs: Any) -> np.ndarray:
        assert held.wait(60)
        return chunks(*args, **kwargs)

    policy.chunks = slow  # type: ignore[method-assign]
    for step in range(1, 12):  # asked for at step 4, and used up after step 7
        with contextlib.nullcontext() if step < 8 else pytest.raises(uwm_torch.LateAnswer):
            policy.act(observe(rng, 1))
    held.set()
    wait([future for _, future in policy._awaited], 60)
    policy.deadline = 60.0
    action = policy.act(observe(rng, 1))  # the chunk of step 4 has no row for step 12
    np.testing.assert_array_equal(action[0], policy._chunks[0, 0])
    assert policy._origin[0] == 12 and policy.stops == 4
    policy.close()


def test_an_error_of_some_rows_loses_no_answer_of_others(arm):
    policy = uwm_torch.load(arm.folder, execute=4, delay=2, switch="naive", deadline=0.0)
    rng, held, chunks = np.random.default_rng(3), threading.Event(), policy.chunks
    errors = [uwm_torch.RunError("broken")]
    policy.reset(2)
    policy.act(observe(rng, 1), [0])
    for _ in range(3):
        policy.act(observe(rng, 2))

    def breaks_once(*args: Any, **kwargs: Any) -> np.ndarray:
        assert held.wait(60)
        if errors:
            raise errors.pop()
        return chunks(*args, **kwargs)

    policy.chunks = breaks_once  # type: ignore[method-assign]
    for _ in range(2):  # each row asks at its own step 4
        policy.act(observe(rng, 2))
    held.set()
    wait([future for _, future in policy._awaited], 60)
    with pytest.raises(uwm_torch.RunError, match="broken"):
        policy.act(observe(rng, 2))
    for _ in range(2):
        policy.act(observe(rng, 2))
    assert policy._origin[1] == 4  # and its step is 6
    policy.close()


PROGRAM = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
given = {key: torch.from_numpy(x) for key, x in np.load("in.npz").items()}
program = torch.export.load("policy.pt2").module()
noise = {key.removeprefix("noise/"): given.pop(key) for key in list(given) if key.startswith("noise/")}
np.save("out.npy", program(given, noise).numpy())
assert "uwm_torch" not in sys.modules and "jax" not in sys.modules
"""


@pytest.mark.slow
def test_a_program_of_torch_export_stands_alone(arm, tmp_path):
    policy = uwm_torch.load(arm.folder, limits=LIMITS)
    policy.export_program(tmp_path / "policy.pt2")
    inputs, noise = arm.inputs(3), draw(np.random.default_rng(4), 3)
    inputs = {key: x for key, x in inputs.items() if key.startswith("obs/")}
    np.savez(tmp_path / "in.npz", **inputs, **{f"noise/{m}": x for m, x in noise.items()})
    subprocess.run([sys.executable, "-I", "-c", PROGRAM], cwd=tmp_path, check=True, timeout=300)
    made = np.load(tmp_path / "out.npy")
    assert made.shape == (3, 8, 7) and made.dtype == np.float32
    np.testing.assert_allclose(made, policy.chunks(inputs, noise), atol=1e-6)
    files = {"model.json": ""}
    torch.export.load(tmp_path / "policy.pt2", extra_files=files)
    assert json.loads(files["model.json"]) == policy.description


def test_a_program_is_refused_by_name(arm, tmp_path):
    policy = uwm_torch.load(arm.folder)
    with pytest.raises(uwm_torch.UserError, match="ends in .pt2"):
        policy.export_program(tmp_path / "policy.pt")
    with pytest.raises(uwm_torch.UserError, match="use 'video': expected one that makes actions, policy"):
        policy.export_program(tmp_path / "policy.pt2", "video")
