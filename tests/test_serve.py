"""The command in a process of its own, against openpi's own client, hostile messages and SIGTERM under load."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from tests.serving.clients import Client, fetch, wait_until
from tests.systems.small import SIZE, small_config
from uwm_jax import cli, convert, serve, systems
from uwm_jax.benchmarking.serving_load import ServeProcess, at_once, attack
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.serving.messages import encode
from uwm_jax.training import workdir as workdir_lib

INSTALL = "pip install dm-tree && pip install --no-deps openpi-client"


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


@pytest.fixture(scope="module")
def served(workdir: Path) -> Iterator[ServeProcess]:
    with ServeProcess([f"--workdir={workdir}", "--execute=2"]) as started:
        yield started


def compilations(address: str) -> int:
    found = re.search(r"uwm_serve_compilations_total (\d+)", fetch(address, "/metrics")[1])
    assert found
    return int(found[1])


@pytest.mark.slow
def test_eight_of_openpis_clients_at_once(served: ServeProcess) -> None:
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

    together = at_once(8, episode)
    assert all(action.shape == (2,) and action.dtype == np.float32 for actions in together for action in actions)
    for i in (0, 3, 7):
        np.testing.assert_allclose(np.stack(together[i]), np.stack(episode(i)), rtol=1e-5, atol=1e-5 * 256)
    policy = client_module.WebsocketClientPolicy(host, int(port))
    with pytest.raises(RuntimeError, match="obs/image: expected uint8"):
        policy.infer(observation(0) | {"obs/image": np.zeros((3, 3, 3), np.uint8)})
    assert policy.infer(observation(0))["actions"].shape == (4, 2)  # the connection goes on
    assert compilations(served.address) == 0


@pytest.mark.slow
def test_alone_and_among_seven_others_a_request_is_answered_alike(served: ServeProcess) -> None:
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

            among = at_once(count, ask)
            np.testing.assert_allclose(among[0] / 256, alone / 256, atol=1e-5)  # normalised
            for client in clients:
                client.socket.close()
    metrics = fetch(served.address, "/metrics")[1]
    assert any(f'uwm_serve_batches_total{{requests="{size}"}}' in metrics for size in range(2, 9))
    assert compilations(served.address) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_hostile_messages_cost_no_memory_and_change_no_answer(served: ServeProcess) -> None:
    """`python -m uwm_jax.benchmark_serving` measures what they do to the latency."""
    good = Client(served.address)
    before = good.ask_with(observation(5) | {"seed": 3})["actions"]

    attack(served.address, 1000, seed=1)  # allocators and caches have their fill
    memory = served.memory()
    harm = attack(served.address, 10_000)
    assert harm.refused + harm.answered == 10_000 and harm.refused > 8000 and harm.answered > 500
    assert served.memory() <= 1.05 * memory
    assert served.process.poll() is None and fetch(served.address, "/healthz") == (200, "ok\n")
    np.testing.assert_array_equal(good.ask_with(observation(5) | {"seed": 3})["actions"], before)
    assert compilations(served.address) == 0


@pytest.mark.slow
@pytest.mark.torch
def test_an_export_folder_is_served_by_pytorch(served: ServeProcess, workdir: Path, tmp_path: Path) -> None:
    """The same actions as JAX's, with the noise of the same seed."""
    pytest.importorskip("torch")
    export = tmp_path / "export"
    assert (
        cli.call(
            convert.main, ["convert", "to-torch", f"--workdir={workdir}", f"--output={export}/"], convert.define_flags
        )
        == 0
    )
    request = observation(5, frames=2) | {"seed": 3}
    expected = Client(served.address).ask_with(request)["actions"]
    with ServeProcess([f"--export={export}", "--batch_size=2", "--limits=:300"]) as started:
        client = Client(started.address)
        found = client.ask_with(request)["actions"]
        np.testing.assert_allclose(found / 256, np.minimum(expected, 300) / 256, atol=1e-4)
        assert expected.max() > 300
        assert compilations(started.address) == 0
        metrics = fetch(started.address, "/metrics")[1]
        assert f"uwm_serve_cut_total {int((expected > 300).sum())}\n" in metrics
        client.socket.close()
        status, printed = started.end()
        assert status == 0 and printed.count("actions beyond the limits are cut") == 1


@pytest.mark.slow
def test_sigterm_under_load_loses_no_request(workdir: Path) -> None:
    with ServeProcess([f"--workdir={workdir}", "--batch_size=4"]) as started:
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
        wait_until(lambda: sum(answered) > 40, 120)
        status, printed = started.end()
        for thread in threads:
            thread.join(30)
        assert status == 0 and codes == [1001] * 8
        found = re.search(r"(\d+) requests received: (\d+) answered, (\d+) refused, 0 failed, 0 gone", printed)
        assert found, printed
        received, replied, refused = map(int, found.groups())
        pages = started.address.replace("ws", "http")
        assert started.line == (
            f"serving policy at {started.address} (page {pages}/, health {pages}/healthz, metrics {pages}/metrics)\n"
        )
        assert "warming up: 100%" in printed
        assert received == replied + refused and (replied, refused) == (sum(answered), sum(told)) and replied > 20
        assert sum(sent) - received <= 8  # those behind the farewell that was on its way


def run(*argv: str) -> int:
    return cli.call(serve.main, ["serve", *argv], serve.define_flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--export=x"], "--workdir or --export is required, one of them"),
        (["--limits=0"], "--limits=0: expected LOW:HIGH"),
        (["--host=0.0.0.0"], "--host=0.0.0.0: other machines reach this address, so clients need a token"),
        (["--tls_cert=c.pem"], "--tls_cert and --tls_key go together"),
        (["--tls_cert=c.pem", "--tls_key=k.pem"], "no usable certificate and key"),
        (["--keys=a"], "--keys: expected name=key pairs"),
        (["--token_file=/nowhere/token"], "/nowhere/token"),
        (["--modes=video"], "--modes=video: expected some of policy"),
        (["--execute=5"], "--execute=5: expected 1 to 4"),
        (["--stepwise", "--execute=0"], "execute"),
        (["--device=cpu"], "--device requires --export"),
        (["--replay_page=x.html"], "--replay_page requires --replay"),
        (["--stepwise", "--record=x", "--replay=x:0"], "--record and --replay: expected one of them"),
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
