from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import validate as command
from data_prep.checks import validation
from data_prep.checks.validation import ERROR, WARNING, Limits, validate
from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from uwm_jax import cli
from uwm_jax.data.records import column_file, text_file
from uwm_jax.data.sidecar import writing_sidecar
from uwm_jax.errors import UserError

LIMITS = Limits(min_steps=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    rlds_source.make(root / "source", [9, 5, 20])
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, workers=1, chunk_steps=4)
    return root / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    # Without its codec, which belongs to the columns as they were made.
    return shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("codec"))


def found(directory: Path, level: str, limits: Limits = LIMITS) -> list[str]:
    return [f"{f.where}: {f.text}" for f in validate(directory, limits, workers=1) if f.level == level]


def test_a_dataset_as_it_was_made_has_no_errors(made: Path) -> None:
    assert found(made, ERROR) == []
    assert found(made, WARNING) == [
        "train: action: 1 of 7 dimensions are constant ([6] = 0.5)",
    ]


def test_two_processes_find_the_same_as_one(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_BATCH", 1)
    rlds_source.write_column(copy, "counter", np.zeros(34, np.int64))
    limits = Limits(min_steps=6, decode=-1)
    alone = validate(copy, limits, workers=1)
    assert validate(copy, limits, workers=2) == alone
    assert sum("counter has other values" in finding.text for finding in alone) == 10


def test_short_episodes_are_named(made: Path) -> None:
    (short,) = [f for f in found(made, WARNING, Limits(min_steps=6)) if "shorter" in f]
    assert short == "train: shorter than 6 steps, so without a window of that span: 1 episode (1)"


def test_values_that_are_not_finite_are_errors_with_their_episode(copy: Path) -> None:
    column = np.load(copy / column_file("train", "action"))
    column[9 + 2, 3] = np.nan
    rlds_source.write_column(copy, "action", column)
    errors = found(copy, ERROR)
    assert errors[0] == "train: action: 1 of 34 steps are NaN or infinite, in 1 episode (1)"
    assert "(episode 1, steps from 0): action has other values than its column" in errors[1] and len(errors) == 2


def test_an_outlier_is_named_with_column_value_episode_and_step(copy: Path) -> None:
    key = "observation/state"
    column = np.load(copy / column_file("train", key))
    column[9 + 5 + 7, 2] = -1e4
    rlds_source.write_column(copy, key, column)
    # 34 steps are too few for a quantile to be untouched by one of them, so the limit is near.
    (outlier,) = [f for f in found(copy, WARNING, Limits(min_steps=4, bound=1.2)) if "dimension 2" in f]
    assert "-10000 in episode 2 at step 7, and 0 other values" in outlier


def test_outliers_of_all_dimensions_are_those_of_a_loop(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_BLOCK", 8)
    key = "observation/state"
    column = np.random.default_rng(0).normal(size=(34, 3)).astype(np.float32)
    column[20, 0] = -70
    column[33, 2] = 40
    column[5, 1] = np.nan
    rlds_source.write_column(copy, key, column)
    warnings = [f for f in found(copy, WARNING, Limits(min_steps=4, bound=1.2)) if key in f]
    finite = np.delete(column.astype(np.float64), 5, axis=0)
    low, high = np.quantile(finite.astype(np.float32), [0.01, 0.99], axis=0)
    starts = np.array([0, 9, 14])
    expected = []
    for i in range(3):
        far = np.abs(column[:, i] - (low[i] + high[i]) / 2) / ((high[i] - low[i]) / 2)
        if np.nanmax(far) > 1.2:
            row = int(np.nanargmax(far))
            episode = np.searchsorted(starts, row, side="right") - 1
            others = int((far > 1.2).sum()) - 1
            expected.append(
                f"{column[row, i]:g} in episode {episode} at step {row - starts[episode]}, and {others} other values"
            )
    assert [warning.partition("): ")[2] for warning in warnings] == expected and len(expected) >= 2


def test_rewards_and_discounts_of_one_value_are_no_warning(copy: Path) -> None:
    rlds_source.write_column(copy, "reward", np.zeros(34, np.float32))
    assert not any("reward" in warning for warning in found(copy, WARNING))


def test_a_flipped_byte_of_a_shard_is_found_whichever_record_it_hits(copy: Path) -> None:
    shard = sorted(copy.glob("*.array_record*"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    errors = found(copy, ERROR)
    assert errors and all(shard.name in error for error in errors)


def test_a_missing_shard_is_an_error_of_its_split(copy: Path) -> None:
    shard = sorted(copy.glob("*.array_record*"))[1]
    shard.unlink()
    assert any(f"{shard.name}" in error for error in found(copy, ERROR))


def test_each_missing_shard_is_named_and_the_rest_is_checked(copy: Path) -> None:
    shards = sorted(copy.glob("*.array_record*"))
    column = np.load(copy / column_file("train", "counter"))
    column[0] += 1  # of the first record, which is in the first shard
    rlds_source.write_column(copy, "counter", column)
    shards[1].unlink()
    errors = found(copy, ERROR)
    assert len(shards) == 2 and len(errors) == 2, errors
    assert errors[0].startswith(f"train: {shards[1]} is missing") and "Its 5 records were not checked" in errors[0]
    assert shards[0].name in errors[1] and "counter has other values than its column" in errors[1]
    shards[0].unlink()
    shards[0].mkdir()
    assert [error for error in found(copy, ERROR) if f"{shards[0]} is a directory, not a file" in error]


def test_a_damaged_codec_is_an_error(copy: Path, made: Path) -> None:
    assert found(copy, ERROR) == [], "a dataset need not have one"
    file = copy / "codec" / "pca.npz"
    file.parent.mkdir()
    file.write_bytes((made / "codec" / "pca.npz").read_bytes()[:-100])
    (error,) = found(copy, ERROR)
    assert error.startswith(f"codec/pca.npz: {file} cannot be read")


def test_damaged_columns_and_strings_are_listed_with_all_else(copy: Path) -> None:
    (copy / column_file("train", "is_last")).unlink()
    column = copy / column_file("train", "observation/state")
    column.write_bytes(column.read_bytes()[:-8])
    (copy / text_file("train")).write_bytes(b"PK")
    errors = found(copy, ERROR)
    assert len(errors) == 3 and "is_last.npy: the column cannot be read" in errors[0]
    assert errors[1].startswith("train: observation/state: ") and "its checksum" in errors[1]
    assert text_file("train") in errors[2] and "its checksum" in errors[2]
    assert found(copy, WARNING) == ["train: action: 1 of 7 dimensions are constant ([6] = 0.5)"]


def test_two_json_files_that_disagree(copy: Path) -> None:
    file = copy / "features.json"
    file.write_text(file.read_text().replace('"counter"', '"counted"'))
    errors = found(copy, ERROR)
    assert "counted: a step key of features.json that manifest.json does not have" in errors
    assert "counter: a step key of manifest.json that features.json does not have" in errors


def test_types_that_differ_from_what_is_declared(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["step_features"]["counter"]["dtype"] = "float32"
    manifest["step_features"]["embedding"] |= {"image": True}
    manifest["step_features"]["reward"]["shape"] = [1]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"][0] = "7"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    errors = found(copy, ERROR)
    assert "train: dataset_info.json lists other shards or numbers of records than manifest.json" in errors
    assert "train: counter: float32 by manifest.json, but its column holds int64" in errors
    assert "counter: int64 of shape [] by features.json, float32 of shape [] by manifest.json" in errors
    assert "reward: float32 of shape [] by features.json, float32 of shape [1] by manifest.json" in errors
    assert "embedding: an image by manifest.json, but not by features.json" in errors


def test_a_damaged_index_is_told_with_what_was_not_checked(copy: Path) -> None:
    (copy / "index" / "train.npz").write_bytes(b"PK")
    (error,) = found(copy, ERROR)
    assert "index/train.npz" in error and error.endswith("Nothing else of this split was checked.")
    (copy / "features.json").write_text("{")
    assert any("features.json" in e and e.endswith("No record was checked.") for e in found(copy, ERROR))


def test_every_damaged_sidecar_is_named(copy: Path) -> None:
    for name in ("a", "b", "c"):
        with writing_sidecar(copy, f"latents/{name}/wrist", "latents", {"k": 1}, "continue", overwrite=False) as out:
            (out.directory / "x.npy").write_bytes(b"0123")
            out.finish(["x.npy"])
    assert found(copy, ERROR) == []
    (copy / "latents/a/wrist/x.npy").write_bytes(b"012")
    (copy / "latents/b/wrist/x.npy").write_bytes(b"0124")
    (copy / "latents/c/wrist/sidecar.json").write_text("{")
    errors = found(copy, ERROR)
    assert len(errors) == 3
    for name in ("a", "b", "c"):
        assert any(error.startswith(f"latents/{name}/wrist: ") for error in errors), name


def test_black_cameras_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = rlds_source.encode

    def dark(rng, height, width, encoding, number, t):  # the wrist (PNG) of episode 1, and all exterior frames
        black = encoding == "jpeg" or number == 1
        scale = np.random.default_rng(0) if black else rng
        image = encode(scale, height, width, encoding, number, t)
        if not black:
            return image
        out = io.BytesIO()
        Image.new("RGB", (width, height)).save(out, encoding)
        return out.getvalue()

    monkeypatch.setattr(rlds_source, "encode", dark)
    rlds_source.make(tmp_path / "source", [5, 6, 7])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    warnings = found(tmp_path / "out", WARNING)
    assert "train: observation/exterior: black in every decoded frame of all 3 episodes: a placeholder?" in warnings
    assert "train: observation/wrist: black in every decoded frame of 1 episode (1)" in warnings


def test_an_image_that_cannot_be_decoded_behind_a_whole_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = rlds_source.encode

    def cut(rng, height, width, encoding, number, t):
        image = encode(rng, height, width, encoding, number, t)
        return image[: len(image) // 2] if (encoding, number, t) == ("png", 1, 3) else image

    monkeypatch.setattr(rlds_source, "encode", cut)
    rlds_source.make(tmp_path / "source", [5, 6])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    assert found(tmp_path / "out", ERROR, Limits(min_steps=1, decode=1)) == []
    (error,) = found(tmp_path / "out", ERROR, Limits(min_steps=1, decode=-1))
    assert "(episode 1, steps from 0): observation/wrist at step 3 of the record cannot be decoded" in error


def test_a_mark_inside_of_an_episode(copy: Path) -> None:
    column = np.load(copy / column_file("train", "is_first"))
    column[[3, 9]] = 1
    rlds_source.write_column(copy, "is_first", column)
    assert "train: is_first: true at 1 steps inside of episodes, in 1 episode (0)" in found(copy, WARNING)


def test_a_split_that_is_named_twice_is_checked_once(made: Path) -> None:
    assert validate(made, LIMITS, ["train", "train"], workers=1) == validate(made, LIMITS, workers=1)


def test_an_unknown_split_is_refused(made: Path) -> None:
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        validate(made, LIMITS, ["test"])


def test_the_index_is_compared_with_the_records(copy: Path) -> None:
    # The first two records exchanged: every checksum of the index fits, and the order does not.
    index = copy / "index" / "train.npz"
    with np.load(index) as stored:
        arrays = {name: stored[name] for name in stored}
    rlds_source.write_index(
        copy,
        chunk_record=arrays["chunk_record"][[1, 0]].tolist(),
        chunk_crc32c=arrays["chunk_crc32c"][[1, 0]].tolist(),
    )
    errors = found(copy, ERROR)
    assert any("expected 4 steps from 0 of 9 by the index, found 4 steps from 4 of 9" in error for error in errors)


def test_the_command_ends_with_2_for_errors_and_under_strict(
    made: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        return cli.call(command.main, ["validate", "--workers=1", "--min_steps=4", *arguments], command.define_flags)

    assert run(f"--dataset={made}") == 0
    assert run(f"--dataset={made}", "--bound=nan") == 2
    assert "--bound=nan: expected a number" in capsys.readouterr().err
    assert run(f"--dataset={made}", "--strict") == 2
    assert "warnings, which --strict does not allow" in capsys.readouterr().err
    column = np.load(copy / column_file("train", "action"))
    column[0, 0] = np.inf
    rlds_source.write_column(copy, "action", column)
    assert run(f"--dataset={copy}", f"--json={tmp_path / 'found.json'}") == 2
    assert "has errors" in capsys.readouterr().err
    listed = json.loads((tmp_path / "found.json").read_text())
    assert {"level": "error", "where": "train: action"}.items() <= listed[0].items()
