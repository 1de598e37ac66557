"""Tables of embeddings, compared with transformers' own output of every string."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import text as text_command
from data_prep.caches import embedding, instructions
from data_prep.caches.embedding import make_table, summary
from tests import clip
from tests.data_prep import language_source
from tests.data_prep.language_source import FIRST, SECOND, TASKS, strings
from uwm_jax import cli
from uwm_jax.data.records import Dataset
from uwm_jax.data.text_table import EMPTY, TextTable
from uwm_jax.errors import RunError, UserError

pytestmark = pytest.mark.torch

KEYS = ["episode_metadata/language_task", "language_instruction", "language_instruction_2"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return clip.make(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoder: Path) -> Path:
    """A dataset with the table `clip` of all its language."""
    dataset = language_source.make(tmp_path_factory.mktemp("language"))
    make_table(dataset, "clip", str(encoder), batch_size=3, command="go on")
    return dataset


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    """The same without a table."""
    return Path(shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("text")))


def _reference(encoder: Path, text: str) -> np.ndarray:
    """The embedding of one string by transformers: the projection of the state at the end-of-text token, which it
    finds in the tokens of that string alone."""
    import torch
    import transformers

    model = transformers.CLIPTextModelWithProjection.from_pretrained(encoder)
    tokens = transformers.CLIPTokenizerFast.from_pretrained(encoder)(text, truncation=True, max_length=clip.LONGEST)
    ids = torch.tensor([tokens["input_ids"]])
    assert int(ids[0, -1]) == model.config.eos_token_id
    with torch.inference_mode():
        states = model.text_model(input_ids=ids).last_hidden_state
        return (states[0, -1] @ model.text_projection.weight.T).numpy()


def test_every_step_has_the_embedding_of_its_string(made: Path, encoder: Path) -> None:
    expected = {
        "language_instruction": [strings(runs) for runs in FIRST],
        "language_instruction_2": [strings(runs) for runs in SECOND],
        "language_task": [[task] * len(strings(runs)) for task, runs in zip(TASKS, FIRST, strict=True)],
    }
    known: dict[str, np.ndarray] = {}
    for split, episodes in (("train", [0, 1, 2, 3]), ("val", [3])):
        opened = Dataset(made, split)
        table = TextTable(opened, "clip")
        assert table.width == clip.WIDTH and table.encoder.name == str(encoder)
        for name, of_episodes in expected.items():
            key = table.key(name)
            for number, episode in enumerate(episodes):
                for step, text in enumerate(of_episodes[episode]):
                    text = text.strip()
                    if text not in known:
                        known[text] = _reference(encoder, text)
                    row = table.row(key, number, step)
                    assert (row == EMPTY) == (text == "")
                    np.testing.assert_allclose(table.embedding(row), known[text], atol=1e-5, rtol=0)
    norms = [np.linalg.norm(value) for value in known.values()]
    assert max(norms) > 1.2 * min(norms), "embeddings are not L2-normalised"
    assert len(known) == 7


def test_what_was_found_is_counted(made: Path) -> None:
    table = embedding.open_sidecar(made, "text/clip", "text", {"keys": KEYS})
    assert table.facts["texts"] == 7 and table.facts["cut_off"] == 1
    assert table.facts["splits"]["train"] == {
        "language_instruction": dict(steps=44, empty_steps=10, episodes=4, empty_episodes=1, changing_episodes=1),
        "language_instruction_2": dict(steps=44, empty_steps=15, episodes=4, empty_episodes=1, changing_episodes=1),
        "episode_metadata/language_task": dict(
            steps=44, empty_steps=14, episodes=4, empty_episodes=1, changing_episodes=0
        ),
    }
    text = summary(table)
    assert "7 distinct strings, 8 numbers each" in text and "1 of them have more tokens than the encoder reads" in text
    assert "train, language_instruction: 4 episodes; empty in 1; 1 change it; 10 of 44 steps are empty" in text
    with np.load(made / "index" / "train.npz") as index:
        assert len(index["chunk_shard"]) > 8  # so that runs go on from record to record


def test_a_job_that_was_interrupted_anywhere_ends_with_the_same_bytes(
    made: Path, dataset: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "_TASK_RECORDS", 3)
    read, embedded = [], []
    find, embed = instructions._find, embedding.clip_text.ClipText.embed

    def finding(task, bar=None):
        find(task, bar)
        read.append(task.file.name)
        if len(read) == 2:
            raise KeyboardInterrupt

    def embedding_(self, texts):
        embedded.append(list(texts))
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return embed(self, texts)

    monkeypatch.setattr(instructions, "_find", finding)
    monkeypatch.setattr(embedding.clip_text.ClipText, "embed", embedding_)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make_table(dataset, "clip", str(encoder), batch_size=3, command="go on")
        with pytest.raises(UserError, match="unfinished: .*Continue it with `go on`"):
            TextTable(Dataset(dataset), "clip")
    _, was_complete = make_table(dataset, "clip", str(encoder), batch_size=3, command="go on")
    assert not was_complete
    assert len(read) == len(set(read)) == 5, "no task is done twice"
    assert [len(texts) for texts in embedded] == [3, 3, 3, 1] and embedded[1] == embedded[2]
    files = {path.relative_to(made / "text") for path in (made / "text").rglob("*")}
    assert files == {path.relative_to(dataset / "text") for path in (dataset / "text").rglob("*")}
    for name in files:
        if (made / "text" / name).is_file():
            assert (made / "text" / name).read_bytes() == (dataset / "text" / name).read_bytes(), name
    assert make_table(dataset, "clip", str(encoder), command="go on")[1]


class Interrupted:
    """An encoder that cuts off all texts, and is interrupted in its second batch and its third one."""

    width, batches = 2, 0

    def embed(self, texts):
        self.batches += 1
        if self.batches in (2, 3):
            raise KeyboardInterrupt
        return np.asarray([[len(text)] * self.width for text in texts], np.float32)

    def too_long(self, texts):
        assert len(texts) <= 2, "all texts at once would take memory"
        return len(texts)


def test_texts_that_are_cut_off_are_counted_over_interruptions(tmp_path: Path) -> None:
    encoder, texts = Interrupted(), ["a" * n for n in range(5)]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            embedding._embed(tmp_path, texts, encoder, 2)
    assert embedding._embed(tmp_path, texts, encoder, 2) == 5 and encoder.batches == 5
    assert np.load(tmp_path / "embeddings.npy")[:, 1].tolist() == [0, 1, 2, 3, 4]


def test_workers_and_tasks_change_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "_TASK_RECORDS", 1)
    opened = Dataset(made)
    for number, workers in enumerate((1, 2)):
        (folder := tmp_path / str(number)).mkdir()
        found = instructions.find(opened, KEYS, folder, workers)
        rows = found["language_instruction"]
        assert [rows.texts[row] for row in rows.row] == ["push a block", "pick it", "push it", "", "push a block"]
        assert rows.first.tolist() == [0, 11, 16, 25, 35]


def test_keys_that_hold_no_strings_are_refused(made: Path) -> None:
    opened = Dataset(made)
    assert instructions.chosen_keys(opened, []) == KEYS
    assert instructions.chosen_keys(opened, ["note", "language_task"]) == ["episode_metadata/language_task", "note"]
    with pytest.raises(UserError, match=r"no key 'action' of strings; it has: language_instruction, .*file_path"):
        instructions.chosen_keys(opened, ["action"])


def test_other_settings_need_overwrite(made: Path, dataset: Path, encoder: Path, tmp_path: Path) -> None:
    other = clip.make(tmp_path / "other", seed=1)
    make_table(dataset, "clip", str(encoder), keys=["language_task"], command="go on")
    with pytest.raises(UserError, match=r'fields.encoder: expected "[0-9a-f]{64}", found'):
        make_table(dataset, "clip", str(other), keys=["language_task"], command="go on")
    with pytest.raises(UserError, match=r"has no key 'language_instruction'; it has episode_metadata/language_task"):
        TextTable(Dataset(dataset), "clip").key("language_instruction")
    table, _ = make_table(dataset, "clip", str(other), keys=["note"], command="go on", overwrite=True)
    assert table.fields["keys"] == ["note"] and table.facts["texts"] == 5


def test_an_embedding_that_is_not_finite_ends_the_job(
    dataset: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = embedding.clip_text.ClipText.embed
    broken = lambda self, texts: embed(self, texts) / np.asarray([[text != "pick"] for text in texts])  # noqa: E731
    monkeypatch.setattr(embedding.clip_text.ClipText, "embed", broken)
    with np.errstate(divide="ignore"), pytest.raises(RunError, match="the embedding of 'pick' is not finite"):
        make_table(dataset, "clip", str(encoder), command="go on")


def test_a_sentence_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--encoder=any", "--embed=caf\udce9", f"--output={tmp_path / 'a.npy'}"]
    assert cli.call(text_command.main, ["data_prep.text", *flags], text_command.define_flags) == 2
    assert r"--embed: 'caf\udce9' is not UTF-8" in capsys.readouterr().err


def test_one_sentence_is_embedded_by_the_tables_encoder(made: Path, encoder: Path, tmp_path: Path) -> None:
    name, sha256 = embedding.encoder_of(made, "clip")
    assert name == str(encoder) and json.loads((made / "text/clip/sidecar.json").read_text())["fields"]["encoder"] == (
        sha256
    )
    embedding.write_embedding("push it", tmp_path / "a.npy", name, sha256)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), _reference(encoder, "push it"), atol=1e-5, rtol=0)
    other = clip.make(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"expected the text encoder of sha256 {sha256}, found"):
        embedding.write_embedding("push it", tmp_path / "b.npy", str(other), sha256)
    assert not (tmp_path / "b.npy").exists()
