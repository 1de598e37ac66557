"""A trained policy behind a websocket, for robots: openpi's clients work unmodified.

    python -m uwm_jax.serve --workdir=DIR [--port=8000 --execute=8]
    python -m uwm_jax.serve --export=DIR [--device=cuda]

--export runs an export folder of `uwm_jax.convert to-torch` by PyTorch, with the program that lies in it.

Answers requests of many clients in batches; all programs are compiled before the first is accepted. On the same port
`/healthz` answers 200 while the model runs and 503 while the server drains, and `/metrics` is for Prometheus. SIGTERM
or Ctrl-C drain: what was received whole is answered, then all connections are closed.

A request is a flat msgpack map with the inputs of `uwm_jax.sample`'s files, one row of each, in raw units; a single
camera frame or low-dimensional vector stands for the whole history. It may hold `mode`, `prompt`, `seed`, `request_id`,
`reset`, and `promised` (d, Dr), actions of the chunk that will be executed whatever the reply says. A reply holds
`actions` (n, Dr) float32, row k for the k-th step from now, as the robot takes them. With `--stepwise` a connection is
an episode: every control step is sent, the server keeps the history, and replies with one action.

`--record=DIR` keeps the episodes of a stepwise server as a dataset. `--replay=DATASET:EPISODE` sends a recorded episode
through the server before a robot moves, writes predicted next to recorded actions to a page, and ends with status 1
where something looks wrong: cameras exchanged, BGR, flipped, no normaliser. `/` shows status and latency in a browser.

The token of clients is the text of --token_file, or of the environment variable UWM_SERVE_TOKEN.
"""

from __future__ import annotations

from collections.abc import Mapping

from absl import flags

from uwm_jax import cli, config_help
from uwm_jax.errors import UserError
from uwm_jax.training import inference

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run that is served, or owner/name[@revision] on the hub")
    flags.DEFINE_string("export", None, "in place of --workdir: an export folder, or one on the hub; PyTorch runs it")
    flags.DEFINE_string("device", "cpu", "with --export: PyTorch's device")
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; others than loopback require a token")
    flags.DEFINE_integer("port", 8000, "to listen on; 0 takes a free one", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("modes", None, "the uses that are served, separated by commas; all by default")
    execute = "steps of each chunk that a client is told to take; 8, or all of a shorter chunk, by default"
    flags.DEFINE_integer("execute", None, execute, lower_bound=1)
    flags.DEFINE_bool("stepwise", False, "a connection is an episode: single steps in, one action out of each")
    flags.DEFINE_string("keys", None, "name in requests=key here, separated by commas; name= drops an entry")
    flags.DEFINE_enum("resize", None, ["cover"], "take frames of other sizes: resized to cover the model's, cropped")
    flags.DEFINE_string("source", "", "of the training data, whose robot acts; needed where they differ")
    flags.DEFINE_string("limits", None, "LOW:HIGH of every column of the robot's action, or one for all; beyond is cut")
    flags.DEFINE_integer("seed", 0, "of the sampler's noise", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_float("batch_ms", 5.0, "how long a request waits for others", lower_bound=0.0, upper_bound=1000.0)
    flags.DEFINE_integer("batch_size", 8, "requests of a batch", lower_bound=1, upper_bound=64)
    flags.DEFINE_integer("connections", 64, "clients at once", lower_bound=1, upper_bound=4096)
    flags.DEFINE_float("drain_seconds", 30.0, "in which SIGTERM lets requests be answered", lower_bound=0.0)
    flags.DEFINE_string("text_encoder", "", "CLIP that embeds prompts, by torch: `recorded`, or its place here")
    flags.DEFINE_string("text_table", None, "dataset whose table embeds prompts; those of the run by default")
    flags.DEFINE_string("record", None, "with --stepwise: a dataset in the training layout that keeps every episode")
    flags.DEFINE_string("replay", None, "DATASET:EPISODE: send a recorded episode, compare its actions, and end")
    flags.DEFINE_string(
        "replay_page", None, "of --replay; replay.html of a local workdir by default, else of this folder"
    )
    flags.DEFINE_bool("show_frames", False, "show the newest frames on the page at /; requires a token")
    flags.DEFINE_string("token_file", None, "file with the token of clients")
    flags.DEFINE_string("tls_cert", None, "certificate chain (PEM) for wss://")
    flags.DEFINE_string("tls_key", None, "its private key (PEM)")
    inference.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    cli.need_extra("serve", "msgpack", "websockets")
    from uwm_jax.serving.running import serve

    serve(call, parse_keys(FLAGS.keys or ""), sizes_up_to(FLAGS.batch_size))


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
