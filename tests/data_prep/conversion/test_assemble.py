from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.conversion.assemble import check_files
from uwm_jax.data.chunks import Layout
from uwm_jax.errors import UserError


def _layout(*keys: str) -> Layout:
    return Layout(16, {}, {key: ((1,), "<f4") for key in keys}, {})


def test_no_two_files_have_one_name() -> None:
    where = Path("source/features.json")
    check_files(_layout("a/b", "a_b", "b"), ["train", "val"], where)
    with pytest.raises(UserError, match=r"'a/b' and the feature 'a.b' would both become columns/train/a.b.npy"):
        check_files(_layout("a/b", "b", "a.b"), ["train"], where)
    with pytest.raises(UserError, match=r"strings of split 'train' and split 'train.texts' would both become index/"):
        check_files(_layout("a"), ["train", "train.texts"], where)
