"""The schema of `manifest.json`, which `check_manifest` validates once for all readers."""

from __future__ import annotations

from typing import Any, NamedTuple

from uwm_jax.data.names import check_name
from uwm_jax.errors import UserError


class _Each(NamedTuple):
    """An object with arbitrary keys and values of one schema."""

    form: Any


class _Count(NamedTuple):
    """An integer of at least `least`."""

    least: int = 0


class _Shape(NamedTuple):
    """A list of integers of at least -1, or null."""


_FEATURE = {"shape": _Shape(), "dtype": str, "image": bool, "column": bool}
_SPLIT = {
    "episodes": _Count(),
    "steps": _Count(),
    "chunks": _Count(),
    "skipped": _Each(_Count()),
    "skipped_notes": [str],
    "shards": [{"file": str, "records": _Count(), "bytes": _Count(), "sha256": str}],
    "files": _Each({"crc32c": _Count()}),
}
_SPLIT_OPTIONAL = {"remarks": _Each(_Count()), "missing_files": [str]}
_FORM = {
    "name": str,
    "chunk_steps": _Count(1),
    "step_features": _Each(_FEATURE),
    "cameras": _Each({"height": _Count(1), "width": _Count(1)}),
    "splits": _Each(_SPLIT),
}
_OPTIONAL = {
    "version": str,
    "robot": {"flip": str},
    "unusable_keys": _Each(str),
    "episode_features": _Each({"shape": _Shape(), "dtype": str}),
}


def check_manifest(manifest: dict[str, Any], where: object) -> None:
    """Checks the fields of a manifest, and every name in it that becomes part of a path.

    Args:
        where: the file, for messages.
    Raises:
        UserError: a field is missing or of another schema, or a name leads out of the dataset.
    """
    if missing := sorted(_FORM.keys() - manifest.keys()):
        raise UserError(f"{where}: the fields {', '.join(missing)} are missing. Make the dataset again.")
    form = _FORM | {field: of_field for field, of_field in _OPTIONAL.items() if field in manifest}
    if unfit := _unfit(manifest, form, "") or ("" if manifest["splits"] else "it lists no splits"):
        raise UserError(f"{where} has been damaged or edited: {unfit}. Copy it again, or make the dataset again.")
    for key, feature in manifest["step_features"].items():
        if feature["column"] and (feature["shape"] is None or min(feature["shape"], default=1) < 1):
            raise UserError(
                f"{where}: {key!r} is a column, but has the shape {feature['shape']}. Make the dataset again."
            )
    for key in (*manifest["step_features"], *manifest["cameras"]):
        check_name(key, "the step key", where, nested=True)
    for split, info in manifest["splits"].items():
        check_name(split, "the split", where)
        optional = {field: form for field, form in _SPLIT_OPTIONAL.items() if field in info}
        if unfit := _unfit(info, optional, f"/splits/{split}"):
            raise UserError(f"{where} has been damaged or edited: {unfit}. Copy it again, or make the dataset again.")
        for shard in info["shards"]:
            check_name(shard["file"], f"the name of a shard of split {split!r}", where)
        for file in info["files"]:
            check_name(file, f"the name of a file of split {split!r}", where, nested=True)


def _unfit(value: Any, form: Any, at: str) -> str:
    """The first value that violates a schema: its path, the value found, what was expected; "" if there is none."""

    def within(parts: Any) -> str:
        return next((found for part, of_part, name in parts if (found := _unfit(part, of_part, f"{at}/{name}"))), "")

    if isinstance(form, dict) and isinstance(value, dict) and form.keys() <= value.keys():
        return within((value[name], of_field, name) for name, of_field in form.items())
    if isinstance(form, _Each) and isinstance(value, dict):
        return within((part, form.form, name) for name, part in value.items())
    if isinstance(form, list) and isinstance(value, list):
        return within((part, form[0], i) for i, part in enumerate(value))
    if isinstance(form, _Shape) and (value is None or isinstance(value, list)):
        return within((part, _Count(-1), i) for i, part in enumerate(value or ()))
    if isinstance(form, _Count) and type(value) is int and form.least <= value < 1 << 63:
        return ""
    if isinstance(form, type) and type(value) is form:
        return ""
    return f"{at[1:]} is {str(value)[:60]!r}, expected {_words(form)}"


def _words(form: Any) -> str:
    if isinstance(form, dict):
        return f"an object with {', '.join(form)}"
    if isinstance(form, _Count):
        return f"an integer of at least {form.least}"
    if isinstance(form, type):
        return "a string" if form is str else "true or false"
    return "an object" if isinstance(form, _Each) else "a list"
