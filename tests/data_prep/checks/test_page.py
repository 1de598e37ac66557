from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import inspect
from data_prep.checks import page
from data_prep.checks.page import mixture
from data_prep.checks.trace import traced
from tests.data import rlds_source
from tests.data.loader_case import config, made, take  # noqa: F401
from tests.data.test_faults import damage, positions_of
from uwm_jax import cli
from uwm_jax import config as config_lib
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError


def test_the_page_is_one_file_that_opens_offline(made, tmp_path: Path) -> None:  # noqa: F811
    inspect.inspect(Dataset(made[0]), tmp_path / "pictures", 2, 3)
    page = (tmp_path / "pictures" / inspect.PAGE).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", page) and page.count("data:image/png;base64,") == 4
    assert "<script" not in page
    for text in ("What stands out", "do thing 0", "203 steps", "6 of 6 episodes", "Discontinuities".lower()):
        assert text in page, text


def test_text_of_the_data_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.conversion.training_layout import reshard

    make = rlds_source._episode

    def unsafe(rng, number, length):
        episode = make(rng, number, length)
        for step in episode["steps"]:
            step["language_instruction"] = "<script>x</script>" if number else ""
        return episode

    monkeypatch.setattr(rlds_source, "_episode", unsafe)
    rlds_source.make(tmp_path / "source", [4, 5, 6])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    inspect.inspect(Dataset(tmp_path / "out"), tmp_path / "pictures", 1, 2)
    page = (tmp_path / "pictures" / inspect.PAGE).read_text()
    assert "2 × &lt;script&gt;x&lt;/script&gt;" in page and "<script" not in page
    assert "66.7%" in page  # one of three has no text


def two_sources(config):  # noqa: F811
    config.text = ""
    config.sources.robot = config_lib.source(weight=3.0)
    config.sources.video = config_lib.source(weight=1.0, use_actions=False)
    return config


def test_the_mixture_says_how_often_a_window_is_seen(config) -> None:  # noqa: F811
    data = RunData(two_sources(config), seed=0)
    robot, video = mixture(data, 1000)
    windows = len(data.sources["robot"].windows)
    assert (robot["share"], video["share"]) == (0.75, 0.25)
    assert robot["passes"] == pytest.approx(750 / windows) and robot["windows"] == windows
    assert (robot["use"], video["use"]) == ("actions and frames", "frames alone")


def test_a_traced_row_is_the_one_that_training_saw_under_each_of_its_weights(config) -> None:  # noqa: F811
    data = RunData(two_sources(config), seed=5)
    before = Loader(data, batch_size=8)
    seen = take(before, 3)
    config.sources.robot.weight = 0.5
    data = RunData(config, seed=5)
    after = Loader(data, batch_size=8, start_step=3, state=before.state(3))
    seen += take(after, 3)
    state = after.state(6)
    assert len(state["weights"]) == 2
    data = RunData(config, seed=5)
    for step in range(1, 7):
        for row in (0, 3, 7):
            found = traced(data, 8, state, 6, step, row)
            assert found.known
            for key, value in found.batch.items():
                expected = np.asarray(row, np.int32) if key == "row" else seen[step - 1][key][row]
                assert value[0].tobytes() == expected.tobytes(), (step, row, key)
    # With the weights of the config alone, the first steps are others.
    plain = [traced(data, 8, None, 0, step, row) for step in (1, 2, 3) for row in range(8)]
    told = [Loader(data, batch_size=8, start_step=6, state=state).describe(i) for i in range(24)]
    assert [row.place for row in plain] != told and not plain[0].known
    assert not traced(data, 8, state, 6, 7, 0).known


def test_a_row_with_choices_and_limits_that_needs_a_bad_record(config, made, tmp_path: Path) -> None:  # noqa: F811
    config.path = str(shutil.copytree(made[0], tmp_path / "copy"))
    config.cameras, config.choices = ("any", "exterior"), {"any": ("wrist", "exterior")}
    config.max_action, config.max_bad_records = (("action", 2.5),), 1
    damage(tmp_path / "copy", [(2, 0)])  # which also holds the instruction of its episode
    loader = Loader(RunData(config, seed=5), batch_size=8)
    seen = take(loader, 16)
    bad = positions_of(loader, 16 * 8, [(2, 0)])
    assert 2 < len(bad) < 64
    data = RunData(config, seed=5)
    for position in (min(bad), min(set(range(128)) - bad)):
        found = traced(data, 8, loader.state(16), 16, position // 8 + 1, position % 8)
        assert found.replaced == (position in bad)
        for key in found.batch.keys() - {"row"}:
            np.testing.assert_array_equal(found.batch[key][0], seen[position // 8][key][position % 8])
        written = inspect.inspect_run(data, 128, "a run", tmp_path / "out", found, (position // 8 + 1, position % 8))
        text = written.read_text()
        assert ("which needs a bad record" in text) == (position in bad)
        expected = "cannot be read: " if position in bad else f"do thing {found.place.episode}</dd>"
        assert f"<dt>instruction</dt><dd>{expected}" in text
        with Image.open(written.with_suffix(".png")) as picture:
            strips = [x[0].shape for x in found.batch.values() if x.dtype == np.uint8]
            assert picture.height == len(strips) * (18 + max(128 // h * h for _, h, _, _ in strips)), strips


def test_numbers_of_a_row_keep_their_rows() -> None:
    wide = np.arange(40.0).reshape(2, 20)
    assert page._numbers(wide).count("\n") == 1
    assert "float64 3 x 2 x 8 x 8 x 4, 0 to 0" in page._numbers(np.zeros((3, 2, 8, 8, 4)))


def test_rows_that_do_not_exist_are_refused(config) -> None:  # noqa: F811
    data = RunData(config, seed=5)
    for step, row in ((0, 0), (1, 8)):
        with pytest.raises(UserError, match=f"--trace={step}:{row}: expected STEP:ROW .* a row from 0 to 7"):
            traced(data, 8, None, 0, step, row)


def test_the_command_needs_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        assert cli.call(inspect.main, ["inspect", *arguments], inspect.define_flags) == 2
        return capsys.readouterr().err

    assert "expected one of --dataset, --config and --workdir, found none of them" in run()
    assert "found --dataset, --config" in run("--dataset=a", "--config=b")
    assert "--trace needs --workdir" in run("--dataset=a", "--trace=1:2")
    assert "nowhere" in run("--workdir=nowhere", "--trace=1:2")


@pytest.mark.slow
def test_a_run_is_traced_by_the_command(tiny_config, tmp_path: Path, monkeypatch, capsys) -> None:
    """A run whose weights changed when it continued; the batches are taken from training itself."""
    from uwm_jax.runs import opening
    from uwm_jax.train import train

    seen: list[dict[str, np.ndarray]] = []

    class Watched(Loader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if self.start_step + number < 6 and len(seen) == self.start_step + number:
                    seen.append({key: np.array(value) for key, value in batch.items()})
                yield batch

    monkeypatch.setattr(opening, "Loader", Watched)
    tiny_config.data.sources.robot = config_lib.source(weight=0.75)
    tiny_config.data.sources.video = config_lib.source(weight=0.25, use_actions=False)
    tiny_config.total_steps, tiny_config.checkpoint.every, tiny_config.data.prefetch = 2, 2, 1
    train(tiny_config, tmp_path / "run")
    del seen[2:]
    tiny_config.total_steps, tiny_config.data.sources.robot.weight = 4, 0.1
    train(tiny_config, tmp_path / "run")
    for step, row in ((1, 0), (2, 3), (3, 1), (4, 2)):
        arguments = [f"--workdir={tmp_path / 'run'}", f"--trace={step}:{row}"]
        assert cli.call(inspect.main, ["inspect", *arguments], inspect.define_flags) == 0
        with np.load(tmp_path / "run" / "inspect" / f"trace_{step}_{row}.npz") as stored:
            for key in stored:
                if key != "row":
                    assert stored[key][0].tobytes() == seen[step - 1][key][row].tobytes(), (step, row, key)
        page = (tmp_path / "run" / "inspect" / f"trace_{step}_{row}.html").read_text()
        assert "as recorded" in page and "frames alone" in page
