"""Settings that the libraries which reach a bucket themselves (orbax, tensorstore, gcsfs) need to be safe."""

from __future__ import annotations

import functools
import json
import logging
import os

CONNECT_SECONDS = 10.0  # to open a connection
SILENCE_SECONDS = 60.0  # without a byte, until a request counts as lost

SETTINGS = {
    "EPATH_USE_TF": "false",  # else epath takes TensorFlow where that is installed
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else seconds of look-ups per file
    # Without these a request that hangs is waited for without end.
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": f"{CONNECT_SECONDS:.0f}",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": f"{SILENCE_SECONDS:.0f}",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "256",
}
# A cached listing hides the objects of other processes, and the new length of those that they replaced.
GCSFS_SETTINGS = {"use_listings_cache": False}


def prepare() -> None:
    """Sets the environment variables that are not set yet; child processes inherit them. Costs no import."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("TENSORSTORE_HTTP_THREADS", str(http_threads(cores)))
    os.environ.setdefault("FSSPEC_GCS", json.dumps(GCSFS_SETTINGS))


def http_threads(cores: int) -> int:
    """tensorstore's threads that receive answers, on a host with so many cores: one for four cores, at most 4, its
    default. Each wakes for every piece of an answer: with 4 of them on one core, a window of 0.66 MB that is read in
    ranges cost 0.25 ms more CPU time, a twelfth of its decoding."""
    return max(1, min(4, cores // 4))


@functools.cache
def prepare_libraries() -> None:
    """Sets what no environment variable can; called when the first remote path is made."""
    try:
        import aiohttp
        import fsspec.config
    except ImportError:  # without the extra `gcs`; what needs it says so
        return
    settings = fsspec.config.conf.setdefault("gcs", {})
    for name, setting in GCSFS_SETTINGS.items():
        settings.setdefault(name, setting)
    if emulator() and "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ:
        settings.setdefault("token", "anon")  # else seconds of looking for a login
    # A number would limit the request as a whole, and gcsfs does not repeat what such a limit ended.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    settings.setdefault("requests_timeout", timeout)
    logger = logging.getLogger("gcsfs")
    if logger.level == logging.NOTSET:  # it prints the traceback of every failure that it also raises
        logger.setLevel(logging.CRITICAL)


def emulator() -> str | None:
    """The URL of an emulator of the service, from `STORAGE_EMULATOR_HOST`; None for the service itself."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    if not host:
        return None
    return host if "://" in host else f"http://{host}"
