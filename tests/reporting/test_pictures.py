"""Pictures: where actions lie on frames, against the simulator's own drawing, and files."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from uwm_jax.config import base
from uwm_jax.data.images import preprocess
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.reporting import pictures
from uwm_jax.reporting.drawing import Plane, draw_outline, save_gif
from uwm_jax.reporting.names import formula
from uwm_jax.reporting.page import figure
from uwm_jax.reporting.pictures import draw
from uwm_jax.reporting.sheets import Labels, read_labels, write_labels
from uwm_jax.systems.uwm.modes import MODES, USES


def spec_of(cameras: tuple[str, ...], action_dim: int = 2) -> DataSpec:
    normalizer = Normalizer({"action": (np.full(action_dim, 256, np.float32), np.full(action_dim, 256, np.float32))})
    return DataSpec(
        WindowSpec.from_config(base().data.window),
        {camera: (64, 64) for camera in cameras},
        {},
        action_dim,
        0,
        normalizer,
    )


def config_of(plane: tuple = (), resize: tuple = (64, 64), crop: tuple = (64, 64)):
    c = base()
    c.eval.action_plane, c.data.resize, c.data.crop = plane, resize, crop
    return c


def test_formulas():
    assert {name: formula(use) for name, use in USES.items()} == {
        **{"policy": "p(a | o)", "video": "p(o' | o)", "forward": "p(o' | o, a)"},
        **{"inverse": "p(a | o, o')", "joint": "p(a, o' | o)"},
    }


def test_corners_of_the_plane_are_corners_of_the_frame():
    config = config_of(("wrist", -1.0, 1.0, 10.0, 30.0), resize=(40, 80), crop=(20, 60))
    plane = Plane.of(spec_of(("zenith", "wrist")), config.data, config.eval.action_plane)
    assert plane.view == 0  # views are sorted by name
    corners = plane.to_pixels(np.array([[-1, 10, 7], [1, 30, 7], [0, 20, 7]]))
    # 10 pixels are cut off at each side; the first pixel's centre is 0, its left edge -0.5.
    np.testing.assert_allclose(corners, [[-10.5, -10.5], [69.5, 29.5], [29.5, 9.5]])
    assert Plane.of(spec_of(("wrist",)), config.data, ()) is None
    assert Plane.of(spec_of(("zenith",)), config.data, config.eval.action_plane) is None  # it does not see the plane


@pytest.mark.parametrize(("resize", "crop"), [((64, 64), (64, 64)), ((96, 96), (80, 88))])
def test_an_action_is_drawn_where_the_simulator_shows_that_position(resize, crop):
    pytest.importorskip("gym_pusht")
    from uwm_jax.envs.pusht_simulator import Renderer, make_env

    env = make_env()
    env.reset(seed=3)
    render = Renderer(env, 128)
    shown = ("image", 0.0, 512.0, 0.0, 512.0)
    plane = Plane.of(spec_of(("image",)), config_of(resize=resize, crop=crop).data, shown)
    for position in ((150.0, 230.0), (260.0, 120.0), (90.0, 400.0)):
        env.agent.position = position
        env.space.reindex_shapes_for_body(env.agent)
        frames, _ = preprocess({"image": render()[None, None]}, None, resize=resize, crop=crop)
        frame = np.asarray(frames)[0, 0, 0]
        blue = np.clip(frame[..., 2] - frame[..., 0], 0.2, 1) - 0.2  # the agent alone is that blue
        y, x = np.indices(blue.shape)
        centre = [(x * blue).sum() / blue.sum(), (y * blue).sum() / blue.sum()]
        np.testing.assert_allclose(plane.to_pixels(np.array(position)), centre, atol=0.35)


def windows_of(views: int, action_dim: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n, frames, actions = 3, (views, 2, 16, 16, 3), (4, action_dim)
    windows = {
        "episode": np.array([4, 4, 9]),
        "action": rng.uniform(-1, 1, (n, *actions)),
        "shuffled_action": rng.uniform(-1, 1, (n, *actions)),
        "last_action": rng.uniform(-1, 1, (n, action_dim)),
        "current": rng.uniform(0, 1, (n, *frames)),
        "next_obs": rng.uniform(0, 1, (n, *frames)),
        "mean_image": rng.uniform(0, 1, (views, 1, 16, 16, 3)),
        "forward_shuffled/next_obs": rng.uniform(0, 1, (n, *frames)),
        "denoise/action": rng.normal(size=(4, n, *actions)),
        "denoise/next_obs": rng.uniform(0, 1, (4, n, 16, 16, 3)),
        "denoise/windows": np.arange(n),
        "denoise/view": np.array(0),
    }
    for mode in MODES:
        for modality in USES[mode].makes:
            windows[f"{mode}/{modality}"] = rng.uniform(0, 1, windows[modality].shape)
    return {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in windows.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("cameras", "plane"), [(("image",), ("image", 0.0, 512.0, 0.0, 512.0)), (("a", "b"), ())])
@pytest.mark.filterwarnings("error")  # at an evaluation, warnings are noise
def test_all_pictures_of_one_view_and_of_several(parse, tmp_path, cameras, plane):
    windows = windows_of(len(cameras), 2 if plane else 10)
    files = draw(windows, spec_of(cameras, 2 if plane else 10), config_of(plane), tmp_path)
    assert {path.name for path in files.values()} == {"idea.png", "modes.png", "actions.png", "denoise.gif"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files.values()} | {"pictures.json"}
    for path in files.values():
        with Image.open(path) as image:
            assert min(image.size) > 400 and len(set(image.convert("L").get_flattened_data())) > 20
            assert getattr(image, "n_frames", 1) == (4 if path.suffix == ".gif" else 1)
    del windows["denoise/next_obs"], windows["mean_image"], windows["forward_shuffled/next_obs"]
    (tmp_path / "fewer").mkdir()
    fewer = draw(windows, spec_of(cameras, 2 if plane else 10), config_of(plane), tmp_path / "fewer")
    assert set(fewer) == {"idea", "modes", "actions", "denoise"}
    for path in (*files.values(), *fewer.values()):
        page = parse(figure(path, "about", "caption"))
        labels = read_labels(path)
        alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
        tiles = [text for row in labels.captions or [[""] * len(labels.columns)] * len(labels.rows) for text in row]
        assert len(alts) == (1 if path.suffix == ".gif" else sum(text is not None for text in tiles))
        for text in (*labels.rows, *(part for column in labels.columns for part in column), *filter(None, tiles)):
            assert text in page.text, text
        assert all(mark.text in page.text for mark in labels.key) and len(labels.key) >= 2
        dashes = {attributes.get("stroke-dasharray", "none") for _, attributes in page.tags} - {"none"}
        assert len(dashes) == (2 if not plane and path.stem in ("idea", "denoise") else 0), "a key for dashed lines"


@pytest.mark.parametrize("plane", [("image", 0.0, 512.0, 0.0, 512.0), ()])
def test_no_picture_holds_text_but_the_numbers_of_axes(plane):
    windows, spec, config = windows_of(1, 2), spec_of(("image",), 2), config_of(plane)
    raw = {name: spec.normalizer.unnormalize("action", x) for name, x in windows.items() if name.endswith("action")}
    place = Plane.of(spec, config.data, plane)
    drawn = [
        pictures._idea(windows, raw, place, USES, ("action", "next_obs")),
        pictures._modes(windows, raw, place, ["image"], USES),
        pictures._actions_on_frames(windows, raw, place, USES)
        if place
        else pictures._actions_over_time(windows, raw, USES),
    ]
    for tiles, labels in drawn:
        assert (tiles.rows, tiles.columns) == (len(labels.rows), len(labels.columns))
        texts = [text.get_text() for axis in tiles.figure.axes for text in axis.findobj(Text)]
        assert not [text for text in texts if re.search("[A-Za-z]", text)] and not tiles.figure.legends
        assert not tiles.figure.texts and tiles.figure.get_suptitle() == ""


def test_a_page_cuts_a_picture_into_its_tiles(parse, tmp_path):
    colors = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)], [(250, 250, 0), (0, 250, 250)]]
    Image.fromarray(np.repeat(np.repeat(np.array(colors, np.uint8), 20, 0), 30, 1)).save(tmp_path / "x.png")
    labels = Labels([("a", ""), ("b", "below")], ["1", "2", "3"], [["", "c"], [None, ""], ["", ""]], (), 2.0)
    write_labels(tmp_path, {"x.png": labels})
    page = parse(figure(tmp_path / "x.png", "about", "caption"))
    found = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [a["alt"] for a in found] == ["a: 1", "b: 1: c", "b: 2", "a: 3", "b: 3"]
    assert {(a["width"], a["height"]) for a in found} == {("15", "10")}
    shown = [Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))) for a in found]
    assert [image.getcolors() for image in shown] == [
        [(600, color)] for color in (colors[0][0], colors[0][1], colors[1][1], colors[2][0], colors[2][1])
    ]
    (tmp_path / "pictures.json").unlink()  # a picture of an older version has its text inside
    assert len([tag for tag, _ in parse(figure(tmp_path / "x.png", "about", "")).tags if tag == "img"]) == 1
    (tmp_path / "x.png").write_bytes(b"half")
    assert "cannot be read" in figure(tmp_path / "x.png", "about", "") and not figure(tmp_path / "y.png", "about", "")


def test_crosses_are_where_the_actions_end():
    plane = ("image", 0.0, 512.0, 0.0, 512.0)
    windows, spec, config = windows_of(1, 2), spec_of(("image",), 2), config_of(plane)
    raw = {name: spec.normalizer.unnormalize("action", x) for name, x in windows.items() if name.endswith("action")}
    place = Plane.of(spec, config.data, plane)
    figure = pictures._modes(windows, raw, place, ["image"], USES)[0].figure
    found = [line.get_xydata()[0] for axis in figure.axes for line in axis.lines if line.get_marker() == "+"]
    names = ("action", "shuffled_action", "joint/action")  # forward, control, joint
    expected = [place.to_pixels(raw[name][window, -1]) for window in range(3) for name in names]
    np.testing.assert_allclose(np.array(found)[::2], expected, atol=1e-4)  # each with its halo
    unplaced = pictures._modes(windows, raw, None, ["image"], USES)[0].figure
    assert not [line for axis in unplaced.axes for line in axis.lines if line.get_marker() == "+"]


def test_a_gif_keeps_times_and_colours(tmp_path):
    colors = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    save_gif([Image.new("RGB", (40, 30), color) for color in colors], tmp_path / "x.gif", [100, 200, 3000])
    with Image.open(tmp_path / "x.gif") as gif:
        found = []
        for i in range(gif.n_frames):
            gif.seek(i)
            found.append((gif.convert("RGB").getpixel((5, 5)), gif.info["duration"]))
        assert gif.info["loop"] == 0
    for (color, time), expected, expected_time in zip(found, colors, [100, 200, 3000], strict=True):
        np.testing.assert_allclose(color, expected, atol=8)
        assert time == expected_time


def test_an_outline_follows_the_pixels_edges():
    axis = Figure().subplots()
    mask = np.zeros((5, 6), bool)
    mask[2, 3] = mask[2, 4] = True
    draw_outline(axis, mask)
    found = {tuple(map(tuple, np.sort(segment, axis=0))) for segment in axis.collections[0].get_segments()}
    sides = {((x - 0.5, y), (x + 0.5, y)) for x in (3, 4) for y in (1.5, 2.5)}
    assert found == sides | {((x, 1.5), (x, 2.5)) for x in (2.5, 4.5)}
