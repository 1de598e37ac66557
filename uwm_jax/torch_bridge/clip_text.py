"""CLIP's text encoder through transformers, as the frozen encoder of instructions.

An embedding is `text_projection` of the last hidden state at the end-of-text token (`text_embeds` of transformers'
`CLIPTextModelWithProjection`, section 3.1.2 of "Learning Transferable Visual Models From Natural Language
Supervision"), in float32 and not L2-normalised. torch and transformers are imported when an encoder is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax.errors import UserError, warn
from uwm_jax.reading import read_json
from uwm_jax.torch_bridge import hub

_WHAT = "CLIP text encoder"
_WEIGHTS = (("model.safetensors",), ("pytorch_model.bin",))
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# Settings of special tokens, as far as a folder has them: they decide tokens beside the tokenizer's own files.
_SPECIAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MODEL_TYPES = ("clip", "clip_text_model")
_ARGMAX = 2  # `eos_token_id` of OpenAI's configurations, for which transformers takes the token with the largest number


def files_of(encoder: str) -> list[Path]:
    """The files that decide an encoder's embeddings: configuration, weights and tokenizer.

    Args:
        encoder: a folder as transformers saves it, or a hub name "owner/name[@revision][/subfolder]".
    Raises:
        UserError: a file is missing, or the hub cannot serve it.
    """
    files = hub.fetch(encoder, ["config.json"], _WHAT, optional=_SPECIAL)
    for alternatives in (_WEIGHTS, _TOKENIZERS):
        files += _first_of(encoder, alternatives)
    return files


def fingerprint(encoder: str) -> str:
    """sha256 of the names and contents of `files_of(encoder)`; it needs neither torch nor transformers."""
    digest = hashlib.sha256()
    for file in sorted(files_of(encoder)):
        with file.open("rb") as f:
            digest.update(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class ClipText:
    """An opened encoder.

    Args:
        encoder: as `files_of` takes it.
        device: torch's name of a device; "" for CUDA where there is one, else the CPU.
    Raises:
        UserError: torch or transformers is not installed; the files are no CLIP text encoder with a projection, or
            the tokenizer is another model's.

    Attributes:
        name: `encoder`.
        width: E of the embeddings.
        longest: tokens that the model reads; the end of a longer text is cut off.
    """

    def __init__(self, encoder: str, device: str = ""):
        try:
            import torch
            import transformers
        except ImportError as e:
            raise UserError(
                f"CLIP needs {e.name}, which is not installed: pip install 'uwm-jax[torch]', or for this alone "
                "pip install torch transformers."
            ) from e
        self.name = encoder
        folder = files_of(encoder)[0].parent
        stored = read_json(folder / "config.json")
        kind = stored.get("model_type")
        if kind not in _MODEL_TYPES:
            raise UserError(
                f"{encoder}: expected a {_WHAT} (model_type {' or '.join(_MODEL_TYPES)}), found {kind!r} in its "
                "config.json."
            )
        self._torch = torch
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with _quiet(transformers):
                self._tokenizer: Any = transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
                config = transformers.CLIPTextConfig.from_pretrained(folder, local_files_only=True)
                # Of a complete CLIP this one holds, whatever the part about its text tower says.
                config.projection_dim = stored.get("projection_dim", config.projection_dim)
                model, found = transformers.CLIPTextModelWithProjection.from_pretrained(
                    folder, config=config, local_files_only=True, output_loading_info=True
                )
        except Exception as e:  # damaged files raise what their parser raises
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise UserError(f"{encoder}: transformers cannot open this {_WHAT}: {type(e).__name__}: {reason}") from e
        # transformers draws at random what the weights lack, and only warns.
        if lacking := sorted([*found["missing_keys"], *(str(key) for key in found.get("mismatched_keys", ()))]):
            raise UserError(
                f"{encoder}: the weights lack {', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}, so "
                "this is no CLIP text encoder with its projection. Use the checkpoint of a complete CLIP model."
            )
        self._model: Any = model.float().eval().to(self._device)
        self.width, self.longest = int(model.config.projection_dim), int(model.config.max_position_embeddings)
        size = len(self._tokenizer)
        end = next(reversed(self._tokenizer("")["input_ids"]), None)
        fits = size <= model.config.vocab_size and model.config.eos_token_id in (_ARGMAX, end)
        if not fits or (model.config.eos_token_id == _ARGMAX and end != size - 1):
            raise UserError(
                f"{encoder}: the tokenizer has {size} tokens and ends a text by token {end}; the model has "
                f"{model.config.vocab_size} and config.json says {model.config.eos_token_id}. They belong to different "
                "models: use the tokenizer that comes with the weights."
            )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of some texts, (n, E) float32, computed as one batch."""
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self._device)
        with self._torch.inference_mode():
            embeddings = self._model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds
        return embeddings.cpu().numpy()

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of some texts have more tokens than the model reads."""
        return sum(len(ids) > self.longest for ids in self._tokenizer(list(texts), truncation=False)["input_ids"])


def open_encoder(encoder: str, sha256: str = "") -> ClipText:
    """The encoder of a name, which must have this sha256, such as `DataSpec.text_encoder` of a trained model.

    Args:
        encoder: as `files_of` takes it.
        sha256: "" for any.
    Raises:
        UserError: as `ClipText`; the encoder has another sha256.
    """
    if sha256 and (found := fingerprint(encoder)) != sha256:
        raise UserError(f"{encoder}: expected the text encoder of sha256 {sha256}, found {found}. Use that encoder.")
    return ClipText(encoder)


def embed(encoder: str, texts: Sequence[str], sha256: str = "") -> np.ndarray:
    """The embeddings of a few texts, (n, E) float32, for an observation's `text`; a warning tells of cut-off ends.

    Args and errors: as `open_encoder`.
    """
    opened = open_encoder(encoder, sha256)
    if cut := opened.too_long(texts):
        warn(f"{cut} of {len(texts)} texts have more than {opened.longest} tokens: their ends are cut off.")
    return opened.embed(texts)


def _first_of(encoder: str, alternatives: Sequence[Sequence[str]]) -> list[Path]:
    """The files of the first alternative that the encoder has."""
    for files in alternatives[:-1]:
        with contextlib.suppress(UserError):
            return hub.fetch(encoder, files, _WHAT)
    return hub.fetch(encoder, alternatives[-1], _WHAT)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and the notes about the image tower's unused weights."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
