"""Measures how fast training data are read, on data that it makes itself: our layout, RLDS and the official zarr.

    python -m data_prep.benchmark
    python -m data_prep.benchmark --json=loader.json --pss --soak=30
    python -m data_prep.benchmark --bucket --json=bucket.json

The windows are DROID's: 3 cameras at 180x320, 2 current and 2 later frames, 16 actions. Rows of the table, in windows
per second of one core's time:

- `pixels`: the training loader;
- `latents`: the same with cached latents (of random numbers) in place of the later frames, which are not decoded;
- `decode_only`, `decode_only_latents`: their ceilings, the decoding of the same JPEG files alone;
- `whole_episode`: RLDS as TFDS writes it, of which a window takes the record of a whole episode;
- `official_zarr`: the official layout, of which a window takes all 19 frames of all cameras, as the official code reads
  them; `zarr_needed` takes the 4 that are needed.

Each row reads in a process of its own, kept on one core where the system can; all have their turn in every round, and
are compared by medians of rounds. Rates count the CPU time of the process. Files are read from the page cache, where
only a small dataset lies. It also measures the disk that each layout takes, the time to the first batch of a dataset
with a million windows, and how fast `data_prep.reshard` cuts the RLDS.

`--bucket` measures something else: what one core reads from a bucket whose requests take `--delay` seconds, next to
what it reads from the page cache (`data_prep.rates.buckets`).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from data_prep.rates import buckets, loader, loader_data, loader_memory
from data_prep.rates.reshard_speed import mb_per_s_per_core
from uwm_jax import cli, files
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS

BARS = {
    "pixels/of_decode_only": ("at least", 0.5),
    "pixels/of_official_zarr": ("more than", 1.0),
    "latents/of_pixels": ("at least", 1.6),
    "bytes/training_layout_of_rlds": ("at most", 1.05),
    "reshard/mb_per_s_per_core": ("at least", 100.0),
    "million/first_batch_seconds": ("at most", 5.0),
    "pss/index_of_all_of_one": ("less than", 2.0),
    "soak/rss_at_end_of_warm": ("at most", 1.05),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        episodes, steps: of the data, and of each episode.
        rounds: of all rows.
        seconds: of CPU time of a row in a round.
        windows: of the dataset whose first batch is timed.
        pss: whether to measure the memory of the index over processes.
        soak: minutes of loading whose memory is watched; 0 for none.
    """

    episodes: int = 8
    steps: int = 269
    rounds: int = 5
    seconds: float = 2.0
    windows: int = 1_000_000
    pss: bool = False
    soak: float = 0.0


def define_flags() -> None:
    default = Settings()
    flags.DEFINE_string("json", None, "also write the numbers to this file")
    flags.DEFINE_string("directory", None, "where to make the data, which are removed at the end; default the system's")
    flags.DEFINE_integer("episodes", default.episodes, "of the data", lower_bound=2)
    flags.DEFINE_integer("steps", default.steps, "of an episode", lower_bound=2 * loader.SPAN)
    flags.DEFINE_integer("rounds", default.rounds, "in which every row has its turn", lower_bound=1)
    flags.DEFINE_float("seconds", default.seconds, "of CPU time of a row in a round", lower_bound=0.01)
    flags.DEFINE_integer("windows", default.windows, "of the dataset whose first batch is timed", lower_bound=1)
    flags.DEFINE_bool("pss", default.pss, "measure how 16 processes share the memory of the index")
    flags.DEFINE_bool("bucket", False, "measure reading from a bucket, an emulator's on this machine, instead")
    flags.DEFINE_float("delay", 0.05, "with --bucket, seconds that every request waits", lower_bound=0.0)
    flags.DEFINE_float("soak", default.soak, "minutes to load, watching the process's memory; 0 = not", lower_bound=0.0)


def main(call: cli.Call) -> None:
    output = cli.optional_path("json")
    if output:
        files.check_output_file(output, "--json")
    parent = cli.optional_local_path("directory")
    if parent and not parent.is_dir():
        raise UserError(f"--directory={parent}: expected a directory with about 2 GB of room.")
    given: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-", dir=parent) as directory:
        if FLAGS.bucket:
            found, text = _bucket(Path(directory), given)
        else:
            found = benchmark(Path(directory), Settings(**given))
            text = table(found)
    print(text)
    if output:
        files.write_text(output, json.dumps(found, indent=2) + "\n")


def _bucket(directory: Path, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What `--bucket` finds, and its table."""
    sizes = {name: given[name] for name in ("episodes", "steps", "rounds", "seconds")}
    with tqdm(total=4 * sizes["rounds"], desc="measuring", unit="turn") as bar:
        found = buckets.benchmark(directory, **sizes, delay=FLAGS.delay, progress=bar.update)
    return found, buckets.table(found)


def benchmark(directory: Path, settings: Settings) -> dict[str, Any]:
    """Makes the data in an empty directory and measures.

    Returns:
        `windows_per_s_per_core/<row>` medians, `rounds/<row>` all of them, `<row>/of_<row>` medians of quotients of the
        same round, `bytes/<layout>`, `reshard/mb_per_s_per_core`, `million/...`, and where they were asked for
        `pss/...` and `soak/...`.
    """
    made = loader_data.make(directory, settings.episodes, settings.steps)
    sizes = made.bytes()
    loader.make_latents(made)
    turns = settings.rounds * len(loader.ROWS)
    with tqdm(total=turns, desc="measuring", unit="turn") as bar:
        rounds = loader.measure(made, settings.rounds, settings.seconds, bar.update)
    found: dict[str, Any] = {}
    found |= {f"windows_per_s_per_core/{row}": statistics.median(rates) for row, rates in rounds.items()}
    found |= {
        f"{row}/of_{other}": loader.ratio(rounds, row, other)
        for row, other in (
            *(("pixels", "decode_only"), ("pixels", "official_zarr"), ("pixels", "whole_episode")),
            *(("latents", "pixels"), ("latents", "decode_only_latents")),
        )
    }
    found |= {f"rounds/{row}": rates for row, rates in rounds.items()}
    found |= {f"bytes/{layout}": size for layout, size in sizes.items()}
    found["bytes/training_layout_of_rlds"] = sizes["training_layout"] / sizes["rlds"]
    found["bytes/official_zarr_of_rlds"] = sizes["official_zarr"] / sizes["rlds"]
    (directory / "parts").mkdir()
    with loader.one_core():
        found["reshard/mb_per_s_per_core"] = mb_per_s_per_core(made.rlds, directory / "parts")
    large = loader_data.repeated(made.dataset, directory / "large", settings.windows, loader.SPAN)
    cold = loader_memory.first_batch_of_a_process(large)
    found |= {f"million/{name}": value for name, value in cold.items()}
    if settings.pss:
        shared = loader_memory.shared_memory(large)
        found |= {f"pss/{name}": value for name, value in shared.items()}
        found["pss/index_of_all_of_one"] = shared["index_of_all"] / shared["index_of_one"]
    if settings.soak:
        with tqdm(
            total=1.0, desc="soaking", bar_format="{desc}: {percentage:3.0f} % [{elapsed}<{remaining}]{postfix}"
        ) as bar:

            def progress(share: float, batches: int, rss: int) -> None:
                bar.set_postfix(batches=batches, rss=f"{rss / 1e9:.3f} GB")
                bar.update(share - bar.n)

            soaked = loader_memory.soak(made.dataset, settings.soak, progress)
        found |= {f"soak/{name}": value for name, value in soaked.items()}
        found["soak/rss_at_end_of_warm"] = soaked["rss_at_end"] / soaked["rss_after_warm_up"]
    return found


def table(found: dict[str, Any]) -> str:
    """The numbers for people, and the bars that they are held to."""
    rows = [("row", "windows/s per core", "of decode_only")]
    ceiling = found["windows_per_s_per_core/decode_only"]
    for name, rate in found.items():
        prefix, _, row = name.partition("/")
        if prefix == "windows_per_s_per_core":
            rows.append((row, f"{rate:.1f}", f"{rate / ceiling:.2f}"))
    sizes = [("layout", "MB", "of the RLDS")]
    sizes += [
        (layout, f"{found[f'bytes/{layout}'] / 1e6:.1f}", f"{found[f'bytes/{layout}'] / found['bytes/rlds']:.3f}")
        for layout in ("rlds", "training_layout", "official_zarr")
    ]
    bars = [("measured", "", "bar", "")]
    bars += [
        (name, f"{found[name]:.3f}", f"{words} {bar:g}", "met" if is_met(found[name], words, bar) else "MISSED")
        for name, (words, bar) in BARS.items()
        if name in found
    ]
    return "\n\n".join(cli.table(part) for part in (rows, sizes, bars))


def is_met(value: float, words: str, bar: float) -> bool:
    """Whether a number meets a bar of `BARS`."""
    return {"at least": value >= bar, "more than": value > bar, "at most": value <= bar, "less than": value < bar}[
        words
    ]


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
