"""Freed memory: kept for the next step, and given back where there is no next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from uwm_jax import host_memory, host_tpu

RESIDENT = """
import ctypes
from uwm_jax import host_memory, host_tpu

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
host_memory.keep_freed()
blocks = [library.malloc(2**20) for _ in range(100)]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
for block in blocks[:-1]:  # the last one lies above the rest
    library.free(ctypes.c_void_p(block))
print(resident())
host_memory.give_back()
print(resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.skipif(bool(entry_points(group="jax_plugins") or host_tpu.attached()), reason="there is an accelerator")
def test_what_is_free_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept, after = map(float, done.stdout.split())
    assert kept > 100 and after < kept - 90  # MiB


def test_a_library_that_was_not_told_is_left_alone():
    assert host_memory._kept == []  # this process is no command
    host_memory.give_back()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_less_than_all_of_it():
    assert 0 < host_memory.available() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
