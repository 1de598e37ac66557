"""Whether buckets lie in the region of a zone: elsewhere, reads are slow and traffic between regions is charged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.gcloud import Gcloud
from uwm_jax.errors import RunError, warn

_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]+)")

# Predefined dual-regions (cloud.google.com/storage/docs/locations, read November 2026).
_DUAL = {
    "ASIA1": ("asia-northeast1", "asia-northeast2"),
    "EUR4": ("europe-north1", "europe-west4"),
    "EUR5": ("europe-west1", "europe-west2"),
    "EUR7": ("europe-west2", "europe-west3"),
    "EUR8": ("europe-west3", "europe-west6"),
    "NAM4": ("us-central1", "us-east1"),
}


def buckets(command: Iterable[str], env: Mapping[str, str]) -> list[str]:
    """The buckets that a command and its environment name, each once."""
    return list(dict.fromkeys(name for text in (*command, *env.values()) for name in _BUCKET.findall(text)))


def check(gcloud: Gcloud, names: Sequence[str], zone: str) -> None:
    """Warns of buckets whose data lie in another region than `zone`, or may; says where that is not known."""
    for name in names:
        try:
            found = gcloud.read("storage", "buckets", "describe", f"gs://{name}", "--raw")
        except RunError as e:
            warn(f"gs://{name}: its region is not known: {e}")
            continue
        if gcloud.dry_run:
            continue
        if found is None:
            warn(f"gs://{name}: there is no such bucket.")
        elif text := _differs(found, zone.rpartition("-")[0]):
            warn(f"gs://{name}: {text}")


def _differs(bucket: Mapping[str, Any], region: str) -> str:
    """Why the data of a bucket may not lie in a region; "" if they do."""
    location = str(bucket.get("location", ""))
    placed = bucket.get("customPlacementConfig", {}).get("dataLocations") or _DUAL.get(location) or [location]
    if region in [place.lower() for place in placed]:
        return ""
    advice = "Make the bucket there, or take a zone of the bucket's region."
    if bucket.get("locationType") == "multi-region":
        return f"{location} is a multi-region, whose data may lie outside of the zone's region {region}. {advice}"
    return (
        f"it lies in {' and '.join(placed).lower()}, the zone in {region}: reads are slow, and traffic between regions "
        f"is charged. {advice}"
    )
