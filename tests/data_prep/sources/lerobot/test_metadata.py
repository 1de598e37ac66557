"""What a LeRobot dataset declares of its episodes and tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build
from data_prep.sources.lerobot.episodes import corpus
from data_prep.sources.lerobot.metadata import read_tasks
from tests.data_prep import lerobot_source
from uwm_jax.errors import RunError


def declare(root: Path, episodes: int) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total_episodes": episodes}))


@pytest.mark.parametrize("name, named", [("__index_level_0__", False), ("task", False), ("text", True)])
def test_tasks_by_the_name_of_their_index(tmp_path: Path, name: str, named: bool) -> None:
    # As pandas writes it: an index without a name, with one, and any name that its metadata give.
    table = pa.table({"task_index": [4, 0], name: ["lift", "push"]})
    if named:
        table = table.replace_schema_metadata({"pandas": json.dumps({"index_columns": [name], "columns": []})})
    lerobot_source.write_parquet(tmp_path / "meta" / "tasks.parquet", table)
    assert read_tasks(tmp_path, 3) == {4: "lift", 0: "push"}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_that_the_metadata_lack_are_counted(tmp_path: Path, version: str) -> None:
    root = tmp_path / "arm"
    info = {"features": {"action": lerobot_source.FEATURES["action"]}, "splits": {"train": "0:3", "val": "3:6"}}
    lerobot_source.make(root, version, [3] * 4, videos=[], info=info)
    declare(root, 6)
    manifest = build(corpus(root), tmp_path / "out", Options(workers=1, max_skipped=0.7))
    assert manifest is not None
    missing = {"missing, though total_episodes of meta/info.json declares it": 2}
    assert [split["skipped"] for split in manifest["splits"].values()] == [{}, missing]
    assert [split["episodes"] for split in manifest["splits"].values()] == [3, 1]
    with pytest.raises(RunError, match="2 of 6 episodes"):
        build(corpus(root), tmp_path / "other", Options(workers=1, max_skipped=0.3))
    declare(root, 4)
    assert sum(part.promised or 0 for parts in corpus(root).splits.values() for part in parts) == 4
