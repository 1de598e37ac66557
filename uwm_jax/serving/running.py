"""Serves a model as the flags of `uwm_jax.serve` say: opens it, warms it, answers until a signal, or replays.

Apart from the command, because it needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from uwm_jax import cli
from uwm_jax.actor import Actor
from uwm_jax.backend import Backend, JaxBackend
from uwm_jax.data.places import dataset_dir, find_dataset
from uwm_jax.data.robot import parse_limits
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.files import Place, as_place, check_output_file, write_text
from uwm_jax.serving import access, replay
from uwm_jax.serving.batching import Engine
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


def serve(call: cli.Call, keys: Mapping[str, str], sizes: Sequence[int]) -> None:
    """Does what the flags ask for; `keys` and `sizes` are those of --keys and --batch_size."""
    token, certificate = access.read_token(cli.optional_local_path("token_file")), _certificate()
    for remark in access.check_address(FLAGS.host, token, certificate is not None):
        warn(remark)
    for name, needed in (("device", "export"), ("replay_page", "replay")):
        if FLAGS[name].present and not FLAGS[needed].value:
            raise UserError(f"--{name} requires --{needed}.")
    if FLAGS.record and FLAGS.replay:
        raise UserError("--record and --replay: expected one of them; what is replayed is no robot's episode.")
    if FLAGS.record and not FLAGS.stepwise:
        raise UserError("--record requires --stepwise: only then does the server see every step of an episode.")
    actor, known = _open(call, sizes)
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


def _open(call: cli.Call, sizes: Sequence[int]) -> tuple[Actor, set[str]]:
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
    datasets = [find_dataset(asked, "--text_table")] if asked else [dataset_dir(place) for place in sorted(places)]
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
    place, backend = cli.optional_local_path("record"), actor.backend
    if place is None:
        return None
    served = f"{backend.system}, step {backend.step}, {backend.parameters}"
    return Recording(place, backend.spec, backend.spec.robot(FLAGS.source), width=actor.width, served=served)


class _Replaying(NamedTuple):
    """What `--replay` asked for: the episode, and the file of the page."""

    episode: RecordedEpisode
    page: Place

    @classmethod
    def asked(cls, actor: Actor, keys: Mapping[str, str]) -> _Replaying:
        run = as_place(FLAGS.workdir or "")
        page = cli.optional_path("replay_page") or (run if run.is_dir() else as_place("")) / "replay.html"
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
    return access.tls(cli.optional_local_path("tls_cert"), cli.optional_local_path("tls_key"))
