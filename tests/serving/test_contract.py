"""What a request may hold, and how it is read; on a stub model with two frames, a camera of 4 x 5 and a 2-d state."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

from tests.serving.small_model import FRAME, HORIZON, WIDTH, make_contract, observation
from uwm_jax.data.cover import cover
from uwm_jax.errors import UserError
from uwm_jax.serving.contract import Contract, Request
from uwm_jax.serving.messages import encode


def read(contract: Contract | None = None, **entries: Any) -> Request:
    return (contract or make_contract()).read(encode({key.replace("__", "/"): x for key, x in entries.items()}))


def refused(contract: Contract | None = None, **entries: Any) -> str:
    with pytest.raises(UserError) as error:
        read(contract, **entries)
    return str(error.value)


def test_a_single_frame_stands_for_the_whole_history() -> None:
    request = read(**observation(state=11.0, pixel=3))
    assert request.mode == "policy" and request.repeated and request.request_id is None and request.seed is None
    assert request.inputs["obs/front"].shape == (2, *FRAME, 3) and request.inputs["obs/front"].dtype == np.uint8
    np.testing.assert_array_equal(request.inputs["obs/state"], np.full((2, 2), 11.0, np.float32))
    whole = read(**observation(state=11.0, pixel=3, frames=2))
    assert not whole.repeated
    for key, value in whole.inputs.items():
        np.testing.assert_array_equal(value, request.inputs[key])


@pytest.mark.parametrize("dtype", ["|u1", "|b1", "<i4", "<i8", "<f4", "<f8"])
def test_vectors_of_every_dtype_are_cast(dtype: str) -> None:
    state = np.array([9, 11]).astype(dtype)
    found = read(**observation() | {"obs/state": state}).inputs["obs/state"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack([state, state]).astype(np.float32))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "missing obs/front: expected uint8 (4, 5, 3) or (2, 4, 5, 3)"),
        ({}, "missing obs/state: expected numbers (2,) or (2, 2)"),
        (
            {"obs/front": np.zeros((5, 4, 3), np.uint8)},
            "obs/front: expected uint8 (4, 5, 3) or (2, 4, 5, 3), found uint8 (5, 4, 3)",
        ),
        ({"obs/front": np.zeros((5, 4, 3), np.uint8)}, "--resize=cover"),
        ({"obs/front": np.zeros((4, 5, 3), np.float32)}, "found float32 (4, 5, 3)"),
        ({"obs/front": np.zeros((3, 4, 5, 3), np.uint8)}, "found uint8 (3, 4, 5, 3)"),
        ({"obs/front": "text"}, "obs/front: expected uint8"),
        ({"obs/front": 3}, "obs/front: expected uint8"),
        ({"obs/front": None}, "obs/front: expected uint8"),
        ({"obs/state": np.zeros(3)}, "obs/state: expected numbers (2,) or (2, 2), found float64 (3,)"),
        ({"obs/state": "text"}, "obs/state: expected numbers"),
        ({"obs/state": np.full(2, 1e39)}, "obs/state: holds values that are not finite in float32"),
        ({"obs/state": np.full(2, 1e9)}, "state is far outside the range that the model was trained on"),
        ({"mode": "video"}, "mode: expected one of policy, forward, inverse; found 'video'"),
        ({"mode": 3}, "mode: expected one of policy, forward, inverse; found int 3"),
        ({"mode": np.zeros(2)}, "mode: expected one of"),
        ({"mode": "forward"}, "missing action: expected numbers (16, 3)"),
        ({"seed": -1}, "seed: expected an integer from 0 to 4294967295, found int -1"),
        ({"seed": 2**32}, "seed: expected"),
        ({"seed": 1.5}, "seed: expected"),
        ({"seed": True}, "seed: expected"),
        ({"reset": 1}, "reset: expected true or false, found int 1"),
        ({"request_id": 1.5}, "request_id: expected an integer or a string of at most 128 characters"),
        ({"request_id": "x" * 129}, "request_id: expected"),
        ({"request_id": 7, "seed": -1}, "request 7: seed: expected"),
        ({"obs/frnt": 1}, "obs/frnt: unknown, did you mean obs/front"),
        ({"something": 1}, "something: unknown"),
        ({"prompt": 3}, "prompt: expected a string, found int 3"),
        (
            {"promised": np.zeros((2, 4), np.float32)},
            "promised: expected (d, 3) with d less than 16, found float32 (2, 4)",
        ),
        ({"promised": np.zeros((HORIZON, WIDTH), np.float32)}, "promised: expected (d, 3) with d less than 16"),
        ({"promised": 1}, "promised: expected"),
        ({"promised": np.full((1, WIDTH), 1e39)}, "promised: holds values that are not finite in float32"),
        ({"promised": np.zeros((1, WIDTH)), "mode": "forward"}, "promised: only a request of mode policy has it"),
        ({"noise/action": np.zeros(2)}, "noise/action: expected numbers (1,), found float64 (2,)"),
    ],
)
def test_what_is_refused_names_the_field(entries: dict[str, Any], words: str) -> None:
    whole = {} if entries == {} else observation() | entries
    assert words in refused(**whole)


def test_all_that_is_wrong_is_said_at_once() -> None:
    told = refused(**{"obs/front": np.zeros((5, 4, 3), np.uint8), "obs/state": np.zeros(3), "seed": -1, "x": 1})
    assert all(word in told for word in ("obs/front", "obs/state", "seed", "x: unknown"))


def test_other_uses_take_what_they_are_given() -> None:
    action = np.ones((HORIZON, WIDTH))
    request = read(**observation() | {"mode": "forward", "action": action, "noise/action": np.array([0.5])})
    assert request.mode == "forward" and request.inputs["action"].dtype == np.float32
    np.testing.assert_array_equal(request.inputs["action"], action)
    np.testing.assert_array_equal(request.noise["action"], np.array([0.5], np.float32))
    assert "action" not in read(**observation() | {"action": action}).inputs  # known, and not the policy's


def test_latents_stand_in_for_following_frames() -> None:
    frames, latents = np.zeros((2, *FRAME, 3), np.uint8), np.ones((1, 2, 1, 1, 3))
    request = read(**observation() | {"mode": "inverse", "next_obs/front": frames})
    assert request.inputs["next_obs/front"].shape == (2, *FRAME, 3)
    request = read(**observation() | {"mode": "inverse", "next_obs_latent": latents})
    assert "next_obs/front" not in request.inputs
    np.testing.assert_array_equal(request.inputs["next_obs_latent"], latents.astype(np.float32))
    told = refused(**observation() | {"mode": "inverse", "next_obs_latent": latents[0]})
    assert "next_obs_latent: expected numbers (1, 2, 1, 1, 3), found float64 (2, 1, 1, 3)" in told
    assert "missing next_obs/front: expected uint8 (2, 4, 5, 3)" in refused(**observation() | {"mode": "inverse"})
    about = make_contract().metadata()["uses"]["inverse"]
    assert about["or"] == {"next_obs_latent": {"shape": [1, 2, 1, 1, 3], "dtype": "float32"}}


def test_numbers_of_a_request_may_be_numpys() -> None:
    fields = {"seed": np.int64(5), "request_id": np.int32(9), "reset": np.bool_(True)}
    request = read(**observation() | fields)
    assert (request.seed, request.request_id, request.reset) == (5, 9, True)
    assert type(request.seed) is int and type(request.request_id) is int


def test_promised_rows_are_read() -> None:
    rows = np.arange(6).reshape(2, WIDTH)
    np.testing.assert_array_equal(read(**observation() | {"promised": rows}).promised, rows.astype(np.float32))
    assert read(**observation() | {"promised": np.zeros((0, WIDTH))}).promised is None


def test_values_somewhat_out_of_range_are_remarked() -> None:
    request = read(**observation(state=16.0))  # 3 when normalised
    assert len(request.remarks) == 1 and "state is far outside" in request.remarks[0]
    assert not read(**observation(state=12.0)).remarks


def test_names_are_translated() -> None:
    contract = make_contract(keys={"observation/image": "obs/front", "observation/gripper": ""})
    entries = observation() | {"observation/gripper": np.zeros(1)}
    entries["observation/image"] = entries.pop("obs/front")
    assert read(contract, **entries).inputs.keys() == {"obs/front", "obs/state"}
    told = refused(contract, **entries | {"obs/front": entries["observation/image"]})
    assert "obs/front was sent too, under another name" in told
    with pytest.raises(UserError, match="--keys=a=obs/frnt: no request has obs/frnt. Did you mean obs/front"):
        make_contract(keys={"a": "obs/frnt"})


def test_keys_of_the_data_that_the_model_does_not_read_are_ignored() -> None:
    contract = make_contract(known={"gripper"})
    assert read(contract, **observation() | {"obs/gripper": np.zeros(3)}).inputs.keys() == {"obs/front", "obs/state"}


def test_frames_of_another_size_cover_the_models() -> None:
    contract = make_contract(resize=True)
    picture = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    found = read(contract, **observation() | {"obs/front": picture}).inputs["obs/front"]
    np.testing.assert_array_equal(found, np.stack([cover(picture, FRAME)] * 2))
    two = np.stack([picture, 255 - picture])
    found = read(contract, **observation() | {"obs/front": two}).inputs["obs/front"]
    np.testing.assert_array_equal(found[1], cover(255 - picture, FRAME))
    for shape in ((0, 5, 3), (4, 0, 3), (4, 5, 4), (5, 3), (1, 1, 1081, 5, 3), (1081, 5, 3)):
        assert "obs/front: expected" in refused(contract, **observation() | {"obs/front": np.zeros(shape, np.uint8)})


def test_prompts_are_embedded() -> None:
    def embed(text: str) -> np.ndarray:
        if text != "push":
            raise UserError(f"unknown: {text!r}. Nearest is 'push'.")
        return np.arange(4, dtype=np.float32)

    contract = make_contract(text_dim=4, prompts=embed)
    assert contract.reads_text
    np.testing.assert_array_equal(read(contract, **observation() | {"prompt": "push"}).inputs["obs/text"], np.arange(4))
    embedding = np.ones(4)
    given = read(contract, **observation() | {"obs/text": embedding})
    np.testing.assert_array_equal(given.inputs["obs/text"], np.ones(4, np.float32))
    assert "prompt: unknown: 'pull'. Nearest is 'push'" in refused(contract, **observation() | {"prompt": "pull"})
    assert "missing prompt or obs/text" in refused(contract, **observation())
    assert "send one of them" in refused(contract, **observation() | {"prompt": "push", "obs/text": embedding})
    assert "no text encoder" in refused(make_contract(text_dim=4), **observation() | {"prompt": "push"})
    assert read(**observation() | {"prompt": "push"}).prompt == "push"  # a model without text


def test_stepwise_requests_hold_one_step() -> None:
    contract = make_contract(stepwise=True)
    assert read(contract, **observation()).inputs["obs/front"].shape == (*FRAME, 3)
    assert "expected uint8 (4, 5, 3), found uint8 (2, 4, 5, 3)" in refused(contract, **observation(frames=2))
    assert "mode: expected one of policy" in refused(contract, **observation() | {"mode": "forward"})
    told = refused(contract, **observation() | {"promised": np.zeros((1, WIDTH))})
    assert "promised: the server keeps the chunk" in told
    assert contract.metadata()["inputs"]["obs/front"]["shape"] == [*FRAME, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modes": ["video"]}, "--modes=video: expected some of policy, forward, inverse"),
        ({"modes": ["forward"]}, "expected policy, which acts, among the modes"),
        ({"modes": ["policy", "forward"], "stepwise": True}, "alone with --stepwise"),
        ({"execute": 17}, "--execute=17: expected 1 to 16"),
    ],
)
def test_what_cannot_be_served(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_contract(**options)


def test_metadata_tell_what_to_send() -> None:
    contract = make_contract()
    told = msgpack.unpackb(encode(contract.metadata()))  # it can be sent
    assert told["inputs"] == {
        "obs/front": {"shape": [2, 4, 5, 3], "dtype": "uint8", "order": "frames oldest first, height, width, RGB"},
        "obs/state": {"shape": [2, 2], "dtype": "float32", "order": "frames oldest first, numbers"},
    }
    assert told["order"] == ["obs/front", "obs/state"] and told["frames"] == 2 and told["history"] == [1, 0]
    assert (told["action_horizon"], told["action_dim"], told["execute"]) == (16, 3, 8)
    assert told["modes"] == ["policy", "forward", "inverse"] and told["acting"] == "policy"
    assert told["uses"]["forward"] == {
        "makes": ["next_obs"],
        "given": {"action": {"shape": [16, 3], "dtype": "float32"}},
    }
    assert (told["stepwise"], told["text"], told["promised"], told["step"]) == (False, False, True, 7)


def test_the_size_of_a_message_follows_from_the_inputs() -> None:
    contract = make_contract(modes=["policy"])
    declared = 2 * 4 * 5 * 3 + 8 * (2 * 2 + HORIZON * WIDTH + 7)  # state, promised, noise
    assert declared <= contract.limit <= declared + 2**16
    with pytest.raises(UserError, match="the message has .* bytes: expected at most"):
        contract.read(b"\0" * (contract.limit + 1))
    largest = observation(frames=2) | {
        "obs/state": np.zeros((2, 2)),
        "promised": np.zeros((15, WIDTH)),
        "prompt": "x" * 4096,
    }
    contract.read(encode(largest))
    dropping = make_contract(modes=["policy"], keys={"wrist": ""})
    assert dropping.limit == contract.limit + 2 * 4 * 5 * 3


def test_examples_are_requests_of_every_program() -> None:
    kinds = [(r.mode, r.promised is not None, "next_obs_latent" in r.inputs) for r in make_contract().examples()]
    assert kinds == [
        ("policy", False, False),
        ("policy", True, False),
        ("forward", False, False),
        ("inverse", False, False),
        ("inverse", False, True),
    ]
