"""A contact sheet of a training dataset: a few episodes, every camera, frames evenly spaced in time."""

from __future__ import annotations

import functools
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uwm_jax.data import example
from uwm_jax.data.records import Dataset, short_key

DARK = 16  # a frame whose pixels are all darker counts as black
_TILE_HEIGHT = 128
_LEAST_TILE = 72  # pixels of height; a sheet of many columns is wider than the page instead
_PAGE = 1248  # pixels that a page is wide: a sheet that is wider is scrolled
_LABEL_WIDTH, _STEP_WIDTH = 190, 64  # pixels of a camera's name, and of a step's number
_MARGIN = 4


def contact_sheet(dataset: Dataset, num_episodes: int, num_frames: int) -> tuple[Image.Image | None, list[str]]:
    """Evenly spaced episodes as rows, a strip per camera; evenly spaced frames as columns.

    Returns:
        The sheet, None without a camera; and remarks.
    """
    cameras = sorted(dataset.cameras)
    if not cameras:
        return None, ["no cameras"]
    episodes = spread(dataset.num_episodes, num_episodes)
    font, small = font_of(13), font_of(11)
    aspect = {c: dataset.cameras[c][1] / dataset.cameras[c][0] for c in cameras}
    room = (_PAGE - _LABEL_WIDTH) // num_frames - _MARGIN
    tall = min(_TILE_HEIGHT, max(_LEAST_TILE, int(room / max(aspect.values()))))
    widths = {c: max(1, round(tall * aspect[c])) for c in cameras}
    column = max(_STEP_WIDTH, *widths.values()) + _MARGIN
    line = tall + 18
    block = 24 + len(cameras) * line + 10
    size = (_LABEL_WIDTH + num_frames * column, len(episodes) * block)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    brightest = dict.fromkeys(cameras, 0)
    for row, episode in enumerate(episodes):
        length = int(dataset.episode_lengths[episode])
        steps = spread(length, num_frames)
        frames = {c: np.empty((len(steps), *dataset.cameras[c], 3), np.uint8) for c in cameras}
        dataset.frames(episode, dict.fromkeys(cameras, steps), frames)
        top = row * block
        draw.line([(0, top), (size[0], top)], fill="black", width=2)
        text = ": ".join(filter(None, [f"episode {episode}", f"{length} steps", instruction(dataset, episode)]))
        draw.text((6, top + 4), fitting(text, font, size[0] - 12), "black", font)
        for i, camera in enumerate(cameras):
            y = top + 24 + i * line
            name = textwrap.wrap(printable(short_key(camera)), 23)
            height, width = dataset.cameras[camera]
            draw.multiline_text((6, y + 18), "\n".join([*name, f"{height} x {width}"]), "black", font)
            for j, (step, frame) in enumerate(zip(steps, frames[camera], strict=True)):
                x = _LABEL_WIDTH + j * column
                draw.text((x, y + 1), f"step {step}", "gray", small)
                # Nearest neighbour keeps enlarged pixels sharp.
                tile = Image.fromarray(frame).resize(
                    (widths[camera], tall),
                    Image.Resampling.NEAREST if height < tall else Image.Resampling.LANCZOS,
                )
                sheet.paste(tile, (x, y + 16))
            brightest[camera] = max(brightest[camera], int(frames[camera].max()))
    remarks = [f"camera {c}: black in every frame shown" for c in cameras if brightest[c] < DARK]
    return sheet, remarks


def instructions(dataset: Dataset, episode: int) -> dict[str, str]:
    """The episode's strings whose keys name language or instructions, at its first step, sorted by key."""
    record = dataset.record(episode, 0)
    features = {f"steps/{key}": feature for key, feature in dataset.manifest["step_features"].items()}
    features |= dataset.manifest["episode_features"]
    found = {}
    for name, field in sorted(example.scan(record).items()):
        key = name.decode(errors="replace").removesuffix("/ragged_flat_values")
        text = features.get(key, {}).get("dtype") == "string"
        if field.kind == example.BYTES and text and ("language" in key or "instruction" in key):
            spans = example.bytes_spans(record, field, 1)
            value = record[slice(*spans[0])] if spans else b""
            found[key.removeprefix("steps/")] = value.decode(errors="replace")
    return found


def instruction(dataset: Dataset, episode: int) -> str:
    """The first of the episode's instructions that is not empty; "" without one."""
    return next(filter(None, instructions(dataset, episode).values()), "")


@functools.cache
def _font_file() -> str:
    # Of the fonts that the dependencies bring, this one covers the most scripts.
    from matplotlib.font_manager import findfont

    return findfont("DejaVu Sans")


def font_of(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


def printable(text: str) -> str:
    """The text on one line, with characters that the font lacks escaped as in a Python string."""
    kept = (c if ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return "".join(kept)


def fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`printable` text, cut with an ellipsis to a width in pixels."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def spread(total: int, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, total - 1, min(count, total)).round()})


def note(text: str) -> Image.Image:
    image = Image.new("RGB", (480, 60), "white")
    ImageDraw.Draw(image).text((10, 20), text, "black", font_of(13))
    return image
