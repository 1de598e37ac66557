"""`data_prep.latents`: what it stores, how it continues, what it refuses; mostly with `pixels`, which compiles fast."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import latents as command
from data_prep.caches.latents.caching import Options, make
from tests import quick_compile
from tests.data_prep.killing import Commands, kill_and_resume, tree
from tests.training import cached_case
from uwm_jax import cli
from uwm_jax.data.latents import LatentCache, numbers_of
from uwm_jax.data.records import Dataset
from uwm_jax.errors import RunError, UserError

WRIST, EXTERIOR = "observation/wrist", "observation/exterior"


@pytest.fixture
def dataset(tiny_dataset, tmp_path) -> Path:
    return shutil.copytree(tiny_dataset, tmp_path / "data")


def config_of(dataset: Path, crops: bool = True, **fields):
    """A run whose only augmentation is the crop, with pixels for latents; wrist frames need no resizing."""
    config = cached_case.config_of("uwm", dataset, Path("unused"), augmented=False)
    config.data.cameras, config.model.codec.name = ("wrist",), "pixels"
    config.data.resize, config.data.crop, config.data.augment.random_crop = (16, 16), (8, 8), crops
    config.model.patch, config.model.codec.microbatch = (2, 4, 4), 9
    config.update(fields)
    return config


def quietly(config, options=None, **more):
    return make(config, options or Options(), command="again", say=lambda line: None, **more)


def test_latents_are_those_of_each_episodes_own_crop(dataset):
    config = config_of(dataset)
    (cache,) = quietly(config, Options(variants=3, seed=4, dtype="float32", steps_per_part=30))
    assert cache.directory == dataset / "latents/pixels/wrist/train" and len(cache.files) > 2
    assert cache.facts == {"episodes": 6, "steps": 116}
    opened = Dataset(dataset)
    reader, into = LatentCache(opened, "pixels", WRIST), np.empty((1, 8, 8, 3), np.float32)
    frame, corners = np.empty((1, 16, 16, 3), np.uint8), set()
    for episode, length in enumerate(opened.episode_lengths):
        for variant in range(3):
            top, left = (int(u * 9) for u in numbers_of(4, episode, WRIST, variant)[:2])
            corners.add((top, left))
            for step in (0, int(length) // 2, int(length) - 1):
                opened.frames(episode, {WRIST: [step]}, {WRIST: frame})
                reader.read(episode, [step], variant, into)
                expected = frame[0, top : top + 8, left : left + 8] / np.float32(255) * 2 - 1
                np.testing.assert_allclose(into[0], expected, atol=1e-6)
    assert len(corners) > 10
    reader.read_black(into)
    np.testing.assert_array_equal(into, -1.0)


def test_a_finished_cache_is_left_alone_and_another_one_is_refused_by_field(dataset, capsys):
    config = config_of(dataset)
    quietly(config, Options(variants=2))
    before = tree(dataset)
    make(config, Options(variants=2), command="again")
    assert "1 caches are complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"latents/pixels/wrist/train.*\n  variants: expected 3, found 2"):
        quietly(config, Options(variants=3))
    assert tree(dataset) == before
    quietly(config, Options(variants=3), overwrite=True)
    assert LatentCache(Dataset(dataset), "pixels", WRIST).variants == 3
    config.data.cameras = ("wrist", "exterior")  # a new camera joins those that are there
    config.data.resize = (16, 16)
    assert len(quietly(config, Options(variants=3))) == 2


def test_shares_of_two_sources_make_what_one_process_makes(dataset, tmp_path):
    other = shutil.copytree(dataset, tmp_path / "other")
    config = config_of(dataset)
    config.data.path, source = "", cached_case.config_lib.source
    config.data.sources = {name: source(path=str(path)) for name, path in (("a", dataset), ("b", other))}
    options = Options(variants=2, steps_per_part=60)  # two parts of each
    expected = [tree(cache.directory) for cache in quietly(config, options)]
    shutil.rmtree(dataset / "latents"), shutil.rmtree(other / "latents")
    with pytest.raises(UserError, match=r"--assemble: 4 of 4 parts are not done: a part-00000.latents, .*0, 1, 2, 3\."):
        quietly(config, dataclasses.replace(options, assemble=True))
    assert not (dataset / "latents").exists()
    quietly(config, dataclasses.replace(options, task=(4, 5)))  # there is no fifth part
    assert not (dataset / "latents").exists()
    said = []
    for share, left in ((2, 3), (0, 1), (0, 1)):
        one = dataclasses.replace(options, task=(share, 3))
        assert make(config, one, command="again", say=said.append) == []
        assert said[-1].startswith(f"share {share} of 3 is done") and f"{left} of 4 parts are left" in said[-1]
    with pytest.raises(UserError, match=r"1 of 4 parts are not done: a part-00001.latents.* numbers 1\."):
        quietly(config, dataclasses.replace(options, assemble=True))
    quietly(config, dataclasses.replace(options, task=(1, 3)))
    with pytest.raises(
        UserError, match=r"unfinished .*other settings:\n  fields.steps_per_part: expected 30, found 60"
    ):
        quietly(config, dataclasses.replace(options, assemble=True, steps_per_part=30))
    part = dataset / "latents/pixels/wrist/train/part-00001.latents"
    part.write_bytes((data := part.read_bytes())[:-1])
    with pytest.raises(UserError, match=rf"part-00001.latents: expected {len(data)} bytes, found {len(data) - 1}"):
        quietly(config, dataclasses.replace(options, assemble=True))
    part.write_bytes(data)
    made = quietly(config, dataclasses.replace(options, assemble=True))
    assert [tree(cache.directory) for cache in made] == expected
    assert quietly(config, dataclasses.replace(options, assemble=True)) == made
    for wrong in ({"estimate": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"leave --{next(iter(wrong))} out"):
            quietly(config, dataclasses.replace(options, assemble=True), **wrong)


def test_a_share_that_overwrites_keeps_what_the_shares_have_made(dataset, tmp_path):
    other = shutil.copytree(dataset, tmp_path / "other")
    config = config_of(dataset)
    config.data.path, source = "", cached_case.config_lib.source
    config.data.sources = {name: source(path=str(path)) for name, path in (("a", dataset), ("b", other))}
    options = Options(steps_per_part=60)  # two parts of each
    first, second = (cache.directory for cache in quietly(config, options))
    (second / "sidecar.json").rename(second / "unfinished.json")  # one of the old caches was not even finished
    options, said = dataclasses.replace(options, variants=2), []

    def share(i: int) -> None:
        one = dataclasses.replace(options, task=(i, 4))
        make(config, one, command="again", overwrite=True, say=said.append)

    for i, left in enumerate(("3 of 4 parts are left", "2 of 4 parts", "1 of 4 parts", "all parts are done")):
        share(i)
        assert left in said[-1], said
    made = quietly(config, dataclasses.replace(options, assemble=True))
    before = tree(first), tree(second)
    share(0)
    assert said[-1] == "2 caches are complete already; without --task, --overwrite makes them anew"
    assert (tree(first), tree(second)) == before
    (first / "part-00001.latents").unlink()
    share(0)  # of a damaged one nothing is kept
    assert "1 of 2 parts are left" in said[-1], said
    share(1)
    assert quietly(config, dataclasses.replace(options, assemble=True)) == [made[1], made[0]]
    assert (tree(first), tree(second)) == before
    quietly(config, options, overwrite=True)
    assert (tree(first), tree(second)) == before


def test_an_estimate_writes_nothing(dataset, capsys):
    assert make(config_of(dataset), Options(), command="again", estimate=True) == []
    out = capsys.readouterr().out
    assert "computed" in out and "116 frames" in out and "whether it pays" in out
    assert not (dataset / "latents").exists()


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (Options(variants=2), {"crops": False}, "--variants=2: config.data.augment changes nothing"),
        (Options(moments=True), {}, "--moments: latents of the pixels codec have no distribution"),
        (Options(), {"draw": "batch"}, "requires config.data.augment.draw='sample', found 'batch'"),
    ],
)
def test_options_that_do_not_fit_are_refused(dataset, options, fields, message):
    config = config_of(dataset, crops=fields.get("crops", True))
    config.data.augment.draw = fields.get("draw", "sample")
    with pytest.raises(UserError, match=message):
        quietly(config, options)
    assert not (dataset / "latents").exists()


def test_a_cache_of_modes_is_refused_for_a_run_that_samples(dataset, tmp_path):
    config = config_of(dataset)
    config.model.codec.name, config.model.codec.vae = "vae", str(cached_case.write_vae(tmp_path / "vae"))
    config.model.codec.posterior = "sample"
    with pytest.raises(UserError, match=r"posterior='sample' needs .*that --moments stores.* set it to 'mode'"):
        quietly(config)
    assert not (dataset / "latents").exists()


def test_a_system_without_latents_is_refused(dataset):
    config = cached_case.small_config("dp")
    config.data.path = str(dataset)
    with pytest.raises(UserError, match="config.system='dp' reads no latents"):
        quietly(config)
    config.data.latents = "vae"
    with pytest.raises(UserError, match=r"config.data.latents='vae': config.system='dp' reads no latents"):
        cached_case.config_lib.validate(config)


def test_only_the_episodes_that_are_used_are_encoded_where_that_is_asked_for(dataset):
    config = config_of(dataset)
    config.data.sources = {"robot": cached_case.config_lib.source(max_episodes=4)}
    (cache,) = quietly(config, Options(episodes="used"))
    assert cache.facts["episodes"] == 4 and "episodes.npy" in cache.files
    config.data.latents = "pixels"
    cached_case.batches(config, 1)
    config.data.sources = {"robot": cached_case.config_lib.source()}
    with pytest.raises(UserError, match="lacks 2 of the 6 episodes"):
        cached_case.batches(config, 1)


def test_latents_that_a_dtype_cannot_hold_end_the_job(dataset, monkeypatch):
    from uwm_jax.codecs import PixelsCodec

    encode = PixelsCodec.encode
    monkeypatch.setattr(PixelsCodec, "encode", lambda *args: encode(*args) * 1e5)
    with pytest.raises(RunError, match=r"not finite in float16.*--dtype=float32"):
        quietly(config_of(dataset))
    with pytest.raises(UserError, match="unfinished"):
        LatentCache(Dataset(dataset), "pixels", WRIST)


@pytest.mark.slow
def test_a_killed_job_continues_and_ends_as_an_uninterrupted_one_on_two_devices(dataset, tmp_path, monkeypatch):
    """Also: the devices at hand share the rows, and that changes no byte."""
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.data_prep.caches.latents.test_caching import config_of\n"
        f"def get_config():\n    return config_of(Path({str(dataset)!r}))\n"
    )
    shutil.copytree(dataset, tmp_path / "whole")
    config = config_of(tmp_path / "whole")
    quietly(config, Options(variants=2, steps_per_part=20))

    monkeypatch.setenv("XLA_FLAGS", quick_compile.with_devices(2))
    folder = dataset / "latents/pixels/wrist/train"
    line = ["data_prep.latents", f"--config={file}", "--variants=2", "--steps_per_part=20"]
    with contextlib.closing(Commands("data_prep.latents")) as commands:
        _kill_and_resume(commands, line, folder)
        expected = tree(tmp_path / "whole/latents/pixels/wrist/train")
        assert tree(folder) == expected
        shutil.rmtree(folder)
        _share_and_kill(commands, line, folder)
    assert tree(folder) == expected


def _parts(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("part-*.latents"))


def _kill_and_resume(commands: Commands, line: list[str], folder: Path) -> None:
    moments = [(folder / "unfinished.json").exists, *(lambda n=n: len(_parts(folder)) >= n for n in (2, 4))]
    outputs = kill_and_resume(commands, line, moments, (folder / "sidecar.json").exists)
    assert "parts are done already" in outputs[-1]


def _share_and_kill(commands: Commands, line: list[str], folder: Path) -> None:
    """Two shares at once, of which the second is killed before it has done part 3, and done again."""
    first = commands.start([*line, "--task=0/2"])
    assert first.until((folder / "unfinished.json").exists) is None, first.output
    with (folder / "part-00003.latents.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = commands.start([*line, "--task=1/2"])
        assert second.until((folder / "part-00001.latents").exists) is None, second.output
        second.kill()
    assert first.wait() == 0 and "of each of 2 shares" in first.output, first.output
    status, printed = commands.run([*line, "--assemble"])
    assert status == 2 and "part-00003.latents" in printed and "these have the numbers 3" in printed, printed
    (left := folder / ".part-00003.00ff00ff.tmp.latents").touch()  # as a killed process leaves it
    status, printed = commands.run([*line, "--task=1/2"])
    assert status == 0 and "share 1 of 2 is done" in printed and "all parts are done" in printed, printed
    assert not left.exists() and not (folder / "sidecar.json").exists()
    status, printed = commands.run([*line, "--assemble"])
    assert status == 0, printed


def test_the_command_reads_its_flags(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "make", lambda config, options, **more: calls.append((config, options, more)) or [])
    line = ["latents", "--config=configs/droid.py", "--config.data.path=here", "--variants=4", "--seed=7", "--moments"]
    line += ["--dtype=float32", "--episodes=used", "--steps_per_part=9", "--overwrite", "--task", "1/3"]
    assert cli.call(command.main, line, command.define_flags) == 0
    ((config, options, more),) = calls
    expected = Options(variants=4, seed=7, moments=True, dtype="float32", episodes="used", steps_per_part=9)
    assert options == dataclasses.replace(expected, task=(1, 3))
    assert config.data.path == "here" and more["overwrite"] and not more["estimate"]
    assert "--variants=4" in more["command"] and not {"--overwrite", "--task", "1/3"} & set(more["command"].split())
