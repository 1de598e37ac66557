"""The last words of a process, also where nobody can hear them."""

from __future__ import annotations

import os
import sys

import pytest

from uwm_jax.ending import last_words


def test_last_words_are_said(capsys):
    last_words("error: all is lost")
    last_words()
    assert capsys.readouterr() == ("", "error: all is lost\n")


@pytest.mark.parametrize("how", ["pipe", "closed", "none"])
def test_a_process_ends_although_nobody_hears_why(monkeypatch, how):
    """A thread that ends the process says why before it does: an error there would leave the process for ever."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = [os.fdopen(os.dup(writer), "w") for _ in range(2)]
    os.close(writer)
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        stream.write("not flushed yet")
        monkeypatch.setattr(sys, name, None if how == "none" else stream)
    if how != "pipe":
        for stream in streams:
            with pytest.raises(BrokenPipeError):
                stream.close()
    last_words("error: all is lost")
    monkeypatch.undo()
    if how == "pipe":
        for stream in streams:
            with pytest.raises(BrokenPipeError):
                stream.close()
