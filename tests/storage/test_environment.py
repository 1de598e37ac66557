"""Settings under which gcsfs and tensorstore survive what a bucket does to them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from uwm_jax import files
from uwm_jax.benchmarking.fault_proxy import fault_proxy
from uwm_jax.files import place
from uwm_jax.storage import environment


def test_settings_are_there_before_a_library_is_imported():
    code = "import sys; from uwm_jax import files; import os; print(*(os.environ[n] for n in sys.argv[1:]))"
    code += "; assert not {'tensorstore', 'fsspec', 'gcsfs', 'aiohttp', 'requests', 'google.auth'} & sys.modules.keys()"
    names = sorted(environment.SETTINGS)
    environ = {name: value for name, value in os.environ.items() if name not in names} | {names[-1]: "7"}
    found = subprocess.run(
        [sys.executable, "-c", code, *names], env=environ, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [environment.SETTINGS[name] for name in names[:-1]] + ["7"]  # what is set stays


@pytest.fixture
def gcsfs_of(monkeypatch):
    """A function that makes a file system of gcsfs with our settings, in which silence counts after 0.3 s."""
    gcsfs = pytest.importorskip("gcsfs")
    import fsspec.config

    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setattr(environment, "SILENCE_SECONDS", 0.3)
    environment.prepare_libraries.__wrapped__()

    def make(environ: dict[str, str]):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return gcsfs.GCSFileSystem(skip_instance_cache=True)

    return make


@pytest.mark.parametrize("fault", ["hang", "truncate"])
def test_gcsfs_repeats_what_hangs_or_is_cut(fault, gcsfs_of, storage_emulator, bucket):
    folder = place(bucket, "--workdir")
    files.write_bytes(folder / "a", b"x" * 1000)
    left = [fault]
    with fault_proxy(storage_emulator.url, faults=lambda *_: left.pop() if left else None) as proxy:
        assert gcsfs_of(proxy.environ).cat_file(str(folder / "a")) == b"x" * 1000
        assert proxy.requests[f"fault {fault}"] == 1


def test_gcsfs_sees_what_another_process_wrote(gcsfs_of, storage_emulator, bucket):
    folder = place(bucket, "--workdir")
    files.write_bytes(folder / "a", b"1")
    found = gcsfs_of(storage_emulator.environ)
    assert [name.rpartition("/")[2] for name in found.ls(str(folder))] == ["a"]
    files.write_bytes(folder / "a", b"longer")
    files.write_bytes(folder / "b", b"2")
    assert [name.rpartition("/")[2] for name in found.ls(str(folder))] == ["a", "b"]
    with found.open(str(folder / "a"), "rb") as file:
        assert file.read() == b"longer"


def test_tensorstore_repeats_what_hangs(storage_emulator, bucket):
    folder = place(bucket, "--workdir")
    files.write_bytes(folder / "a", b"x" * 1000)
    code = "import sys; from uwm_jax import files; import tensorstore as ts; "
    code += "print(len(ts.KvStore.open(sys.argv[1] + '/').result().read('a').result(timeout=30).value))"
    left = ["hang"]
    with fault_proxy(storage_emulator.url, faults=lambda *_: left.pop() if left else None) as proxy:
        environ = os.environ | proxy.environ | {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
        found = subprocess.run(
            [sys.executable, "-c", code, str(folder)], env=environ, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == "1000" and proxy.requests["fault hang"] == 1


def test_few_cores_have_one_thread_that_receives():
    assert [environment.http_threads(cores) for cores in (1, 2, 4, 8, 16, 96)] == [1, 1, 1, 2, 4, 4]
