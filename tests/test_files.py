"""Text files are replaced whole, and a failed write leaves what was there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from uwm_jax.files import write_text

_ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # else Python takes UTF-8 there too


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]

    def full(self, text, encoding):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "newer")
    assert path.read_text() == "new"


def test_text_is_utf8_whatever_the_locale(tmp_path):
    code = f"from uwm_jax.files import write_text; write_text({str(tmp_path / 'a.html')!r}, '\\u00d710\\u207b\\u2076')"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | _ASCII)
    assert (tmp_path / "a.html").read_bytes() == "×10⁻⁶".encode()
