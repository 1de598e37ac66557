"""Settings that the libraries which reach a bucket themselves (orbax, tensorstore, gcsfs) need to be safe.

They are environment variables, so that child processes inherit them, and cost no import.
"""

from __future__ import annotations

import json
import os
import sys

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
GCSFS_SETTINGS = {"use_listings_cache": False, "requests_timeout": SILENCE_SECONDS}


def prepare() -> None:
    """Sets what is not set yet; called wherever a remote path is first used."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("FSSPEC_GCS", json.dumps(GCSFS_SETTINGS))
    if config := sys.modules.get("fsspec.config"):  # imported before, so the variable comes too late
        for name, setting in GCSFS_SETTINGS.items():
            config.conf.setdefault("gcs", {}).setdefault(name, setting)


def emulator() -> str | None:
    """The URL of an emulator of the service, from `STORAGE_EMULATOR_HOST`; None for the service itself."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    if not host:
        return None
    return host if "://" in host else f"http://{host}"
