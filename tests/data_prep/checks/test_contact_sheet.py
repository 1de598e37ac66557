from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.checks.contact_sheet import contact_sheet, fitting, font_of, instruction, printable
from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from uwm_jax.data.records import Dataset


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("contact_sheet")
    rlds_source.make(root / "source", [9, 3, 20])
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    return root / "out"


def test_the_contact_sheet_shows_the_right_frames(out: Path) -> None:
    dataset = Dataset(out)
    sheet, remarks = contact_sheet(dataset, num_episodes=3, num_frames=4)
    assert remarks == []
    pixels = np.asarray(sheet)
    # The wrist's red channel is 20 per episode, its green 6 per step, exactly (PNG, nearest neighbour).
    steps = {0: [0, 3, 5, 8], 1: [0, 1, 2], 2: [0, 6, 13, 19]}
    for episode, shown in steps.items():
        for step in shown:
            found = (pixels[..., 0] == 20 * episode) & (pixels[..., 1] == 6 * step)
            assert found.sum() >= 128 * 100, (episode, step)
    assert not ((pixels[..., 0] == 40) & (pixels[..., 1] == 6 * 7)).sum() > 128 * 100


def test_a_sheet_of_wide_cameras_is_no_wider_than_the_page(out: Path) -> None:
    dataset = Dataset(out)
    dataset.cameras["observation/exterior"] = (24, 32)
    heights = {}
    for frames in (4, 8, 64):
        sheet, _ = contact_sheet(dataset, num_episodes=1, num_frames=frames)
        assert sheet is not None
        heights[frames] = sheet.height
        assert (sheet.width <= 1248) == (frames < 64), "so many would be too small to see"
    dataset.cameras.pop("observation/exterior")
    dataset.cameras["observation/wrist"] = (16, 2)
    dataset.frames = lambda *_: None  # type: ignore[method-assign]
    narrow, _ = contact_sheet(dataset, num_episodes=1, num_frames=3)
    assert narrow is not None and narrow.width >= 190 + 3 * font_of(11).getlength("step 99999")
    assert heights[4] > heights[8] > heights[64] > 2 * 72


def test_what_the_font_lacks_is_escaped() -> None:
    font = font_of(13)
    assert printable("Nimm die Tasse über\n den Löffel, возьми") == "Nimm die Tasse über den Löffel, возьми"
    assert printable("拿 🤖\x07") == "\\u62ff \\U0001f916\\x07"
    missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))  # what is drawn for a missing character
    for c in "aü�возьмиكوب☕":
        drawn = printable(c)
        assert drawn == c and (font.getmask(c).getbbox(), bytes(font.getmask(c))) != missing, c
    assert fitting("short", font, 500) == "short"
    cut = fitting("拿" * 500, font, 300)
    assert cut.endswith("…") and 250 < font.getlength(cut) <= 300


def test_language_is_text_not_an_encoded_embedding(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    assert instruction(Dataset(copy), 2) == "do thing 2"
    manifest["step_features"]["language_instruction"] |= {"dtype": "float32", "encoding": "zlib"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert instruction(Dataset(copy), 2) == ""
