"""Official PyTorch checkpoints become workdirs, and workdirs become official state dicts.

    python -m uwm_jax.convert from-torch --input=model.pt --official-config=.hydra/config.yaml --workdir=DIR \\
        [--normalizer=normalizer.npz | --no_normalizer] [--weights=ema] [--system=dp] \\
        [--optimizer [--config.data.path=DATASET]]
    python -m uwm_jax.convert to-torch --workdir=DIR --output=model.safetensors|models.pt [--step=N] \\
        [--parameters=raw] [--config.FIELD=VALUE]
    python -m uwm_jax.convert to-torch --workdir=DIR --output=DIR/ [--uses=policy] [--step=N] [--config.FIELD=VALUE]
    python -m uwm_jax.convert check DIR [--device=cuda]
    python -m uwm_jax.convert push --workdir=DIR --repo=owner/name [--license=apache-2.0] [--private] [--dry_run]
    python -m uwm_jax.convert push --export=DIR --repo=owner/name

Tensors keep their bits: from-torch, then to-torch, gives an equal file with the same names. `model.json` next to it
describes the model fully (normalisers are there, never among the tensors); from-torch takes it in place of the YAML.
An output that is a folder runs by itself in PyTorch, with `uwm_torch.py`, which lies in it (docs/serving.md); `check`
runs that program, and compares what it makes of the folder's probe with what JAX made of it. `push` uploads such a
folder to the Hugging Face hub, with a card of the run, its data and its results; wherever a workdir or an export is
read, owner/name[@revision] stands for it then.
"""

from __future__ import annotations

from absl import flags

from uwm_jax import cli, config_help, systems
from uwm_jax.conversion.check import check, refuse_differences
from uwm_jax.conversion.export_folder import to_folder
from uwm_jax.conversion.from_torch import from_torch
from uwm_jax.conversion.probe import USE
from uwm_jax.conversion.push import Repository, push_export, push_run
from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.errors import UserError
from uwm_jax.files import as_place
from uwm_jax.hub import runs
from uwm_jax.reporting.card import UNKNOWN
from uwm_jax.training import inference

FLAGS = flags.FLAGS

_OF_FOLDERS = ("step", "parameters", "uses", "limits")

# The flags that not all of the words take.
_FLAGS_OF = {
    "from-torch": (
        "workdir",
        "input",
        "official_config",
        "normalizer",
        "no_normalizer",
        "weights",
        "system",
        "optimizer",
    ),
    "to-torch": ("workdir", "output", *_OF_FOLDERS),
    "check": ("device",),
    "push": ("workdir", "export", "repo", "license", "private", "dry_run", *_OF_FOLDERS),
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
    flags.DEFINE_bool(
        "optimizer", False, "from-torch: take the optimizer's state of a .pt as well, so that training continues"
    )
    flags.DEFINE_string("workdir", None, "from-torch: the directory to make; to-torch, push: the one to read")
    flags.DEFINE_string(
        "output", None, "to-torch: the .safetensors or .pt file to write, with a .json next to it, or the folder DIR/"
    )
    flags.DEFINE_list("uses", [], "to-torch of folders, push: what it is to answer, such as policy; all by default")
    flags.DEFINE_integer("step", None, "to-torch, push: which checkpoint; the newest by default", lower_bound=0)
    flags.DEFINE_string(
        "limits",
        None,
        "to-torch of folders, push: LOW:HIGH,... of the robot's actions, which are cut to them; none by default",
    )
    flags.DEFINE_string("export", None, "push: an export folder, in place of --workdir")
    flags.DEFINE_string("repo", None, "push: the repository of the hub, owner/name, which is made where there is none")
    flags.DEFINE_string("license", UNKNOWN, "push: the hub's identifier of the weights' licence, such as apache-2.0")
    flags.DEFINE_bool("private", False, "push: a new repository is private")
    flags.DEFINE_bool("dry_run", False, "push: makes and shows all of it, and sends nothing")
    flags.DEFINE_string("device", "cpu", "check: torch's name of the device, such as cuda")
    inference.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    words, overrides = list(call.arguments), call.overrides
    own = _FLAGS_OF.get(words[0], ()) if words else ()
    for word, names in _FLAGS_OF.items():
        for name in names if own else ():
            if name not in own and FLAGS[name].present:
                raise UserError(f"--{name.replace('_', '-')} is a flag of {word}; {words[0]} does not take it.")
    if words == ["from-torch"]:
        if overrides and not FLAGS.optimizer:
            raise UserError(
                f"--config.{overrides[0][0]}: from-torch takes every field from --official-config. With --optimizer, "
                "those that decide how training continues can be set."
            )
        from_torch(
            cli.required_path("input"),
            cli.required_path("official_config"),
            cli.required_path("workdir"),
            cli.optional_path("normalizer"),
            no_normalizer=FLAGS.no_normalizer,
            which=FLAGS.weights,
            system=FLAGS.system or "",
            optimizer=FLAGS.optimizer,
            overrides=overrides,
        )
    elif words == ["to-torch"]:
        workdir, output = cli.required_run(), cli.required_path("output")
        if names_a_folder(FLAGS.output):
            to_folder(workdir, output, FLAGS.step, overrides, FLAGS.parameters, FLAGS.uses, FLAGS.limits)
        elif given := [name for name in ("uses", "limits") if FLAGS[name].present]:
            raise UserError(f"--{given[0]}: only for a folder, --output=DIR/; a single file holds all tensors alone.")
        else:
            to_torch(workdir, output, FLAGS.step, overrides, FLAGS.parameters)
    elif words[:1] == ["check"] and len(words) == 2:
        if overrides:
            raise UserError(f"--config.{overrides[0][0]}: an export folder is checked as it is.")
        folder = runs.export(words[1], "DIR")
        differences = check(folder, FLAGS.device)
        rows = [("use", "largest difference", "in", "at most")]
        rows += [(one.use, f"{one.largest:.1e}", one.output, f"{USE:.0e}") for one in differences]
        print(cli.table(rows), flush=True)
        refuse_differences(differences, folder)
    elif words == ["push"]:
        if bool(FLAGS.workdir) == bool(FLAGS.export):
            raise UserError("push: expected --workdir=DIR or --export=DIR, one of them.")
        changing = [
            *(name for name in _OF_FOLDERS if FLAGS[name].present),
            *(f"config.{name}" for name, _ in overrides),
        ]
        if FLAGS.export and changing:
            raise UserError(f"--{changing[0]}: an export folder is uploaded as it is; with --workdir, push makes one.")
        to = Repository(cli.required("repo"), FLAGS.license, FLAGS.private, FLAGS.dry_run)
        if FLAGS.export:
            push_export(cli.required_path("export"), to)
        else:
            push_run(cli.required_run(), to, FLAGS.step, overrides, FLAGS.parameters, FLAGS.uses, FLAGS.limits)
    else:
        found = " ".join(words) or "nothing"
        raise UserError(
            f"expected one of the words from-torch, to-torch and push, or check and a folder, found {found}. Run with "
            "--help."
        )


def names_a_folder(output: str) -> bool:
    """Whether `--output` names an export folder: an existing one, a path that ends in "/", or one without an ending."""
    return output.endswith("/") or as_place(output).is_dir() or not as_place(output).suffix


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
