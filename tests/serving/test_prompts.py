"""Sentences to embeddings: by a table whose encoder is a function of the string alone, and by a tiny CLIP."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.caches import embedding
from tests import clip
from tests.data_prep import language_source
from tests.serving.small_model import make_contract, make_server, observation
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec, TextEncoder
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.serving.connections import in_thread
from uwm_jax.serving.prompts import Table, open_prompts
from uwm_jax.serving.uwm_client import Client, RequestError
from uwm_jax.torch_bridge import clip_text

WIDTH = 4
SENTENCES = {"pick", "pick it", "push", "push a block", "push it", "put it down and push the button again"}


def embedded(text: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(text.strip().encode())).normal(size=WIDTH).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a table `clip` by an encoder of sha256 `00...`."""
    made = language_source.make(tmp_path_factory.mktemp("prompts"))
    encoder = SimpleNamespace(
        width=WIDTH, embed=lambda texts: np.stack(list(map(embedded, texts))), too_long=lambda texts: 0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding.clip_text, "fingerprint", lambda name: "00" * 32)
        patch.setattr(embedding.clip_text, "ClipText", lambda name: encoder)
        embedding.make_table(made, "clip", "encoder", command="go on")
    return made


def spec_of(text_dim: int = WIDTH, encoder: TextEncoder | None = None) -> DataSpec:
    window = WindowSpec.from_config(base().data.window)
    return DataSpec(window, {"front": (4, 4)}, {}, 2, text_dim, Normalizer(), text_encoder=encoder)


def test_known_sentences_have_the_tables_embeddings(dataset: Path) -> None:
    prompts = open_prompts(spec_of(), datasets=[dataset, dataset], table="clip", asked=True)
    assert isinstance(prompts, Table)
    for text in SENTENCES | {""}:
        found = prompts(f" {text}\n")
        assert found.dtype == np.float32 and found.flags.writeable
        np.testing.assert_array_equal(found, embedded(text))


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("push the block", "push a block"),
        ("Pick it up", "pick it"),
        ("push the button", "put it down and push the"),
        ("psh", "push"),
    ],
)
def test_an_unknown_sentence_is_refused_with_the_nearest(dataset: Path, text: str, nearest: str) -> None:
    prompts = open_prompts(spec_of(), datasets=[dataset], table="clip", asked=True)
    assert isinstance(prompts, Table)
    with pytest.raises(UserError, match="is none of the 6 sentences of the text table; the nearest are") as e:
        prompts(text)
    assert prompts.nearest(text)[0].startswith(nearest) and f"'{nearest}" in str(e.value)
    assert len(prompts.nearest(text)) == 3


def test_a_table_of_many_sentences_answers_at_once() -> None:
    texts = [
        "",
        *(f"put the {colour} cup number {i} on the shelf" for i in range(5_000) for colour in ("red", "blue")),
    ]
    prompts = Table([SimpleNamespace(texts=texts, embeddings=np.zeros((len(texts), 2), np.float32))])
    assert prompts.nearest("put the red cup number 777 on a shelf")[0] == "put the red cup number 777 on the shelf"


def test_a_missing_table_is_told_and_refused_where_it_was_asked_for(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_prompts(spec_of(), datasets=[tmp_path], table="clip") is None
    assert "warning: prompts: " in capsys.readouterr().err
    for where, table in ((tmp_path, "clip"), (dataset, "other")):
        with pytest.raises(UserError, match=r"no text here|holds no dataset|manifest"):
            open_prompts(spec_of(), datasets=[where], table=table, asked=True)


def test_a_table_of_another_encoder_or_width_is_refused(dataset: Path) -> None:
    with pytest.raises(UserError, match="are by another encoder"):
        open_prompts(spec_of(encoder=TextEncoder("x", "11" * 32)), datasets=[dataset], table="clip", asked=True)
    with pytest.raises(UserError, match="expected embeddings of 5, found 4"):
        open_prompts(spec_of(5), datasets=[dataset], table="clip", asked=True)


def test_a_model_without_text_has_no_prompts(dataset: Path) -> None:
    assert open_prompts(spec_of(0), datasets=[dataset], table="clip") is None
    with pytest.raises(UserError, match="--text_encoder: this model reads no text"):
        open_prompts(spec_of(0), encoder="recorded")
    with pytest.raises(UserError, match="--text_table: this model reads no text"):
        open_prompts(spec_of(0), datasets=[dataset], table="clip", asked=True)


def test_prompts_reach_the_model_through_a_connection(dataset: Path) -> None:
    prompts = open_prompts(spec_of(), datasets=[dataset], table="clip", asked=True)
    contract = make_contract(WIDTH, prompts=prompts)
    seen: list[np.ndarray] = []
    sample = contract.actor.backend.sample

    def watched(use: str, inputs: Mapping[str, np.ndarray], *rest: Any, **more: Any) -> dict[str, np.ndarray]:
        seen.append(inputs["obs/text"])
        return sample(use, inputs, *rest, **more)

    contract.actor.backend.sample = watched  # type: ignore[method-assign]
    with in_thread(make_server(contract)) as address, Client(address, wait=10) as client:
        reply = client.infer(observation() | {"prompt": "push it"})
        assert reply["actions"].shape == (16, 3)
        np.testing.assert_array_equal(seen[-1][0], embedded("push it"))
        with pytest.raises(RequestError, match="prompt: 'pull' is none of the 6 sentences .* the nearest are 'push'"):
            client.infer(observation() | {"prompt": "pull"})
        with pytest.raises(RequestError, match="missing prompt or obs/text"):
            client.infer(observation())


def test_a_model_without_text_ignores_a_prompt_and_says_so_once() -> None:
    with in_thread(make_server()) as address, Client(address, wait=10) as client:
        told = ["prompt" in client.infer(observation() | {"prompt": "push it"}) for _ in range(3)]
    assert told == [True, False, False]


@pytest.mark.torch
def test_the_recorded_encoder_embeds_any_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(clip.make(tmp_path / "tiny"))
    recorded = TextEncoder(folder, clip_text.fingerprint(folder))
    spec = spec_of(clip.WIDTH, recorded)
    prompts = open_prompts(spec, encoder="recorded")
    assert prompts is not None
    expected = clip_text.embed(folder, ["push", "a new one"])
    np.testing.assert_allclose(prompts("push"), expected[0], atol=1e-6)
    np.testing.assert_allclose(prompts("a new one"), expected[1], atol=1e-6)
    opened = prompts._opened  # type: ignore[attr-defined]
    monkeypatch.setattr(opened, "embed", lambda texts: pytest.fail("embedded twice"))
    np.testing.assert_array_equal(prompts("push"), prompts("push"))
    monkeypatch.undo()
    prompts("push " * 20)
    assert "its end is cut off" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"expected the text encoder of sha256 {'11' * 32}"):
        open_prompts(dataclasses.replace(spec, text_encoder=TextEncoder("x", "11" * 32)), encoder=folder)
    with pytest.raises(UserError, match="does not know its encoder"):
        open_prompts(dataclasses.replace(spec, text_encoder=None), encoder="recorded")
    with pytest.raises(UserError, match="expected embeddings of 5, found 8"):
        open_prompts(spec_of(5, recorded), encoder="recorded")
