"""Official PyTorch checkpoints become workdirs, and workdirs become official state dicts.

    python -m uwm_jax.convert from-torch --input=model.pt --official-config=.hydra/config.yaml --workdir=DIR \\
        [--normalizer=normalizer.npz | --no_normalizer] [--weights=ema] [--system=dp]
    python -m uwm_jax.convert to-torch --workdir=DIR --output=model.safetensors [--step=N] [--config.FIELD=VALUE]
    python -m uwm_jax.convert to-torch --workdir=DIR --output=DIR/ [--uses=policy] [--step=N] [--config.FIELD=VALUE]
    python -m uwm_jax.convert check DIR [--device=cuda]

Tensors keep their bits: from-torch, then to-torch, gives an equal file with the same names. `model.json` next to it
describes the model fully (normalisers are there, never among the tensors); from-torch takes it in place of the YAML.
An output that is a folder runs by itself in PyTorch, with `uwm_torch.py`, which lies in it (docs/serving.md); `check`
runs that program, and compares what it makes of the folder's probe with what JAX made of it.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from uwm_jax import cli, config_help, files, systems
from uwm_jax.conversion.check import check, refuse_differences
from uwm_jax.conversion.export_folder import to_folder
from uwm_jax.conversion.from_torch import from_torch
from uwm_jax.conversion.probe import USE
from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.errors import UserError
from uwm_jax.training import inference

FLAGS = flags.FLAGS

# The flags that only one of the words takes.
_FLAGS_OF = {
    "from-torch": ("input", "official_config", "normalizer", "no_normalizer", "weights", "system"),
    "to-torch": ("output", "step", "parameters", "uses", "limits"),
    "check": ("device",),
}


def define_flags() -> None:
    cli.accept_arguments()
    flags.DEFINE_string("input", None, "from-torch: weights under official names, .safetensors or .pt")
    flags.DEFINE_string("official_config", None, "from-torch: the run's .hydra/config.yaml, or a .json of to-torch")
    flags.DEFINE_string("normalizer", None, "from-torch: .npz with <key>/scale and <key>/offset")
    flags.DEFINE_bool("no_normalizer", False, "from-torch: keys that no normaliser is given for stay in raw units")
    flags.DEFINE_enum("weights", "model", ["model", "ema"], "from-torch: which of the weights that a file holds")
    flags.DEFINE_enum(
        "system", None, systems.names(), "from-torch: whose weights they are, where the official config does not tell"
    )
    flags.DEFINE_string("workdir", None, "from-torch: the directory to make; to-torch: the one to read")
    flags.DEFINE_string(
        "output", None, "to-torch: the .safetensors file to write, with a .json next to it, or the folder DIR/"
    )
    flags.DEFINE_list("uses", [], "to-torch, folders: what it is to answer, such as policy; all by default")
    flags.DEFINE_integer("step", None, "to-torch: which checkpoint; the newest by default", lower_bound=0)
    flags.DEFINE_string(
        "limits", None, "to-torch, folders: LOW:HIGH,... of the robot's actions, which are cut to them; none by default"
    )
    flags.DEFINE_string("device", "cpu", "check: torch's name of the device, such as cuda")
    inference.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    words, overrides = list(call.arguments), call.overrides
    for word, names in _FLAGS_OF.items():
        for name in names if words and words[0] != word and words[0] in _FLAGS_OF else ():
            if FLAGS[name].present:
                raise UserError(f"--{name.replace('_', '-')} is a flag of {word}; {words[0]} does not take it.")
    if words == ["from-torch"]:
        if overrides:
            raise UserError(f"--config.{overrides[0][0]}: from-torch takes every field from --official-config.")
        from_torch(
            cli.required_path("input"),
            cli.required_path("official_config"),
            cli.required_path("workdir"),
            cli.optional_path("normalizer"),
            no_normalizer=FLAGS.no_normalizer,
            which=FLAGS.weights,
            system=FLAGS.system or "",
        )
    elif words == ["to-torch"]:
        workdir, output = cli.required_path("workdir"), cli.required_path("output")
        if names_a_folder(FLAGS.output):
            to_folder(workdir, output, FLAGS.step, overrides, FLAGS.parameters, FLAGS.uses, FLAGS.limits)
        elif given := [name for name in ("uses", "limits") if FLAGS[name].present]:
            raise UserError(f"--{given[0]}: only for a folder, --output=DIR/; a single file holds all tensors alone.")
        else:
            to_torch(workdir, output, FLAGS.step, overrides, FLAGS.parameters)
    elif words[:1] == ["check"] and len(words) == 2:
        folder = files.local_path(words[1], "DIR")
        differences = check(folder, FLAGS.device)
        rows = [("use", "largest difference", "in", "at most")]
        rows += [(one.use, f"{one.largest:.1e}", one.output, f"{USE:.0e}") for one in differences]
        print(cli.table(rows), flush=True)
        refuse_differences(differences, folder)
    else:
        found = " ".join(words) or "nothing"
        raise UserError(
            f"expected one of the words from-torch and to-torch, or check and a folder, found {found}. Run with --help."
        )


def names_a_folder(output: str) -> bool:
    """Whether `--output` names an export folder: an existing one, a path that ends in "/", or one without an ending."""
    return output.endswith("/") or Path(output).is_dir() or not Path(output).suffix


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
