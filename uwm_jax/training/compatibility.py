"""Notes, warnings and refusals before a run starts from the parameters of another (`finetune.Origin`)."""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from uwm_jax import codecs, systems
from uwm_jax import config as config_lib
from uwm_jax.data.sources import keys_read
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.value_ranges import Range, under
from uwm_jax.data.windows import GROUPS
from uwm_jax.errors import UserError
from uwm_jax.training import average
from uwm_jax.training.finetune import Origin
from uwm_jax.training.patterns import is_fresh, matches, skip_flag

# Fields that finetuning often changes; a person is told, since no shape may show it.
_TOLD = (
    *("data.low_dim", "data.text", "data.text_table", "data.resize", "data.crop"),
    *(f"data.window.{group}" for group in GROUPS),
)


def check(origin: Origin, config: ConfigDict, spec: DataSpec, ranges: Mapping[str, Mapping[str, Range]]) -> list[str]:
    """Lines for people before the run starts.

    Args:
      config: of the new run.
      spec: of its data, with the normaliser that fits this data (`RunData(normalizer=None)`).
      ranges: of its data by source and key (`RunData.ranges()`).

    Raises:
      UserError: a field, or a fitted codec, that gives the origin's parameters another meaning.
    """
    now, before = config_lib.flatten(config), config_lib.flatten(origin.config)
    if now["system"] != before["system"]:
        raise UserError(
            f"config.init_from={origin.spec!r}: this workdir is a {before['system']} run, whose parameters a "
            f"{now['system']} run cannot start from."
        )
    tree = systems.tree(config)
    for name, freed_by in systems.get(config.system).fields.fixed.items():
        interface = tree.interfaces.get(freed_by or "", ())
        if now[name] != before[name] and not is_fresh(interface, config.init_from_skip):
            remedy = f", or let its layers start fresh: {skip_flag(interface)}" if interface else ""
            raise UserError(
                f"config.{name} is {now[name]!r}, but the parameters of config.init_from={origin.spec!r} were "
                f"trained with {before[name]!r}. Use the origin's value{remedy}."
            )
    text = tree.interfaces.get("text", ())
    if text and not is_fresh(text, config.init_from_skip):
        try:
            origin.data_spec.check_text_encoder(spec.text_encoder, "this run", f"config.init_from={origin.spec!r}")
        except UserError as e:
            raise UserError(f"{e} Or let the layer that reads them start fresh: {skip_flag(text)}") from e
    lines = [
        f"starting from {origin.item} of step {origin.step} in {origin.directory}; optimizer and step are fresh",
        *_about_average(origin),
        *_about_codec(origin, config),
        *_about_pretrained(config),
        *_about_normalizer(origin, config, spec, ranges),
    ]
    keys_now, keys_before = keys_read(config.data), keys_read(origin.config.data)
    for kind, fields in keys_now.items():
        known = list(keys_before[kind].values())
        lines += [
            f"note: config.{field} is {keys}; the origin was trained with {' or '.join(map(str, known))}"
            for field, keys in fields.items()
            if keys not in known
        ]
    for name in _TOLD:
        in_order = sorted if name == "data.low_dim" else lambda x: x
        there, here = in_order(before[name]), in_order(now[name])
        if there != here:
            lines.append(f"note: config.{name} is {here}; the origin was trained with {there}")
    return lines


def _about_average(origin: Origin) -> list[str]:
    if origin.parameters == average.RAW:
        return []
    told = average.warning(origin.config, origin.step, "--config.init_from_parameters=raw")
    return [f"warning: {told}"] if told else []


def _about_pretrained(config: ConfigDict) -> list[str]:
    flat = config_lib.flatten(config)
    return [
        f"note: config.{part.field} is not read, since {part.path} is the origin's; it starts from them with "
        f"{skip_flag([f'{part.path}/*'])}"
        for part in systems.tree(config).pretrained
        if flat[part.field] and not matches(part.marker, config.init_from_skip)
    ]


def _about_codec(origin: Origin, config: ConfigDict) -> list[str]:
    codec = codecs.of_config(config)
    if codec is None or not origin.gives_codec(config):
        return []
    name = codec.name
    if codec.pretrained:
        return [f"codec: the origin's {name}, {origin.codec.files} (config.model.codec.{name} is not read)"]
    if not origin.codec_arrays:
        return []
    fitted, wanted = codec.fitted_on(origin.codec_arrays), (len(config.data.cameras), *config.data.crop)
    if fitted != wanted:
        raise UserError(
            f"config.init_from={origin.spec!r}: the origin's {name} codec was fitted on {fitted[0]} views of "
            f"{fitted[1]}x{fitted[2]}, but this run has {wanted[0]} of {wanted[1]}x{wanted[2]}. Use the origin's "
            "views and crop, or this dataset's own codec, with layers for it that start fresh: "
            f"{skip_flag(systems.tree(config).codec_interface)}"
        )
    return [f"codec: the origin's {name} arrays"]


def _about_normalizer(
    origin: Origin, config: ConfigDict, spec: DataSpec, ranges: Mapping[str, Mapping[str, Range]]
) -> list[str]:
    kept = origin.kept_keys(config, spec)
    own = [key for key in spec.widths if key not in kept]
    plain = [key for key in kept if key not in origin.normalizer.entries]
    parts = [f"{', '.join(kept)} as in the origin"] if kept else []
    parts += [f"{', '.join(own)} from this run's data ({config.data.normalize})"] if own else []
    lines = [f"normaliser: {'; '.join(parts)}"]
    lines[0] += f" ({', '.join(plain)}: none, raw values)" if plain else ""
    for told in under(origin.normalizer, ranges, kept):
        lines.append(
            f"warning: {told}. Are the units and the meaning of the columns the same? A normaliser that fits this "
            f"data is --config.init_from_normalizer=fresh; for {kept[0]}, fresh layers with one are "
            f"{skip_flag(systems.tree(config).interface(kept[0]))}"
        )
    return lines
