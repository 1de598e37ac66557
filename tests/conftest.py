"""Set before jax is imported: the CPU, quick compilation, a cache that makes reruns quicker still, and no network."""

from __future__ import annotations

import gc
import os
import secrets
import socket
import sys
import time
from pathlib import Path

import pytest

from tests import quick_compile

_CACHE = Path(__file__).resolve().parents[1] / ".jax_cache"

# Processes that a test starts inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
for name, value in quick_compile.ENVIRON.items():
    if value not in os.environ.get(name, ""):  # the workers of xdist inherit them
        os.environ[name] = f"{os.environ.get(name, '')} {value}".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="module")
def _programs_of_other_files_go():
    """A worker would hold 6 GB of what it has compiled, and each garbage collection would take half a second."""
    yield
    if sys.platform == "linux" and "jax" in sys.modules:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > 3e9:  # to compile everything anew for each file would cost more
            sys.modules["jax"].clear_caches()
            gc.collect()


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """A test that reaches out of this machine fails instead of depending on what it finds there."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network: connect to {address} refused")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(scope="session")
def storage_emulator():
    """One emulator of Google Cloud Storage, to which this process and its children are led from now on."""
    from uwm_jax.benchmarking.emulator import emulator

    with emulator("bkt") as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environ.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def bucket(storage_emulator) -> str:
    """A folder of the emulator's bucket that only this test uses: `gs://bkt/<unique>`."""
    return f"gs://bkt/{secrets.token_hex(6)}"


@pytest.fixture
def optimised():
    """The programs of a test are compiled with the optimisations that a user's have, which `quick_compile` leaves out.

    For tests to which a rounding matters. Processes that the test starts have them too."""
    import jax

    def compile_quickly(on: bool) -> None:
        jax.config.update("jax_disable_most_optimizations", on)
        jax.clear_caches()  # among them programs that were compiled the other way

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        compile_quickly(False)
        yield
    compile_quickly(True)


@pytest.fixture
def ends():
    """A function that waits for a process by its pid and says whether it ended in time."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")

    def wait(pid: int, seconds: float = 30.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):  # the latter between opening and reading
                return True
            if state == "Z":  # it did, and its parent has not looked
                return True
            time.sleep(0.05)
        return False

    return wait


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """Six short DROID-like episodes in the training layout, with a PCA codec for 16-pixel frames."""
    from data_prep.conversion.training_layout import reshard
    from tests.data import rlds_source

    root = tmp_path_factory.mktemp("tiny_dataset")
    rlds_source.make(root / "source", [21, 9, 30, 19, 12, 25])
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, chunk_steps=8, val_ratio=0.3, workers=1)
    return root / "out"


@pytest.fixture(scope="session")
def make_tiny_config(tiny_dataset):
    """A function that makes what `tiny_config` is."""
    return lambda: tiny_config_of(str(tiny_dataset))


@pytest.fixture
def tiny_config(make_tiny_config):
    """A model that compiles in seconds on `tiny_dataset`: one camera, state, 10-d actions, the PCA codec."""
    return make_tiny_config()


def tiny_config_of(dataset: str):
    """What `tiny_config` is, with the path of its dataset."""
    from uwm_jax.config import base

    c = base()
    c.total_steps, c.batch_size, c.log_every = 6, 4, 2
    c.checkpoint.every, c.checkpoint.keep = 2, 2
    c.eval.num_windows = 6
    c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.num_registers = 32, 2, 2, 2
    c.model.timestep_embed_dim, c.model.patch = 16, (2, 2, 2)
    c.model.encoder.stage_sizes, c.model.encoder.width, c.model.encoder.pool = (1,), 16, "flatten"
    c.model.encoder.use_low_dim = True
    c.model.codec.name = "pca"
    c.data.path = dataset
    c.data.cameras, c.data.low_dim = ("wrist",), ("state",)
    c.data.action = (
        ("action_dict/cartesian_velocity", "xyz_euler_to_rot6d"),
        ("action_dict/gripper_position", "identity"),
    )
    c.data.window.action, c.data.window.next_obs = (1, 2, 3, 4), (5, 6)
    c.data.val_ratio = 0.3
    c.data.num_streams, c.data.num_threads = 8, 1
    c.data.resize = c.data.crop = (16, 16)
    c.optimizer.learning_rate, c.optimizer.ema_decay = 1e-3, 0.9
    return c


@pytest.fixture(scope="session")
def count_products():
    """(function, *arguments) -> operations of all matrix products and convolutions that the function traces to.

    Loops count by their length.
    """
    import math

    import jax
    from jax.extend import core

    def visit(jaxpr) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (inputs, _), _ = eqn.params["dimension_numbers"]
                contracted = math.prod(eqn.invars[0].aval.shape[i] for i in inputs)
                total += 2 * eqn.outvars[0].aval.size * contracted
            elif eqn.primitive.name == "conv_general_dilated":
                kernel = eqn.invars[1].aval
                outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
                # Going back through a stride spreads the input over zeros.
                zeros = math.prod(eqn.params["lhs_dilation"])
                total += 2 * eqn.outvars[0].aval.size * kernel.size / outputs / zeros
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            for value in eqn.params.values():
                if isinstance(value, core.ClosedJaxpr):
                    total += times * visit(value.jaxpr)
                elif isinstance(value, core.Jaxpr):
                    total += times * visit(value)
        return total

    return lambda function, *args: visit(jax.make_jaxpr(function)(*args).jaxpr)
