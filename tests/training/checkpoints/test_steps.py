"""Which folders of a workdir count as finished checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from uwm_jax.training.checkpoints import steps
from uwm_jax.training.checkpoints.steps import Folder, Tenures

A, B, C = "a" * 12, "b" * 12, "c" * 12


def make(workdir, *names, nonce=None, **earlier):
    """Folders, and objects where a name has a suffix."""
    directory = workdir / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("{}") if "." in name else (directory / name).mkdir()
    if nonce:
        (workdir / ".lock").write_text(json.dumps({"nonce": nonce, "earlier": earlier}))
    return directory


def test_looking_imports_no_jax():
    program = (
        "import sys; from uwm_jax.training.checkpoints import steps, lock; print({'jax', 'orbax'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_a_local_folder_counts_by_its_name(tmp_path):
    directory = make(tmp_path, "2", "10", "4.orbax-checkpoint-tmp", "6.deleted", "notes")
    (tmp_path / ".lock").write_text("process 12 on here\n")
    assert steps.steps_in(directory) == [2, 10] and steps.latest_step(str(tmp_path)) == 10
    assert steps.folder_of(directory, 10) == directory / "10"
    assert steps.folder_of(directory, 11) == directory / "11", "for messages"
    assert steps.latest_step(tmp_path / "none") is None
    assert steps.mark(tmp_path) == []


def test_a_folder_with_a_nonce_counts_with_its_marker_alone(tmp_path):
    names = (f"2-{A}", f"2-{A}.commit", f"4-{A}", f"6-{A}.commit", f"8-{A}.commit", f"8-{A}", f"8-{A}.corrupt")
    directory = make(tmp_path, *names)
    assert steps.steps_in(directory) == [2], "4 has no marker, 6 no folder, 8 was left out"
    assert steps.folder_of(directory, 2) == directory / f"2-{A}"


@pytest.mark.parametrize(
    ("tenures", "found"),
    [
        (None, {2: A, 4: B}),  # a copy without the lock
        (Tenures(B, {A: 2}), {2: A, 4: B}),
        (Tenures(A, {}), {2: A, 4: A}),  # b's was written by nobody who held this lock
        (Tenures(C, {A: 2, B: 4}), {2: A, 4: B}),
        (Tenures(C, {B: 4, A: 4}), {2: A, 4: A}),  # the later holder's
        (Tenures(C, {A: None}), {2: A, 4: A}),  # taken over a moment ago
        (Tenures(C, {A: 3}), {2: A}),
        (Tenures(C, {}), {}),
    ],
)
def test_the_lock_decides_whose_markers_count(tmp_path, tenures, found):
    names = [f"{step}-{nonce}{suffix}" for step, nonce in ((2, A), (4, A), (4, B)) for suffix in ("", ".commit")]
    directory = make(tmp_path, *names)
    if tenures is not None:
        make(tmp_path, nonce=tenures.nonce, **tenures.earlier)
    folders = steps.finished_in(directory)
    assert {step: folder.nonce for step, folder in folders.items()} == found


def test_taking_the_lock_settles_how_far_earlier_holders_came(tmp_path):
    names = [f"{step}-{nonce}{suffix}" for step, nonce in ((2, A), (4, A), (6, B)) for suffix in ("", ".commit")]
    directory = make(tmp_path, *names, f"8-{B}")
    assert steps.settled(directory, Tenures(C, {A: 2, B: None})) == {A: 2, B: 6}
    assert steps.settled(directory, Tenures(C, {"d" * 12: 9, B: None})) == {B: 6}, "nothing of d is left"
    assert steps.nonces_in(directory) == [A, B]


def test_a_lock_that_is_no_record_hides_no_checkpoint(tmp_path):
    directory = make(tmp_path, f"2-{A}", f"2-{A}.commit")
    for text in ("process 12 on here\n", "[]", '{"nonce": 1, "earlier": {}}', '{"nonce": "a", "earlier": {"b": "x"}}'):
        (tmp_path / ".lock").write_text(text)
        assert steps.steps_in(directory) == [2]


def test_plain_folders_always_count_among_those_with_a_marker():
    assert Tenures(A, {}).accept(Folder(4, "", "4")) and not Tenures(A, {}).accept(Folder(4, B, f"4-{B}"))
