"""What a cache of latents costs, and whether it pays; all of it is computed, from counts and one measured rate."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Costs:
    """A cache next to the run that would use it.

    Attributes:
        frames: that are encoded: steps, times cameras, times variants.
        variants: K.
        record: bytes of a frame in the cache.
        frame_flops: operations that encode a frame.
        rate: frames that are read and encoded in a second, measured.
        samples: of a run: its steps times its batch size.
        sample_frames: frames that a run from pixels encodes for a sample.
        trained: operations of a sample's share of a training step, without those of the codec.
        episodes: that are cached.
        shares: machines like this one that encode a share each.
    """

    frames: int
    variants: int
    record: int
    frame_flops: float
    rate: float
    samples: int
    sample_frames: int
    trained: float
    episodes: int
    shares: int = 1

    @property
    def disk(self) -> int:
        """Bytes."""
        return self.frames * self.record

    @property
    def hours(self) -> float:
        return self.frames / self.rate / 3600

    @property
    def of_frames(self) -> float:
        """Frames of the cache in those that one run from pixels encodes."""
        return self.frames / (self.samples * self.sample_frames)

    @property
    def ratio(self) -> float:
        """Operations of a step from pixels in those of a step from latents."""
        return 1 + self.sample_frames * self.frame_flops / self.trained

    @property
    def of_runs(self) -> float:
        """Operations of caching in those of one run from pixels."""
        run = self.samples * (self.trained + self.sample_frames * self.frame_flops)
        return self.frames * self.frame_flops / run

    @property
    def runs_to_pay(self) -> int:
        """The number of runs one after another from which on caching saves operations."""
        return math.floor(self.of_frames) + 1

    def describe(self) -> str:
        """Lines for people."""
        frames = self.frames // self.variants
        run_hours = self.samples * self.sample_frames / self.rate / 3600
        seconds_a_flop = 1 / (self.rate * self.frame_flops) if self.frame_flops else 0.0
        latent_hours = self.samples * self.trained * seconds_a_flop / 3600
        both = self.of_runs + 1 / self.ratio
        most = min(1.0, 1 / self.of_frames)
        lines = [
            f"what the cache costs, computed from the FLOP counter and the rate of its first batches on this machine, "
            f"{self.rate:.4g} frames/s:",
            f"  disk      {_bytes(self.disk)}: {frames:,} frames x {_variants(self.variants)} x {self.record:,} bytes",
            f"  time      {_time(self.hours)}"
            + (f", {_time(self.hours / self.shares)} of each of {self.shares} shares" if self.shares > 1 else ""),
            f"  in runs   {self.of_frames:.2g} of the frames that one run from pixels encodes ({self.samples:,} "
            f"samples of {self.sample_frames} frames), {self.of_runs:.2g} of its operations",
            f"  a step    has {self.ratio:.1f} times fewer operations from latents; a run from pixels would take "
            f"{_time(run_hours + latent_hours)} here, one from latents {_time(latent_hours)}, if the trained parts "
            "reached the encoder's speed",
            "whether it pays (computed):",
            f"  one run   {'yes' if both < 1 else 'no'}: cache and run together have {both:.2g} of the operations of a "
            "run from pixels",
            f"  a sweep   of members in one program encodes once for all of them, so it pays {_when(self.runs_to_pay)}"
            "; its programs, and runs one after another, count each",
            f"  a subset  pays for one run with at most {int(most * self.episodes):,} of these {self.episodes:,} "
            "episodes (choose them in config.data.sources, and --episodes=used)",
        ]
        return "\n".join(lines)


def _variants(count: int) -> str:
    return "1 variant" if count == 1 else f"{count} variants"


def _when(runs: int) -> str:
    return "from the first program on" if runs == 1 else f"from {runs} programs on"


def _time(hours: float) -> str:
    if hours >= 0.1:
        return f"{hours:,.3g} hours"
    return f"{3600 * hours:,.3g} seconds"


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
