"""The text of samples, from tables made with an encoder that is a function of the string alone."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_prep.caches import embedding
from tests.data_prep import language_source
from tests.data_prep.language_source import FIRST, SECOND, TASKS, strings
from uwm_jax import config as config_lib
from uwm_jax.config import base, source
from uwm_jax.data.loader import Loader
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import DataSpec, TextEncoder
from uwm_jax.errors import UserError
from uwm_jax.runs import opening

KEYS = ("language_instruction", "language_instruction_2")


def _embedding(text: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([zlib.crc32(text.strip().encode()), seed]).normal(size=4).astype(np.float32)


def _make_table(dataset: Path, seed: int = 0, **options) -> None:
    """A table `clip` by the encoder of a seed."""
    encoder = SimpleNamespace(
        width=4,
        embed=lambda texts: np.stack([_embedding(text, seed) for text in texts]),
        too_long=lambda texts: 0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding.clip_text, "fingerprint", lambda name: f"{seed:02d}" * 32)
        patch.setattr(embedding.clip_text, "ClipText", lambda name: encoder)
        embedding.make_table(dataset, "clip", f"encoder-{seed}", command="go on", **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    dataset = language_source.make(tmp_path_factory.mktemp("texts"))
    _make_table(dataset)
    return dataset


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same dataset without a table."""
    return Path(shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("text")))


@pytest.fixture
def config(made: Path) -> ConfigDict:
    c = base()
    c.data.path, c.data.cameras, c.data.low_dim = str(made), (), ("state",)
    c.data.window.action, c.data.window.next_obs = (1, 2), (3,)
    c.data.num_streams, c.data.num_threads, c.data.val_ratio = 8, 0, 0.25
    c.data.text, c.data.text_table = KEYS[0], "clip"
    return c


def _text_of(data: RunData, count: int) -> list[tuple[np.ndarray, int, int]]:
    """(the text, episode, last observed step) of the first samples."""
    loader = Loader(data, batch_size=8)
    found = []
    for position in range(count):
        batch = data.spec.empty(1)
        loader.load(batch, 0, 0, position)
        trace = loader.describe(position)
        found.append((batch["obs/text"][0], trace.episode, trace.origin + 1))
    return found


def test_a_sample_has_the_embedding_of_the_string_of_its_last_observed_step(config: ConfigDict) -> None:
    data = RunData(config.data, seed=0)
    assert data.spec.text_dim == 4 and data.spec.text_encoder == TextEncoder("encoder-0", "00" * 32)
    seen = set()
    for found, episode, step in _text_of(data, 60):
        text = strings(FIRST[episode])[step]
        np.testing.assert_array_equal(found, _embedding(text))
        seen.add(text)
    # The held-out episode, the first, has the same string as the last one.
    assert len(seen) >= 3
    told = "text language_instruction by encoder-0 (sha256 000000000000): 10 steps of language_instruction are empty"
    assert told in data.summary()
    config.data.text = "language_task"
    for found, episode, _ in _text_of(RunData(config.data, seed=0), 30):
        np.testing.assert_array_equal(found, _embedding(TASKS[episode]))


def test_a_choice_draws_among_the_strings_that_are_not_empty(config: ConfigDict) -> None:
    config.data.choices = ConfigDict({"instruction": KEYS})
    config.data.text, config.data.val_ratio = "instruction", 0.5
    data = RunData(config.data, seed=0)
    drawn: dict[tuple[str, ...], set[int]] = {}
    for found, episode, step in _text_of(data, 120):
        both = tuple(strings(runs[episode])[step].strip() for runs in (FIRST, SECOND))
        options = [text for text in both if text] or [""]
        (number,) = [i for i, text in enumerate(options) if np.array_equal(found, _embedding(text))]
        drawn.setdefault(both, set()).add(number)
    assert any(len(numbers) == 2 for numbers in drawn.values()), "each of two is drawn"
    again = _text_of(RunData(config.data, seed=0), 120)
    for (a, *_), (b, *_) in zip(_text_of(data, 120), again, strict=True):
        np.testing.assert_array_equal(a, b)
    windows = data.held_out(20)
    batch = windows.batch(0, len(windows))
    for found, episode, origin in zip(batch["obs/text"], windows.episodes, windows.origins, strict=True):
        both = [strings(runs[episode])[origin + 1].strip() for runs in (FIRST, SECOND)]
        np.testing.assert_array_equal(found, _embedding(both[0] or both[1]))


def test_what_cannot_be_read_is_refused(config: ConfigDict, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.data.text = "note"
    with pytest.raises(
        UserError, match=r"has no key 'note'; it has .* --encoder=encoder-0 --name=clip --keys=.*_2,note --over"
    ):
        RunData(config.data, seed=0)
    config.data.text, config.data.path = KEYS[0], str(copy)
    with pytest.raises(
        UserError, match=r"no text here .*python -m data_prep.text --dataset=.* --encoder=CLIP --name=clip`"
    ):
        RunData(config.data, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_embed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _make_table(copy)
    with pytest.raises(UserError, match="is unfinished: .* Continue it with `go on`"):
        RunData(config.data, seed=0)
    _make_table(copy)
    assert RunData(config.data, seed=0).spec.text_dim == 4
    config.data.text = ""
    with pytest.raises(UserError, match="config.data.text_table='clip' requires config.data.text"):
        config_lib.validate(config)


def test_sources_share_one_encoder_and_video_may_have_no_table(config: ConfigDict, made: Path, copy: Path) -> None:
    config.data.sources = ConfigDict({"robot": source(), "video": source(path=str(copy), use_actions=False)})
    data = RunData(config.data, seed=0)
    batch = data.spec.empty(1)
    data.sources["video"].load(batch, 0, 0, 0, data.spec)
    assert not batch["obs/text"].any()
    _make_table(copy, keys=["note"])
    data = RunData(config.data, seed=0)  # a table without this key
    data.sources["video"].load(batch, 0, 0, 0, data.spec)
    assert not batch["obs/text"].any()
    _make_table(copy, seed=1, overwrite=True)
    with pytest.raises(UserError) as e:
        RunData(config.data, seed=0)
    assert f"the text embeddings of source 'video' ({copy}) are by another encoder than those of source 'robot'" in str(
        e.value
    )
    assert "expected encoder-0 (sha256 000000000000), found encoder-1 (sha256 010101010101)" in str(e.value)
    config.data.sources.video.path = str(made)
    data = RunData(config.data, seed=0)
    data.sources["video"].load(batch, 0, 0, 0, data.spec)
    assert batch["obs/text"].any()


def test_a_run_continues_only_with_its_encoder(config: ConfigDict, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(opening.distributed, "require_same", lambda what, value: compared.append(value))
    _make_table(copy, seed=1)
    spec = RunData(config.data, seed=0).spec
    assert DataSpec.from_json(spec.to_json()).text_encoder == spec.text_encoder == TextEncoder("encoder-0", "00" * 32)
    old = {name: value for name, value in spec.to_json().items() if name != "text_encoder"}
    assert DataSpec.from_json(old).text_encoder is None
    config.data.path = str(copy)
    for stored, refused in ((spec.to_json(), True), (old, False)):
        with contextlib.ExitStack() as closing:
            reader = SimpleNamespace(assets={"data_spec": stored})
            if refused:
                with pytest.raises(UserError, match="by another encoder than those of this run's checkpoint"):
                    opening.open_data(config, reader, None, closing)  # type: ignore[arg-type]
            else:
                opening.open_data(config, reader, None, closing)  # type: ignore[arg-type]
    assert [value["text encoder"] for value in compared] == ["01" * 32] * 2, "of all processes"
