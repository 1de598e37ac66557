"""Environment variables of workers: those that anybody may see, and secrets, whose values appear nowhere.

--env=UWM_DATA_DIR=gs://bucket/data    the value is shown
--secret=WANDB_API_KEY                 the value of this machine's environment
--secret=WANDB_API_KEY=wandb-key       the newest version of a secret of that name in the cloud's secret manager
--secret=WANDB_API_KEY=wandb-key:3     its version 3
"""

from __future__ import annotations

import dataclasses
import os
import re

from absl import flags

from uwm_jax.errors import UserError

FLAGS = flags.FLAGS

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"([A-Za-z0-9_-]+)(?::(latest|[1-9][0-9]*))?")
_SOUNDS_SECRET = re.compile(r"(?i)key|token|secret|passw|credential")


@dataclasses.dataclass(frozen=True)
class Secret:
    """A secret that workers find in their environment.

    Attributes:
      variable: of their environment.
      name: of the secret in the cloud's secret manager; None: the value is that of the launcher's environment.
      version: of the secret: `latest`, or a number.
    """

    variable: str
    name: str | None = None
    version: str = "latest"

    def value(self) -> str:
        """The value of the launcher's environment, for files that only the worker's user can read; never printed."""
        value = os.environ.get(self.variable, "")
        if not value:
            raise UserError(
                f"--secret={self.variable}: the variable is not set here. Set it, or name a secret that the workers "
                f"read: --secret={self.variable}=NAME."
            )
        return value


def define_flags() -> None:
    flags.DEFINE_multi_string("env", [], "NAME=VALUE of the workers' environment, shown in dry runs; may be repeated")
    flags.DEFINE_multi_string(
        "secret",
        [],
        "NAME: a variable of the workers' environment with the value that it has here; NAME=SECRET[:VERSION]: with "
        "that of a secret in the cloud's secret manager. Shown nowhere; may be repeated",
    )


def plain() -> dict[str, str]:
    """{name: value} of `--env`."""
    found = {}
    for given in FLAGS.env:
        name, equals, value = given.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise UserError(f"--env={name}: expected NAME=VALUE, such as UWM_DATA_DIR=gs://bucket/data.")
        if _SOUNDS_SECRET.search(name):
            raise UserError(
                f"--env={name}=...: this looks like a secret, and --env is shown. Use --secret={name} for the value of "
                f"this machine's environment, or --secret={name}=NAME for a secret of the cloud."
            )
        found[name] = value
    return found


def secrets() -> list[Secret]:
    """Those of `--secret`; raises UserError where two set one variable."""
    found = []
    for given in FLAGS.secret:
        variable, equals, name = given.partition("=")
        match = _SECRET.fullmatch(name)
        if not _VARIABLE.fullmatch(variable) or (equals and not match):
            raise UserError(  # without the value, which may be a secret by mistake
                f"--secret={variable}...: expected NAME, or NAME=SECRET or NAME=SECRET:VERSION of a secret in the "
                "cloud's secret manager; the value itself is never given."
            )
        found.append(Secret(variable, match[1], match[2] or "latest") if equals and match else Secret(variable))
    names = [secret.variable for secret in found] + list(plain())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--secret, --env: {', '.join(twice)} is given twice.")
    return found
