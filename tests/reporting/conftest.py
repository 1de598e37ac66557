"""A run's directory as its commands leave it, without running them."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from uwm_jax.config import base, to_json
from uwm_jax.training import provenance

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg=="
)


def _stored(mean: float, half: float = 0.01, n: int = 64) -> dict[str, float]:
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": n, "episodes": 12}


def _make_run(workdir: Path, *, gain: float = 0.05, policy: float = 0.06, seed: int = 0, execute: int = 7) -> Path:
    """A run's directory; `gain`: what the paired differences are."""
    config = base()
    config.seed, config.data.path = seed, "a<b"
    folder, closed = workdir / "eval" / "20", workdir / "rollout" / "20"
    folder.mkdir(parents=True)
    closed.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(config))
    metrics = {
        "policy/action_mse": _stored(policy),
        "forward/pixel_mse": _stored(0.2),
        "forward/changed_mse": _stored(0.2),
        "control/forward_shuffled/pixel_mse": _stored(0.3),
        "control/shuffle_gap": _stored(gain),
        "baseline/mean_action/action_mse": _stored(0.14),
        "baseline/copied_frame/pixel_mse": _stored(0.3),
        "paired/forward_vs_copied_frame/pixel_mse": _stored(0.1),
        "paired/forward_vs_mean_image/pixel_mse": _stored(0.005),
        "paired/policy_vs_mean_action/action_mse": _stored(gain),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    use = provenance.describe_use(
        ["python", "-m", "uwm_jax.evaluate", "--step=20"], config, ["diffusion.num_inference_steps"]
    )
    (folder / "about.json").write_text(json.dumps({"datasets": {"a": "1"}, "own_data": True, **use}))
    few = {"sampler": "trailing", "steps": 2, "seconds_per_sample": 0.0125}
    few["metrics"] = {"policy/action_mse": _stored(policy), "closed_loop/max_coverage": _stored(0.4)}
    few_how = {"windows": 32, "episodes": 7, "ways": 6, **use}
    (folder / "few_steps.json").write_text(json.dumps({"about": few_how, "rows": [few]}))
    for name in ("idea.png", "modes.png", "actions.png"):
        (folder / name).write_bytes(PIXEL)
    episodes = {f"{who}/max_coverage": _stored(0.5) for who in ("policy", "random_uniform", "random_held", "expert")}
    episodes |= {f"paired/policy_vs_{who}/max_coverage": _stored(gain) for who in ("random_uniform", "random_held")}
    (closed / "metrics.json").write_text(json.dumps(episodes))
    how = {"env": "pusht", "execute": execute, "sampler_steps": 4, "episodes": {"policy": [{"seed": 5}, {"seed": 9}]}}
    (closed / "episodes.json").write_text(json.dumps(how))
    lines = [
        {"step": s, "loss/action": 1 / s, "loss/next_obs": 2 / s, "samples_per_second": 100.0, "goodput": 0.75}
        | {"time/step": 30.0 * s, "time/compile": 10.0 * s}
        for s in (1, 20)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = "from uwm_jax.config import base as get_config"
    (file := workdir / "my file.py").write_text(f'"""It pushes a block & wins."""\n{code}\n')
    config.total_steps = 123
    start = provenance.describe(
        ["python", "-m", "uwm_jax.train", "--config=my file.py"], str(file), config, ["total_steps"]
    )
    provenance.add_start(workdir, start)
    return workdir


VOID = ("meta", "img", "br", "path", "rect", "use")


class Page(HTMLParser):
    """A page as a reader of HTML has it; elements that do not close, and the same id twice, are refused.

    Attributes:
        tags: (name, attributes) of every element.
        rows: the text of every cell, {first line of a row's first cell: its other cells}, the first of equal ones.
        text: all of it, without tags and style.
    """

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[str]] = {}
        self.text = ""
        self._open: list[str] = []
        self._cells: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), ids

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self._cells = []
        elif tag in ("td", "th"):
            self._cells.append("")
        elif tag == "br":
            self.handle_data("\n")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self._open and self._open.pop() == tag, (tag, self.getpos())
        if tag == "tr" and self._cells:
            self.rows.setdefault(self._cells[0].split("\n")[0], self._cells[1:])

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if self._cells and self._open[-1:] != ["tr"]:
            self._cells[-1] += data


@pytest.fixture
def parse():
    """A function that reads a page, and refuses one that is no HTML or reaches out of its file."""

    def read(page: str) -> Page:
        found = Page(page)
        for tag, attributes in found.tags:
            assert tag not in ("script", "iframe", "object", "link", "base", "form"), tag
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name in ("src", "href", "xlink:href"):
                    assert value and value.startswith(("data:image/", "#")), (tag, name, value)
        return found

    return read


@pytest.fixture
def stored():
    """A function that makes a metric as files hold it."""
    return _stored


@pytest.fixture
def make_run():
    """A function that makes a run's directory."""
    return _make_run
