"""The command in a process of its own, against openpi's own client, hostile messages and SIGTERM under load."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from tests.serving.clients import Client, fetch
from tests.systems.small import SIZE, small_config
from uwm_jax import cli, serve, systems
from uwm_jax.benchmarking import hostile
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.serving.messages import encode
from uwm_jax.training import workdir as workdir_lib

INSTALL = "pip install dm-tree && pip install --no-deps openpi-client"
ROOT = Path(__file__).resolve().parents[1]


def observation(seed: int, frames: int = 0) -> dict[str, np.ndarray]:
    draw, lead = np.random.default_rng(seed), (frames,) if frames else ()
    return {
        "obs/image": draw.integers(0, 256, (*lead, SIZE, SIZE, 3), np.uint8),
        "obs/agent_pos": draw.uniform(100, 400, (*lead, 2)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small diffusion policy that was never trained; its weights are random."""
    config = small_config("dp")
    config.data.cameras, config.data.low_dim = ("image",), ("agent_pos",)
    half = np.full(2, 256, np.float32)
    normalizer = Normalizer({"action": (half, half), "agent_pos": (half, half)})
    window = WindowSpec.from_config(config.data.window)
    spec = DataSpec(window, {"image": (SIZE, SIZE)}, {"agent_pos": 2}, 2, 0, normalizer)
    system = systems.make(config, spec, None)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(x + 0.05 * draw.standard_normal(x.shape), np.float32), system.init(jax.random.key(0))
    )
    directory = tmp_path_factory.mktemp("served") / "run"
    workdir_lib.save_params_only(directory, config, spec, params)
    return directory


class Process:
    """A server in a process of its own; `address` once it accepts clients."""

    def __init__(self, *flags: str):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "uwm_jax.serve", "--port=0", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        found = re.search(r"at (ws://\S+)", line)
        assert found, line + self.process.stderr.read()
        self.address = found[1]

    def end(self) -> tuple[int, str]:
        """Exit status and what it printed at its end, after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out + errors

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def process(*flags: str) -> Iterator[Process]:
    started = Process(*flags)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
        started.process.communicate()


@pytest.fixture(scope="module")
def served(workdir: Path) -> Iterator[Process]:
    with process(f"--workdir={workdir}", "--execute=2") as started:
        yield started


def compilations(address: str) -> int:
    found = re.search(r"uwm_serve_compilations_total (\d+)", fetch(address, "/metrics")[1])
    assert found
    return int(found[1])


def all_at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """The results of `work(0)`, ..., each in a thread."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    gate = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            gate.wait(30)
            results[i] = work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    return results


@pytest.mark.slow
def test_eight_of_openpis_clients_at_once(served: Process) -> None:
    """Unmodified, with its chunk broker: rows of a chunk one by one, the same as those of a client alone."""
    client_module = pytest.importorskip("openpi_client.websocket_client_policy", reason=INSTALL)
    broker_module = pytest.importorskip("openpi_client.action_chunk_broker", reason=INSTALL)
    host, port = served.address.removeprefix("ws://").split(":")

    def episode(i: int) -> list[np.ndarray]:
        policy = client_module.WebsocketClientPolicy(host, int(port))
        metadata = policy.get_server_metadata()
        broker = broker_module.ActionChunkBroker(policy, metadata["execute"])
        seen = [broker.infer(observation(10 * i + step) | {"request_id": f"{i}/{step}"}) for step in range(6)]
        assert [reply["request_id"] for reply in seen] == [f"{i}/{step - step % 2}" for step in range(6)]
        assert all("infer_ms" in reply["server_timing"] for reply in seen)
        return [reply["actions"] for reply in seen]

    together = all_at_once(8, episode)
    assert all(action.shape == (2,) and action.dtype == np.float32 for actions in together for action in actions)
    for i in (0, 3, 7):
        np.testing.assert_allclose(np.stack(together[i]), np.stack(episode(i)), rtol=1e-5, atol=1e-5 * 256)
    policy = client_module.WebsocketClientPolicy(host, int(port))
    with pytest.raises(RuntimeError, match="obs/image: expected uint8"):
        policy.infer(observation(0) | {"obs/image": np.zeros((3, 3, 3), np.uint8)})
    assert policy.infer(observation(0))["actions"].shape == (4, 2)  # the connection goes on
    assert compilations(served.address) == 0


@pytest.mark.slow
def test_alone_and_among_seven_others_a_request_is_answered_alike(served: Process) -> None:
    """Of every batch size and kind, and nothing is compiled for it."""
    rows = np.random.default_rng(1).uniform(100, 400, (1, 2)).astype(np.float32)
    ours = observation(5, frames=2) | {"seed": 3}
    for extra in ({}, {"promised": rows}):
        alone = Client(served.address).ask_with(ours | extra)["actions"]
        assert np.isfinite(alone).all() and np.ptp(alone) > 1  # the random weights do something
        for count in (2, 3, 5, 8):
            clients = [Client(served.address) for _ in range(count)]

            def ask(i: int, clients: list[Client] = clients, extra: Any = extra) -> np.ndarray:
                asked = ours if i == 0 else observation(100 + i)
                return clients[i].ask_with(asked | extra)["actions"]

            among = all_at_once(count, ask)
            np.testing.assert_allclose(among[0] / 256, alone / 256, atol=1e-5)  # normalised
            for client in clients:
                client.socket.close()
    metrics = fetch(served.address, "/metrics")[1]
    assert any(f'uwm_serve_batches_total{{requests="{size}"}}' in metrics for size in range(2, 9))
    assert compilations(served.address) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_hostile_messages_cost_no_memory_and_change_no_answer(served: Process) -> None:
    """`python -m uwm_jax.benchmark_serving` measures what they do to the latency."""
    good = Client(served.address)
    before = good.ask_with(observation(5) | {"seed": 3})["actions"]

    def drive(count: int, seed: int) -> list[int]:
        client = Client(served.address)
        texts = 0
        for message in hostile.messages(client.metadata, count, seed):
            client.socket.send(message)
            reply = client.socket.recv(30)
            texts += isinstance(reply, str)
            assert not isinstance(reply, str) or "Traceback" not in reply
        client.socket.close()
        return [texts, count - texts]

    all_at_once(4, lambda i: drive(200, 1000 + i))  # allocators and caches have their fill
    memory = served.memory()
    counts = np.sum(all_at_once(4, lambda i: drive(2500, i)), axis=0)
    assert counts.sum() == 10_000 and counts[0] > 8000 and counts[1] > 500  # refused, answered
    assert served.memory() <= 1.05 * memory
    assert served.process.poll() is None and fetch(served.address, "/healthz") == (200, "ok\n")
    np.testing.assert_array_equal(good.ask_with(observation(5) | {"seed": 3})["actions"], before)
    assert compilations(served.address) == 0


@pytest.mark.slow
def test_sigterm_under_load_loses_no_request(workdir: Path) -> None:
    with process(f"--workdir={workdir}", "--batch_size=4") as started:
        answered, told, sent, codes = [0] * 8, [0] * 8, [0] * 8, [0] * 8

        def drive(i: int) -> None:
            client, message = Client(started.address), encode(observation(i))
            try:
                while True:
                    client.socket.send(message)
                    sent[i] += 1
                    if isinstance(client.socket.recv(30), bytes):
                        answered[i] += 1
                    else:
                        told[i] += 1
            except ConnectionClosed as e:
                codes[i] = e.rcvd.code if e.rcvd else 0

        threads = [threading.Thread(target=drive, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        status, printed = started.end()
        for thread in threads:
            thread.join(30)
        assert status == 0 and codes == [1001] * 8
        found = re.search(r"(\d+) requests received: (\d+) answered, (\d+) refused, 0 failed, 0 gone", printed)
        assert found, printed
        received, replied, refused = map(int, found.groups())
        assert received == replied + refused and (replied, refused) == (sum(answered), sum(told)) and replied > 20
        assert sum(sent) - received <= 8  # those behind the farewell that was on its way


def run(*argv: str) -> int:
    return cli.call(serve.main, ["serve", *argv], serve.define_flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0: other machines reach this address, so clients need a token"),
        (["--tls_cert=c.pem"], "--tls_cert and --tls_key go together"),
        (["--tls_cert=c.pem", "--tls_key=k.pem"], "no usable certificate and key"),
        (["--keys=a"], "--keys: expected name=key pairs"),
        (["--token_file=/nowhere/token"], "/nowhere/token"),
        (["--modes=video"], "--modes=video: expected some of policy"),
        (["--execute=5"], "--execute=5: expected 1 to 4"),
        (["--stepwise", "--execute=0"], "execute"),
    ],
)
def test_flags_that_do_not_fit(workdir: Path, capsys: Any, flags: list[str], words: str) -> None:
    assert run(f"--workdir={workdir}", "--port=0", *flags) == cli.USAGE_STATUS
    assert words in capsys.readouterr().err


def test_sizes_of_batches() -> None:
    assert [serve.sizes_up_to(size) for size in (1, 2, 3, 8, 12)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4, 8),
        (1, 2, 4, 8, 12),
    ]


def test_names_of_keys() -> None:
    text = "observation/wrist_image_left=obs/wrist_image_left, observation/more="
    assert serve.parse_keys(text) == {"observation/wrist_image_left": "obs/wrist_image_left", "observation/more": ""}
    assert serve.parse_keys("") == {}
    for wrong in ("=a", "a=b,a=c", "a"):
        with pytest.raises(UserError, match="--keys"):
            serve.parse_keys(wrong)
