from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from uwm_jax.data import folder_lock
from uwm_jax.data.sidecar import find_sidecars, open_sidecar, state_of, writing_sidecar
from uwm_jax.errors import UserError

FIELDS = {"encoder": "ab" * 32, "resize": (240, 320), "variants": 1}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of which only the manifest exists: a sidecar reads no more of it."""
    return _dataset(tmp_path / "data", "toy")


def _dataset(path: Path, name: str) -> Path:
    path.mkdir()
    splits = {"train": {"episodes": 0, "steps": 0, "chunks": 0, "shards": [], "files": {}}}
    splits["train"] |= {"skipped": {}, "skipped_notes": []}
    manifest = {"format": "uwm_jax/chunks", "format_version": 2, "name": name, "chunk_steps": 8, "splits": splits}
    (path / "manifest.json").write_text(json.dumps(manifest | {"step_features": {}, "cameras": {}}))
    return path


def _write(dataset: Path, fields=FIELDS, overwrite: bool = False, values=(1.0, 2.0)):
    with writing_sidecar(dataset, "latents/vae/wrist", "latents", fields, "continue me", overwrite=overwrite) as out:
        if out.complete is None:
            (out.directory / "deep").mkdir(exist_ok=True)
            np.save(out.directory / "deep" / "a.npy", np.asarray(values, np.float16))
            (out.directory / "part-0").write_text("a working file of the job")
            sizes: list[int] = []
            out.finish(["deep/a.npy"], facts={"frames": 2}, progress=sizes.append)
            assert sizes == [(out.directory / "deep" / "a.npy").stat().st_size]
        return out


def test_a_sidecar_is_read_back_and_leaves_the_dataset_alone(dataset: Path) -> None:
    before = (dataset / "manifest.json").read_bytes()
    _write(dataset)
    sidecar = open_sidecar(dataset, "latents/vae/wrist", "latents", FIELDS)
    assert sidecar.fields == {**FIELDS, "resize": [240, 320]} and sidecar.facts == {"frames": 2}
    mapped = sidecar.array("deep/a.npy")
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, np.asarray([1, 2], np.float16))
    file = dataset / "latents/vae/wrist/deep/a.npy"
    assert sidecar.read("deep/a.npy") == file.read_bytes()
    assert sidecar.files["deep/a.npy"] == {
        "bytes": file.stat().st_size,
        "crc32c": google_crc32c.value(file.read_bytes()),
    }
    assert [s.digest for s in find_sidecars(dataset)] == [sidecar.digest]
    left = sorted(p.relative_to(dataset).as_posix() for p in dataset.rglob("*") if p.is_file())
    assert left == ["latents/vae/wrist/deep/a.npy", "latents/vae/wrist/sidecar.json", "manifest.json"]
    assert (dataset / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="no file 'b.npy'; it has deep/a.npy"):
        sidecar.path("b.npy")


def test_what_does_not_fit_is_refused_by_field(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no latents here.*python -m data_prep.latents --dataset="):
        open_sidecar(dataset, "latents/vae/wrist", "latents")
    _write(dataset)
    with pytest.raises(UserError) as e:
        open_sidecar(dataset, "latents/vae/wrist", "latents", {"encoder": "cd" * 32, "resize": (180, 320), "crop": 4})
    lines = str(e.value).splitlines()
    assert lines[1:4] == [
        f'  encoder: expected "{"cd" * 32}", found "{"ab" * 32}"',
        "  resize: expected [180, 320], found [240, 320]",
        "  crop: expected 4, found none",
    ]
    assert "--overwrite" in lines[4]
    with pytest.raises(UserError, match='kind: expected "text", found "latents"'):
        open_sidecar(dataset, "latents/vae/wrist", "text")
    with pytest.raises(UserError, match=r"no text here.*The dataset has: latents/vae/wrist"):
        open_sidecar(dataset, "text/clip", "text")
    with pytest.raises(UserError, match="cannot name a file inside the dataset"):
        open_sidecar(dataset, "../latents", "latents")
    other = _dataset(tmp_path / "other", "another")
    (dataset / "latents").rename(other / "latents")
    with pytest.raises(UserError, match="made from another dataset: expected fingerprint"):
        open_sidecar(other, "latents/vae/wrist", "latents")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=0), r"expected format .*, found \('uwm_jax/sidecar', 0\)"),
        (lambda m: m.update(kind="other"), "expected a kind of latents, ranges, text, found 'other'"),
        (lambda m: m.pop("fields"), "has been damaged or edited"),
        (lambda m: m["files"]["deep/a.npy"].pop("crc32c"), "deep/a.npy has no `bytes` and `crc32c`"),
        (lambda m: m["files"].update({"../a": {"bytes": 1, "crc32c": 1}}), "cannot name a file inside"),
        (lambda m: m["files"].update({"b": {"bytes": 1, "crc32c": 1}}), "b is missing, though sidecar.json"),
    ],
)
def test_a_damaged_manifest_is_named(dataset: Path, edit, message: str) -> None:
    _write(dataset)
    file = dataset / "latents/vae/wrist/sidecar.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        open_sidecar(dataset, "latents/vae/wrist", "latents")


def test_damaged_files_are_named(dataset: Path) -> None:
    _write(dataset)
    file = dataset / "latents/vae/wrist/deep/a.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    sidecar = open_sidecar(dataset, "latents/vae/wrist", "latents")
    for read in (lambda: sidecar.read("deep/a.npy"), lambda: sidecar.array("deep/a.npy"), sidecar.verify):
        with pytest.raises(UserError, match=r"deep/a\.npy: its checksum is not that of sidecar\.json"):
            read()
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"expected {len(data)} bytes, found {len(data) - 1}"):
        open_sidecar(dataset, "latents/vae/wrist", "latents")


def test_an_unfinished_sidecar_is_never_taken_for_a_complete_one(dataset: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with writing_sidecar(dataset, "latents/vae/wrist", "latents", FIELDS, "python -m this --again") as out:
            assert not out.continued
            (out.directory / "part-0").write_text("done")
            raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"is unfinished: .* Continue it with `python -m this --again`"):
        open_sidecar(dataset, "latents/vae/wrist", "latents")
    assert find_sidecars(dataset) == []
    with pytest.raises(UserError, match=r"is unfinished \(`python -m this --again` continues it\)[^$]*variants"):
        _write(dataset, {**FIELDS, "variants": 2})
    for killed_in_writing in (".unfinished.0a1b2c3d.tmp.json", ".sidecar.0a1b2c3d.tmp.json"):
        (dataset / "latents/vae/wrist" / killed_in_writing).write_text("{")
    with writing_sidecar(dataset, "latents/vae/wrist", "latents", FIELDS, "python -m this --again") as out:
        assert out.continued and (out.directory / "part-0").read_text() == "done"
    first = _write(dataset)
    assert sorted(path.name for path in (dataset / "latents/vae/wrist").iterdir()) == ["deep", "sidecar.json"]
    assert first.continued and first.complete is not None
    again = _write(dataset)
    assert again.complete is not None and again.complete.digest == first.complete.digest


def test_a_job_that_was_killed_before_its_first_file_was_written_is_begun_anew(dataset: Path) -> None:
    (folder := dataset / "latents/vae/wrist").mkdir(parents=True)
    (folder / ".lock").write_text("process 1")
    (folder / ".unfinished.0a1b2c3d.tmp.json").write_text("{")
    assert not _write(dataset).continued
    assert sorted(path.name for path in folder.iterdir()) == ["deep", "sidecar.json"]


def test_only_overwrite_replaces_a_sidecar_and_only_a_sidecar(dataset: Path) -> None:
    _write(dataset)
    with pytest.raises(
        UserError, match=r"is complete, but was made with other settings:\n  fields.variants: expected 2"
    ):
        _write(dataset, {**FIELDS, "variants": 2})
    _write(dataset, {**FIELDS, "variants": 2}, overwrite=True, values=(3.0,))
    sidecar = open_sidecar(dataset, "latents/vae/wrist", "latents", {"variants": 2})
    np.testing.assert_array_equal(sidecar.array("deep/a.npy"), [3])
    (dataset / "latents/vae/wrist/sidecar.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists and is no sidecar"):
            _write(dataset, overwrite=overwrite)
    assert (dataset / "latents/vae/wrist/deep/a.npy").exists()


def test_a_killed_overwrite_never_mixes_old_parts_with_new(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uwm_jax.data import sidecar as module

    _write(dataset)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_clear", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _write(dataset, {**FIELDS, "variants": 2}, overwrite=True)
    assert (dataset / "latents/vae/wrist/deep/a.npy").exists()  # of the old one
    with pytest.raises(UserError, match="is unfinished"):
        open_sidecar(dataset, "latents/vae/wrist", "latents")
    with writing_sidecar(dataset, "latents/vae/wrist", "latents", {**FIELDS, "variants": 2}, "go on") as out:
        assert not out.continued and not (out.directory / "deep").exists()


def test_the_same_command_continues_an_overwrite(dataset: Path) -> None:
    _write(dataset)
    changed = {**FIELDS, "variants": 2}
    for continued in (False, True):
        with writing_sidecar(dataset, "latents/vae/wrist", "latents", changed, "go on", overwrite=True) as out:
            assert out.continued is continued and (out.directory / "part-0").exists() is continued
            (out.directory / "part-0").write_text("done")
    # An unfinished one of other settings goes, and so does a complete one.
    with writing_sidecar(dataset, "latents/vae/wrist", "latents", FIELDS, "go on", overwrite=True) as out:
        assert not out.continued and not (out.directory / "part-0").exists()
    assert _write(dataset, overwrite=True, values=(3.0,)).continued
    assert not _write(dataset, overwrite=True, values=(4.0,)).continued


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
@pytest.mark.parametrize("name", ["sidecar.json", "unfinished.json"])
def test_overwrite_replaces_a_sidecar_whose_manifest_is_damaged(dataset: Path, name: str, content: str) -> None:
    _write(dataset)
    (folder := dataset / "latents/vae/wrist").joinpath("sidecar.json").rename(folder / name)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match="--overwrite"):
        _write(dataset)
    _write(dataset, overwrite=True, values=(5.0,))
    np.testing.assert_array_equal(open_sidecar(dataset, "latents/vae/wrist", "latents").array("deep/a.npy"), [5])


def test_a_sidecar_inside_another_is_refused(dataset: Path) -> None:
    _write(dataset)
    with pytest.raises(UserError, match="wrist/deep lies inside the sidecar .*latents/vae/wrist, which removes what"):
        with writing_sidecar(dataset, "latents/vae/wrist/deep", "latents", FIELDS, "go on"):
            pass
    with writing_sidecar(dataset, "latents/vae/top", "latents", FIELDS, "go on"):
        pass


def test_a_second_writer_is_refused_until_the_first_ends(dataset: Path) -> None:
    script = (
        "import sys; from uwm_jax.data.sidecar import writing_sidecar\n"
        f"with writing_sidecar(sys.argv[1], 'latents/vae/wrist', 'latents', {FIELDS!r}, 'go on'):\n"
        "    print('ready', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(dataset)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for overwrite in (False, True):
            with pytest.raises(UserError, match=rf"is being written by process {child.pid} on"):
                _write(dataset, overwrite=overwrite)
    finally:
        child.kill()
        child.wait()
    assert _write(dataset).continued


def test_shares_write_together_and_a_whole_job_alone(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.1)
    begin = functools.partial(writing_sidecar, dataset, "latents/vae/wrist", "latents", command="go on")
    _write(dataset, {**FIELDS, "variants": 2})
    with begin(fields=FIELDS, alone=False, overwrite=True) as first:
        assert not first.continued and not (first.directory / "deep").exists()
        (first.directory / "part-0").write_text("done")
        with begin(fields=FIELDS, alone=False, overwrite=True) as second:
            assert second.continued and (second.directory / "part-0").exists()
        for overwrite in (False, True):
            with pytest.raises(UserError, match="is being written by process"):
                _write(dataset, overwrite=overwrite)
        with pytest.raises(UserError, match="variants: expected 2, found 1"):
            begin(fields={**FIELDS, "variants": 2}, alone=False).__enter__()
        with pytest.raises(UserError, match="is being written by process"):
            begin(fields={**FIELDS, "variants": 2}, alone=False, overwrite=True).__enter__()
        assert (first.directory / "part-0").exists()
    with begin(fields=FIELDS):
        with pytest.raises(UserError, match="is being written by process"):
            begin(fields=FIELDS, alone=False).__enter__()
    _write(dataset)
    for overwrite in (False, True):
        with begin(fields=FIELDS, alone=False, overwrite=overwrite) as late:
            assert late.complete is not None
    assert state_of(dataset, "latents/vae/wrist", "latents", FIELDS) == "complete"
    assert sorted(path.name for path in (dataset / "latents/vae/wrist").iterdir()) == ["deep", "sidecar.json"]


def test_the_state_of_a_sidecar_is_that_of_its_own_settings(dataset: Path) -> None:
    def state(**changed: object) -> str:
        return state_of(dataset, "latents/vae/wrist", "latents", {**FIELDS, **changed})

    folder = dataset / "latents/vae/wrist"
    assert state() == ""
    with writing_sidecar(dataset, "latents/vae/wrist", "latents", FIELDS, "go on"):
        assert (state(), state(variants=2)) == ("begun", "")
    unfinished = json.loads((folder / "unfinished.json").read_text())
    _write(dataset)
    assert (state(), state(variants=2)) == ("complete", "")
    (folder / "unfinished.json").write_text(json.dumps(unfinished))  # of a job killed before it removed this
    assert state() == "complete"
    (folder / "unfinished.json").write_text(json.dumps({**unfinished, "clearing": True}))  # an overwrite begins
    assert state() == ""
    (folder / "unfinished.json").unlink()
    (folder / "sidecar.json").write_text("{")
    assert state() == ""
