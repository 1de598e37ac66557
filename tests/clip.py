"""A tiny CLIP text encoder with random weights, in a folder as transformers saves it, for tests."""

from __future__ import annotations

import json
from pathlib import Path

LONGEST, WIDTH = 16, 8


def make(folder: Path, seed: int = 0) -> Path:
    """Writes a text encoder of two layers and a tokenizer with the letters and the word `push`; returns the folder."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "pu", "pus", "push</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\np u\npu s\npus h</w>\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=LONGEST,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    torch.manual_seed(seed)
    model = transformers.CLIPTextModelWithProjection(config)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder
