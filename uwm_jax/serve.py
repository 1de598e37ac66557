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

import asyncio
import signal
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from uwm_jax import cli, config_help
from uwm_jax.actor import Actor
from uwm_jax.backend import Backend, JaxBackend
from uwm_jax.data.records import dataset_dir, find_dataset
from uwm_jax.data.robot import parse_limits
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.files import check_output_file, write_text
from uwm_jax.serving import access, replay
from uwm_jax.serving.batching import SIZES, Engine
from uwm_jax.serving.connections import Server, in_thread
from uwm_jax.serving.contract import Contract
from uwm_jax.serving.page import Frames, Pages
from uwm_jax.serving.prompts import open_prompts
from uwm_jax.serving.recorded_episode import RecordedEpisode
from uwm_jax.serving.recording import Recording, Together
from uwm_jax.serving.replay_page import replay_page
from uwm_jax.torch_bridge.torch_backend import TorchBackend
from uwm_jax.training import inference

FLAGS = flags.FLAGS

EXECUTE = 8


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
    flags.DEFINE_integer("batch_size", SIZES[-1], "requests of a batch", lower_bound=1, upper_bound=64)
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
    token, certificate = access.read_token(cli.optional_path("token_file")), _certificate()
    for remark in access.check_address(FLAGS.host, token, certificate is not None):
        warn(remark)
    keys = parse_keys(FLAGS.keys or "")
    if FLAGS.record and not FLAGS.stepwise:
        raise UserError("--record requires --stepwise: only then does the server see every step of an episode.")
    actor, known = _open(call)
    replaying = _Replaying.asked(actor, keys) if FLAGS.replay else None
    frames = Frames() if FLAGS.show_frames else None
    pages = Pages(frames, token)
    contract = Contract(
        actor,
        modes=[mode.strip() for mode in (FLAGS.modes or "").split(",") if mode.strip()],
        execute=FLAGS.execute or min(EXECUTE, actor.horizon),
        stepwise=FLAGS.stepwise,
        keys=keys,
        resize=FLAGS.resize is not None,
        known=known,
        prompts=_prompts(actor),
    )
    recording = _recording(actor)
    recorders = [each for each in (frames, recording) if each]
    server = Server(
        contract,
        Engine(actor, seed=FLAGS.seed),
        host=FLAGS.host,
        port=FLAGS.port,
        token=token,
        tls=certificate,
        deadline=FLAGS.batch_ms / 1000,
        most=FLAGS.connections,
        drain_seconds=FLAGS.drain_seconds,
        recorder=Together(recorders) if recorders else None,
        pages=pages,
    )
    pages.of(server)
    server.warm("warming up")
    if replaying:
        replaying.run(server, token, certificate is not None)
        return
    try:
        asyncio.run(_serve(server))
    finally:
        if recording:
            recording.close()
    print(server.status.summary(), flush=True)
    if recording:
        print(f"{recording.directory}: {recording.episodes} episodes", flush=True)


async def _serve(server: Server) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.drain)
    await server.run(lambda: print(_addresses(server), flush=True))


def _addresses(server: Server) -> str:
    pages = server.address.replace("ws", "http", 1)
    served = f"serving {', '.join(server.contract.modes)} at {server.address}"
    return f"{served} (page {pages}/, health {pages}/healthz, metrics {pages}/metrics)"


def _open(call: cli.Call) -> tuple[Actor, set[str]]:
    """The model that acts, and the keys of its data, as far as they are known."""
    export = cli.export_folder()
    if (FLAGS.workdir is None) == (export is None):
        raise UserError("--workdir or --export is required, one of them.")
    backend: Backend
    if export:
        refused = [f"--{name}" for name in ("step", "parameters") if FLAGS[name].value is not None]
        if refused := refused + [f"--config.{name}" for name, _ in call.overrides]:
            raise UserError(f"{', '.join(refused)}: an export runs as it was written. Leave this out, or export again.")
        backend, known = TorchBackend(export, FLAGS.device), None
    else:
        run = cli.required_run()
        system, params, frozen, step = inference.load_for_inference(run, FLAGS.step, call.overrides, FLAGS.parameters)
        used = inference.parameters_used(run, step, FLAGS.parameters)["parameters"]
        backend = JaxBackend(system, system.held(params), frozen, step=step, parameters=used)
        known = inference.data_keys(run, step)
    sizes = sizes_up_to(FLAGS.batch_size)
    actor = Actor(backend, source=FLAGS.source, sizes=sizes)
    if FLAGS.limits:
        limits = parse_limits(FLAGS.limits, actor.width)
        actor = Actor(backend, source=FLAGS.source, limits=limits, sizes=sizes)
    return actor, known or set()


def _prompts(actor: Actor) -> Callable[[str], np.ndarray] | None:
    """What embeds prompts: the encoder that was asked for, or the tables of the datasets."""
    data = actor.backend.config.data
    asked = cli.optional_path("text_table")
    if FLAGS.text_encoder and asked:
        raise UserError("--text_encoder and --text_table: expected one of them.")
    places = {source.path or data.path for source in data.sources.values()} or {data.path}
    datasets = (
        [find_dataset(asked, "--text_table")] if asked else [Path(dataset_dir(place)) for place in sorted(places)]
    )
    if not asked and not data.text_table:
        datasets = []
    return open_prompts(
        actor.backend.spec,
        encoder=FLAGS.text_encoder,
        datasets=datasets,
        table=data.text_table or "clip",
        asked=asked is not None,
    )


def _recording(actor: Actor) -> Recording | None:
    place, backend = cli.optional_path("record"), actor.backend
    if place is None:
        return None
    served = f"{backend.system}, step {backend.step}, {backend.parameters}"
    return Recording(place, backend.spec, backend.spec.robot(FLAGS.source), width=actor.width, served=served)


class _Replaying(NamedTuple):
    """What `--replay` asked for: the episode, and the file of the page."""

    episode: RecordedEpisode
    page: Path

    @classmethod
    def asked(cls, actor: Actor, keys: Mapping[str, str]) -> _Replaying:
        run = Path(FLAGS.workdir or "")
        page = cli.optional_path("replay_page") or (run if run.is_dir() else Path()) / "replay.html"
        check_output_file(page, "--replay_page")
        return cls(RecordedEpisode(FLAGS.replay, actor, source=FLAGS.source, keys=keys), page)

    def run(self, server: Server, token: str, encrypted: bool) -> None:
        """Sends the episode through a warm server, and writes the page.

        Raises:
          RunError: something looks wrong.
        """
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if encrypted else None
        if own:  # this process's own certificate, which may be of another name
            own.check_hostname, own.verify_mode = False, ssl.CERT_NONE
        with in_thread(server) as address:
            found = replay.run(address, self.episode, token=token, tls=own)
        self.episode.close()
        write_text(self.page, replay_page(found))
        print("\n".join(found.lines()), flush=True)
        print(f"wrote {self.page}", flush=True)
        if wrong := found.looks_wrong:
            what = "; ".join(wrong)
            raise RunError(f"--replay={FLAGS.replay}: {what}. Do not let a robot move before this is mended.")


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
