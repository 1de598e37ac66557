"""Constants of chips, with their sources: the one table that all bounds and estimates of `uwm_jax.plan` read.

Peak operations of products are those of `training.flops`, which takes them from the same pages.

Sources: [TPU] Google Cloud's "TPU architecture" pages of v4, v5e, v5p and v6e; [book] "How to Scale Your Model",
chapter "How to Think About TPUs" (jax-ml.github.io/scaling-book/tpus); [compiler] libtpu 0.0.42, which names the usable
memory when a program does not fit.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip; rates are bytes a second.

    Attributes:
      name: as in names of products, `v5e`.
      kind: of `jax.Device.device_kind`, for `training.flops.peak_flops`.
      cores: of one chip, which jax counts as one device.
      hbm: of the chip's memory [TPU].
      hbm_limit: bytes of it that a program can use [compiler].
      link: of one link of the interconnect, one way [book].
      dcn: of the data-centre network, for each chip: the host's over its chips [book].
      clock: Hz of the cores, by which the compiler's cycles become seconds [book: v5e, v5p; TPU: v4].
      clock_is_guess: nobody has published the clock.
      wraps_at: the least length from which a side of the grid is a ring; for v4 and v5p if all sides are multiples of
        it [TPU].
    """

    name: str
    kind: str
    cores: int
    hbm: float
    hbm_limit: int
    link: float
    dcn: float
    clock: float
    wraps_at: int
    clock_is_guess: bool = False


_GIB = 1 << 30

CHIPS = {
    chip.name: chip
    for chip in (
        # 25 GB/s a host of 4 chips
        Chip("v4", "TPU v4", 2, 1_200e9, int(30.75 * _GIB), 45e9, 25e9 / 4, 1.05e9, 4),
        # 2 x 100 Gb/s for 8 chips
        Chip("v5e", "TPU v5 lite", 1, 819e9, int(15.75 * _GIB), 50e9, 2 * 100e9 / 8 / 8, 1.5e9, 16),
        # 50 Gb/s a chip
        Chip("v5p", "TPU v5", 2, 2_765e9, int(95.73 * _GIB), 100e9, 50e9 / 8, 1.75e9, 4),
        # 4 x 200 Gb/s for 8 chips; with this clock a large product reaches 70 % of the peak, where others reach 90
        Chip("v6e", "TPU v6 lite", 1, 1_638e9, int(31.24 * _GIB), 100e9, 4 * 200e9 / 8 / 8, 1.75e9, 16, True),
    )
}
