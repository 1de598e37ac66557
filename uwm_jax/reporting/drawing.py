"""The parts that pictures are made of: tiles, frames, paths, outlines, files. None of them writes text.

Matplotlib is imported where something is drawn: a training run starts without it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from uwm_jax import files
from uwm_jax.data.spec import DataSpec
from uwm_jax.files import Place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUTH, SAMPLE, CHANGE, TRACK = "#111111", "#d81b60", "#ff8c00", "#d0d0d0"
ERROR_SCALE = 0.5  # a difference from here on is drawn in the brightest colour
DPI = 120
MARGIN = 7  # pixels of a tile around what it shows
BAR = 8  # pixels of the height of a bar


class Plane(NamedTuple):
    """Position of the first two columns of a raw action on the frames of one view."""

    view: int
    low: np.ndarray  # (2,) x, y of the raw frame's left and upper edge
    high: np.ndarray  # (2,) of its right and lower edge
    resize: tuple[int, int]
    crop: tuple[int, int]

    @classmethod
    def of(cls, spec: DataSpec, data: ConfigDict, shown: Sequence[Any] | None) -> Plane | None:
        """From `shown`, what `config.eval.action_plane` may be: (camera, x_low, x_high, y_low, y_high). None where that
        is empty, or a camera that the model does not see."""
        if not shown or shown[0] not in spec.cameras:
            return None
        camera, x_low, x_high, y_low, y_high = shown
        low, high = np.array([x_low, y_low], np.float64), np.array([x_high, y_high], np.float64)
        return cls(sorted(spec.cameras).index(camera), low, high, tuple(data.resize), tuple(data.crop))

    def to_pixels(self, action: np.ndarray) -> np.ndarray:
        """(..., Da) raw to (..., 2) x, y on the frame that the model sees; the first pixel's centre is 0, 0."""
        share = (np.asarray(action, np.float64)[..., :2] - self.low) / (self.high - self.low)
        size, cut = np.array(self.resize[::-1]), np.array(self.crop[::-1])
        return share * size - 0.5 - np.round((size - cut) / 2)


class Tiles:
    """A figure of equal tiles without text, which a page can cut apart: tile (r, c) begins at r and c times its size.

    Args:
        rows, columns: numbers of tiles.
        shape: (height, width) of what is shown in one, any unit; only their ratio counts.
        longer: pixels of the longer side of what is shown.
        left, bottom: pixels of the tile to the left of it and below it, `MARGIN` to the right and above.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        shape: tuple[int, int],
        longer: int = 240,
        left: int = MARGIN,
        bottom: int = MARGIN,
    ):
        import matplotlib
        from matplotlib.figure import Figure

        matplotlib.use("Agg")
        height, width = (round(longer * side / max(shape)) for side in shape)
        self.rows, self.columns = rows, columns
        self._inside, self._left, self._bottom = (height, width), left, bottom
        self.height, self.width = height + MARGIN + bottom, width + MARGIN + left
        # A hair more, since matplotlib cuts off the decimals of width * dpi.
        size = (columns * self.width / DPI + 1e-6, rows * self.height / DPI + 1e-6)
        self.figure = Figure(figsize=size, dpi=DPI)

    def axis(self, row: int, column: int) -> Any:
        """The axes of a tile, as large as what it shows, with a frame and no ticks."""
        height, width = self._inside
        whole_height, whole_width = self.rows * self.height, self.columns * self.width
        left, top = column * self.width + self._left, row * self.height + MARGIN
        box = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
        axis = self.figure.add_axes(box)
        axis.set(xticks=[], yticks=[])
        return axis

    def bar(self, row: int, share: float) -> list[Any]:
        """A line below a row, filled from the left for a share of its length; returns what was drawn."""
        from matplotlib.patches import Rectangle

        whole_height, whole_width = self.rows * self.height, self.columns * self.width
        bottom = 1 - ((row + 1) * self.height - self._bottom / 2 + BAR / 2) / whole_height
        left, full = self._left / whole_width, 1 - (self._left + MARGIN) / whole_width
        parts = [
            Rectangle((left, bottom), full * part, BAR / whole_height, color=color, linewidth=0)
            for part, color in ((1.0, TRACK), (share, SAMPLE))
        ]
        for part in parts:
            self.figure.add_artist(part)
        return parts


def draw_frame(axis: Any, frame: np.ndarray) -> Any:
    """(h, w, 3) in [0, 1], every pixel a square; returns what was drawn."""
    drawn = axis.imshow(np.clip(frame, 0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[], xlim=(-0.5, frame.shape[1] - 0.5), ylim=(frame.shape[0] - 0.5, -0.5))
    return drawn


def draw_error(axis: Any, error: np.ndarray) -> None:
    """(h, w), how far each pixel is from the truth."""
    axis.imshow(error, cmap="magma", vmin=0, vmax=ERROR_SCALE, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def draw_outline(axis: Any, mask: np.ndarray) -> None:
    """A line around the pixels of a mask (h, w), along their edges."""
    from matplotlib.collections import LineCollection

    padded = np.pad(mask, 1)
    y, x = np.nonzero(padded[1:] != padded[:-1])  # the edge below pixel (y - 1, x - 1)
    across = np.stack([np.stack([x - 1.5, x - 0.5], 1), np.stack([y - 0.5, y - 0.5], 1)], 2)
    y, x = np.nonzero(padded[:, 1:] != padded[:, :-1])
    down = np.stack([np.stack([x - 0.5, x - 0.5], 1), np.stack([y - 1.5, y - 0.5], 1)], 2)
    axis.add_collection(LineCollection([*across, *down], colors=CHANGE, linewidths=0.9), autolim=False)


def draw_path(axis: Any, points: np.ndarray, color: str, width: float) -> list[Any]:
    """A path (T, 2) in pixels with a dot at its end, cut off at the frame's edge; returns what was drawn."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=width + 2, foreground="white")]
    return [
        *axis.plot(*points.T, color=color, linewidth=width, path_effects=halo, solid_capstyle="round"),
        *axis.plot(*points[-1], "o", color=color, markersize=3.2 * width, markeredgecolor="white", markeredgewidth=1.2),
    ]


def draw_cross(axis: Any, point: np.ndarray) -> None:
    """A cross at (2,) x, y in pixels."""
    axis.plot(*point, "+", color="white", markersize=13, markeredgewidth=4.5)
    axis.plot(*point, "+", color=SAMPLE, markersize=11, markeredgewidth=2.2)


def draw_traces(
    axis: Any, truth: np.ndarray, sample: np.ndarray, color: str, dims: Sequence[int], styles: Sequence[str]
) -> list[Any]:
    """Some dimensions of normalised actions (T, Da) over time, a line style for each; returns what was drawn."""
    drawn = []
    for dim, style in zip(dims, styles, strict=True):
        drawn += axis.plot(truth[:, dim], style, color=TRUTH, linewidth=2.0)
        drawn += axis.plot(sample[:, dim], style, color=color, linewidth=2.0)
    low, high = truth.min(), truth.max()
    room = 0.5 * max(high - low, 1e-6)
    axis.set(xticks=[], yticks=[], ylim=(low - room, high + room))
    return drawn


def draw_border(axis: Any, color: str, width: float) -> None:
    """The frame around a tile."""
    for spine in axis.spines.values():
        spine.set(visible=True, color=color, linewidth=width)


def save(figure: Figure, path: Place) -> Place:
    """Writes a figure as a PNG, by rename."""
    with files.replacing(path) as temporary:
        figure.savefig(temporary)
    return path


def image_of(figure: Figure) -> Image.Image:
    """A figure as a picture in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def save_gif(frames: Sequence[Image.Image], path: Place, milliseconds: Sequence[int]) -> Place:
    """Writes pictures of one size as a GIF that repeats for ever, each shown for its time; one palette for all."""
    sheet = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (0, i * frame.height))
    palette = sheet.quantize(256, method=Image.Quantize.MEDIANCUT)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with files.replacing(path) as temporary:
        indexed[0].save(
            temporary, save_all=True, append_images=indexed[1:], duration=list(milliseconds), loop=0, optimize=False
        )
    return path
