"""Builds the container image of this commit, which JobSets and XPK start, and pushes it.

    python -m launch.image --image=us-docker.pkg.dev/PROJECT/REPOSITORY/uwm_jax [--extras=tpu,gcs,wandb] [--dry_run]

The image is tagged with the commit, so that what runs is what is checked out here; a dirty tree is refused. Needs
docker, logged in to the registry (`gcloud auth configure-docker us-docker.pkg.dev`).
"""

from __future__ import annotations

import re
from pathlib import Path

from absl import flags

from launch.bundle import Bundle, bundle
from launch.program import Program
from uwm_jax import cli
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parents[1]
BUILD_SECONDS = 3600.0
PUSH_SECONDS = 3600.0

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+")
_EXTRAS = re.compile(r"[a-z0-9_-]+(,[a-z0-9_-]+)*")


def define_flags() -> None:
    flags.DEFINE_string("image", None, "REGISTRY/PROJECT/.../NAME of the image, without a tag: that is the commit")
    flags.DEFINE_string("extras", "tpu,gcs", "extras of uwm-jax in the image")
    flags.DEFINE_bool("push", True, "push it to its registry")
    flags.DEFINE_bool("dry_run", False, "print the commands that would run, and run none")


def main(call: cli.Call) -> None:
    docker = Program("docker", "Install it from https://docs.docker.com/engine/install/;", FLAGS.dry_run)
    if not _EXTRAS.fullmatch(FLAGS.extras):
        raise UserError(f"--extras={FLAGS.extras}: expected names such as tpu,gcs,wandb.")
    found = bundle(ROOT, build=not FLAGS.dry_run)
    tag = tagged(cli.required("image"), found)
    docker.run(
        "build",
        f"--file={ROOT / 'launch' / 'Dockerfile'}",
        "--platform=linux/amd64",
        *(f"--build-arg={name}={value}" for name, value in build_arguments(found, FLAGS.extras).items()),
        f"--tag={tag}",
        str(found.wheel.parent),
        seconds=BUILD_SECONDS,
    )
    if FLAGS.push:
        docker.run("push", tag, seconds=PUSH_SECONDS)


def build_arguments(found: Bundle, extras: str) -> dict[str, str]:
    """Those of launch/Dockerfile."""
    return {"PYTHON": found.python, "WHEEL": found.wheel.name, "EXTRAS": extras}


def tagged(image: str, found: Bundle) -> str:
    """The image of a bundle's commit.

    Raises:
      UserError: `image` is no name of an image, or has a tag.
    """
    if not _NAME.fullmatch(image):
        raise UserError(
            f"--image={image}: expected a name such as us-docker.pkg.dev/PROJECT/REPOSITORY/uwm_jax, without a tag."
        )
    return f"{image}:{found.commit[:12]}"


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
