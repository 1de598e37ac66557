"""Text files are replaced whole, and a failed write leaves what was there."""

from __future__ import annotations

import os

import pytest

from uwm_jax.files import write_text


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "newer")
    assert path.read_text() == "new"
