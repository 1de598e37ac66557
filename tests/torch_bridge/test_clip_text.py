"""The text encoder's files are checked before anything is embedded; its embeddings are compared in
`tests/data_prep/test_text.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import clip
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import clip_text

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return clip.make(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def copy(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "copy"))


def test_a_complete_clip_gives_the_embeddings_of_its_text_tower(encoder: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    text = transformers.CLIPTextConfig.from_pretrained(encoder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=8
    )
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "full")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(encoder / name, tmp_path / "full" / name)
    texts = ["push a block", "", "pick"]
    tokens = transformers.CLIPTokenizerFast.from_pretrained(encoder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model.get_text_features(**tokens)
    expected = getattr(expected, "pooler_output", expected).numpy()
    opened = clip_text.ClipText(str(tmp_path / "full"))
    assert opened.width == 6
    np.testing.assert_allclose(opened.embed(texts), expected, atol=1e-6, rtol=0)


def test_a_text_that_is_cut_off_is_told(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = clip_text.embed(str(encoder), ["push", "push " * 20])
    assert made.shape == (2, clip.WIDTH)
    assert f"warning: 1 of 2 texts have more than {clip.LONGEST} tokens: their ends are cut" in capsys.readouterr().err
    clip_text.embed(str(encoder), ["push"])
    assert "warning" not in capsys.readouterr().err


def test_the_fingerprint_is_that_of_the_files_that_decide_the_embeddings(encoder: Path, copy: Path) -> None:
    found = clip_text.fingerprint(str(encoder))
    (copy / "README.md").write_text("another file")
    assert clip_text.fingerprint(str(copy)) == found
    # Of settings of special tokens too: with each of these, transformers makes other tokens of "push".
    expected = clip_text.embed(str(copy), ["push"])
    for name, settings in (
        ("tokenizer_config.json", {"pad_token": "u"}),
        ("special_tokens_map.json", {"unk_token": "u"}),
        ("added_tokens.json", {"pus": 53}),
    ):
        (copy / name).write_text(json.dumps(settings))
        assert clip_text.fingerprint(str(copy)) != found
        assert np.abs(clip_text.embed(str(copy), ["push"]) - expected).max() > 0.01, name
        (copy / name).unlink()
    (copy / "merges.txt").write_text("#version: 0.2\np u\n")
    assert clip_text.fingerprint(str(copy)) != found


def test_what_is_no_clip_text_encoder_is_refused(encoder: Path, copy: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    for name in ("merges.txt", "model.safetensors", "config.json"):
        shutil.copytree(encoder, tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(UserError, match=rf"of the CLIP text encoder, but {name.split('.')[0]}|but pytorch_model"):
            clip_text.ClipText(str(tmp_path / name))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(UserError, match="expected a CLIP text encoder .* found 't5'"):
        clip_text.ClipText(str(copy))
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    with pytest.raises(UserError, match=r"ends a text by token 56; the model has 57 and config.json says 7"):
        clip_text.ClipText(str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "text_projection.weight"}, copy / "model.safetensors")
    with pytest.raises(UserError, match="the weights lack text_projection.weight"):
        clip_text.ClipText(str(copy))
    (copy / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="transformers cannot open this CLIP text encoder"):
        clip_text.ClipText(str(copy))
    with pytest.raises(UserError, match="there is no such folder"):
        clip_text.ClipText(str(tmp_path / "nowhere"))


def test_a_hub_name_is_fetched_file_by_file_and_is_the_same_encoder(
    encoder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, file: str, subfolder: str | None, revision: str | None) -> str:
        asked.append((repo, file, subfolder, revision))
        if not (copy / file).exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: no {file}")
        return str(copy / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert clip_text.fingerprint("owner/clip@main/text") == clip_text.fingerprint(str(encoder))
    files = ["config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    files += ["model.safetensors", "tokenizer.json", "vocab.json", "merges.txt"]
    assert asked == [("owner/clip", file, "text", "main") for file in files]
    np.testing.assert_array_equal(
        clip_text.embed("owner/clip", ["push"]),
        clip_text.embed(str(encoder), ["push"], clip_text.fingerprint(str(copy))),
    )
    with pytest.raises(UserError, match=r"expected the text encoder of sha256 0000, found [0-9a-f]{64}"):
        clip_text.embed("owner/clip", ["push"], "0000")
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"CLIP text encoder \(pytorch_model.bin\) could not be fetched from the Hugging"
    ):
        clip_text.fingerprint("owner/clip")
