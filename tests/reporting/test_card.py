"""The model card where little is known, and where what is known is odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from uwm_jax.reporting.card import card

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def described(**changed: Any) -> dict[str, Any]:
    """What `model.json` says of a small GR1."""
    return {
        "system": "gr1",
        "uses": {"joint": {"makes": ["action", "next_obs"], "given": []}},
        "acting": "joint",
        "step": 12_000,
        "parameters": "average",
        "tensors": {"a": {"shape": [1000, 500]}, "b": {"shape": []}},
        "camera_order": ["front"],
        "cameras": {"front": [180, 320]},
        "flip": {},
        "low_dim": {},
        "text_dim": 0,
        "window": {"obs": [0]},
        "shapes": {"action": [16, 10]},
        "limits": None,
        "config": {"batch_size": 36, "optimizer": {"learning_rate": 1e-4}, "init_from": "", "branch_from": ""},
        "code_version": "0.1.0",
        "fingerprints": {"run": "f" * 64, "data": None},
    } | changed


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_of_an_export_folder_alone() -> None:
    text = card("me/robot", described(), "unknown", program=False)
    assert text.startswith("---\nlibrary_name: uwm_jax\nlicense: unknown\n") and "uwm_torch.load" not in text
    assert "the moving average of the parameters after step 12,000, 0.5 million numbers" in text
    assert "`joint` (makes action and next_obs)" in text and "--mode=joint" in text
    assert "The publisher named none." in text and "was not evaluated" in text
    assert "base_model" not in header(text)


def test_data_text_turned_cameras_and_limits() -> None:
    text = card(
        "me/robot",
        described(
            fingerprints={"run": "f" * 64, "data": [{"fingerprint": "abc" * 20, "split": "train"}]},
            flip={"front": "180"},
            text_dim=512,
            text_encoder={"name": "some/clip", "sha256": "0"},
            limits={"low": [0.0], "high": [1.0]},
            uses={"forward": {"makes": ["next_obs"], "given": ["action"]}},
        ),
        "apache-2.0",
    )
    assert f"| `{'abc' * 4}` | train |" in text
    assert "uint8 RGB, turned as in its dataset (180)" in text
    assert "| `obs/text` | (512,) | embedding by some/clip |" in text
    assert "Actions are cut to the limits that `model.json` states." in text
    assert "`forward` (makes next_obs, given action)" in text


@pytest.mark.parametrize(
    ("spec", "base", "said"),
    [
        (f"someone/pretrained@{COMMIT}@900", "someone/pretrained", "started from [someone/pretrained]"),
        ("/home/somebody/secret/run@900", None, "started from another run"),
    ],
)
def test_the_origin_of_a_finetuned_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, base: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = described()["config"] | {"init_from": spec}
    text = card("me/robot", described(config=config), "mit")
    assert header(text).get("base_model") == base
    assert said in text and "secret" not in text


def test_odd_names_stay_in_their_place() -> None:
    odd = 'a|b\n<script>alert("x")</script>'
    text = card("me/robot", described(text_dim=3, text_encoder={"name": odd, "sha256": "0"}), "x: y\n- z")
    assert header(text)["license"] == "x: y\n- z"
    assert "<script>" not in text and "| `obs/text` | (3,) | embedding by a\\|b &lt;script>" in text
