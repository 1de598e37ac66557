"""A trained policy behind a websocket, for robots: openpi's clients work unmodified.

    python -m uwm_jax.serve --workdir=DIR [--port=8000 --execute=8]

Answers requests of many clients in batches; all programs are compiled before the first is accepted. On the same port
`/healthz` answers 200 while the model runs and 503 while the server drains, and `/metrics` is for Prometheus. SIGTERM
or Ctrl-C drain: what was received whole is answered, then all connections are closed.

A request is a flat msgpack map with the inputs of `uwm_jax.sample`'s files, one row of each, in raw units; a single
camera frame or low-dimensional vector stands for the whole history. It may hold `mode`, `prompt`, `seed`, `request_id`,
`reset`, and `promised` (d, Dr), actions of the chunk that will be executed whatever the reply says. A reply holds
`actions` (n, Dr) float32, row k for the k-th step from now, as the robot takes them. With `--stepwise` a connection is
an episode: every control step is sent, the server keeps the history, and replies with one action.

The token of clients is the text of --token_file, or of the environment variable UWM_SERVE_TOKEN.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Mapping

from absl import flags

from uwm_jax import cli, config_help
from uwm_jax.actor import Actor
from uwm_jax.backend import JaxBackend
from uwm_jax.errors import UserError, warn
from uwm_jax.serving import access
from uwm_jax.serving.batching import SIZES, Engine
from uwm_jax.serving.connections import Server
from uwm_jax.serving.contract import Contract
from uwm_jax.training import inference

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run, or of the converted checkpoint, that is served")
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; others than loopback require a token")
    flags.DEFINE_integer("port", 8000, "to listen on; 0 takes a free one", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("modes", None, "the uses that are served, separated by commas; all by default")
    flags.DEFINE_integer("execute", 8, "steps of each chunk that a client is told to take", lower_bound=1)
    flags.DEFINE_bool("stepwise", False, "a connection is an episode: single steps in, one action out of each")
    flags.DEFINE_string("keys", None, "name in requests=key here, separated by commas; name= drops an entry")
    flags.DEFINE_enum("resize", None, ["cover"], "take frames of other sizes: resized to cover the model's, cropped")
    flags.DEFINE_string("source", "", "of the training data, whose robot acts; needed where they differ")
    flags.DEFINE_integer("seed", 0, "of the sampler's noise", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_float("batch_ms", 5.0, "how long a request waits for others", lower_bound=0.0, upper_bound=1000.0)
    flags.DEFINE_integer("batch_size", SIZES[-1], "requests of a batch", lower_bound=1, upper_bound=64)
    flags.DEFINE_integer("connections", 64, "clients at once", lower_bound=1, upper_bound=4096)
    flags.DEFINE_float("drain_seconds", 30.0, "in which SIGTERM lets requests be answered", lower_bound=0.0)
    flags.DEFINE_string("token_file", None, "file with the token of clients")
    flags.DEFINE_string("tls_cert", None, "certificate chain (PEM) for wss://")
    flags.DEFINE_string("tls_key", None, "its private key (PEM)")
    inference.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    token, certificate = access.read_token(cli.optional_path("token_file")), _certificate()
    for remark in access.check_address(FLAGS.host, token, certificate is not None):
        warn(remark)
    keys = parse_keys(FLAGS.keys or "")
    actor, known = _open(call)
    contract = Contract(
        actor,
        modes=[mode.strip() for mode in (FLAGS.modes or "").split(",") if mode.strip()],
        execute=FLAGS.execute,
        stepwise=FLAGS.stepwise,
        keys=keys,
        resize=FLAGS.resize is not None,
        known=known,
    )
    server = Server(
        contract,
        Engine(actor, seed=FLAGS.seed, sizes=sizes_up_to(FLAGS.batch_size)),
        host=FLAGS.host,
        port=FLAGS.port,
        token=token,
        tls=certificate,
        deadline=FLAGS.batch_ms / 1000,
        most=FLAGS.connections,
        drain_seconds=FLAGS.drain_seconds,
    )
    server.warm()
    asyncio.run(_serve(server))
    print(server.status.summary(), flush=True)


async def _serve(server: Server) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.drain)
    await server.run(lambda: print(f"serving {', '.join(server.contract.modes)} at {server.address}", flush=True))


def _open(call: cli.Call) -> tuple[Actor, set[str]]:
    """The model that acts, and the keys of its data."""
    workdir = cli.required_path("workdir")
    system, params, frozen, step = inference.load_for_inference(workdir, FLAGS.step, call.overrides, FLAGS.parameters)
    used = inference.parameters_used(workdir, step, FLAGS.parameters)["parameters"]
    backend = JaxBackend(system, system.held(params), frozen, step=step, parameters=used)
    return Actor(backend, source=FLAGS.source), inference.data_keys(workdir, step) or set()


def _certificate() -> ssl.SSLContext | None:
    return access.tls(cli.optional_path("tls_cert"), cli.optional_path("tls_key"))


def sizes_up_to(size: int) -> tuple[int, ...]:
    """The compiled sizes of batches of at most `size` requests: powers of two, and `size`."""
    powers = [2**i for i in range(size.bit_length()) if 2**i < size]
    return (*powers, size)


def parse_keys(text: str) -> Mapping[str, str]:
    """`--keys`: {name in requests: key}.

    Raises:
      UserError: a part without `=`, or a name that stands twice.
    """
    keys: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, equals, key = (each.strip() for each in part.partition("="))
        if not name or not equals or name in keys:
            raise UserError(f"--keys: expected name=key pairs of different names, separated by commas; found {part!r}.")
        keys[name] = key
    return keys


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
