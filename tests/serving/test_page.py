"""The server's page in a real browser, against a live server; and what it asks for, plainly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.small_model import make_contract, make_server, observation
from uwm_jax.errors import UserError
from uwm_jax.serving.connections import in_thread
from uwm_jax.serving.page import PAGE, Frames, Pages
from uwm_jax.serving.uwm_client import Client, ClientError

TOKEN = "a-token"


@contextlib.contextmanager
def running(*, show: bool = False, token: str = "") -> Iterator[str]:
    """The address of a server that was asked five times, once wrongly."""
    frames = Frames() if show else None
    pages = Pages(frames, token)
    server = make_server(make_contract(), token=token, pages=pages, recorder=frames)
    pages.of(server)
    with in_thread(server) as address:
        with Client(address, token, wait=10) as client:
            for state in (10.0, 11.0, 12.0, 13.0):
                client.infer(observation(state, pixel=200))
            with pytest.raises(ClientError):
                client.infer({})
            yield address.replace("ws://", "http://")


def get(url: str, token: str = "") -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(url, headers={"Authorization": f"Api-Key {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as e:
        return e.code, e.read(), dict(e.headers)


def test_status_tells_what_is_served_and_counts_requests() -> None:
    with running() as url:
        status, body, headers = get(f"{url}/status.json")
        assert status == 200 and headers["Content-Type"] == "application/json"
        about = json.loads(body)
        assert about["served"]["inputs"]["obs/front"]["shape"] == [2, 4, 5, 3] and about["served"]["acting"] == "policy"
        counts = {name: about["status"][name] for name in ("received", "answered", "refused", "connections")}
        assert counts == {"received": 5, "answered": 4, "refused": 1, "connections": 1}
        assert 0 < about["status"]["latency"]["total_ms"]["p50"] <= about["status"]["latency"]["total_ms"]["p99"]
        assert about["cameras"] == [] and get(f"{url}/frame/front")[0] == 403
        assert get(f"{url}/nothing")[0] == 404


def test_the_page_is_open_and_holds_nothing_and_the_rest_needs_the_token() -> None:
    with running(show=True, token=TOKEN) as url:
        status, body, headers = get(url)
        assert status == 200 and body.decode() == PAGE and TOKEN not in PAGE
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        for path in ("/status.json", "/frame/front"):
            assert get(url + path)[0] == 401 and get(url + path, "another")[0] == 401
        assert json.loads(get(f"{url}/status.json", TOKEN)[1])["cameras"] == ["front"]
        status, body, headers = get(f"{url}/frame/front", TOKEN)
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        frame = np.asarray(Image.open(io.BytesIO(body)))
        assert frame.shape == (4, 5, 3) and np.abs(frame.astype(int) - 200).max() <= 3
        assert get(f"{url}/frame/other", TOKEN)[0] == 404


def test_frames_without_a_token_are_refused() -> None:
    with pytest.raises(UserError, match="--show_frames: frames are shown behind a token alone"):
        Pages(Frames())


class Links(HTMLParser):
    found: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "action", "srcset")]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    parser = Links()
    parser.found = []
    parser.feed(PAGE)
    assert not parser.found and not re.search(r"@import|url\(", PAGE)
    assert set(re.findall(r"https?://[^\"' ]+", PAGE)) == {"http://www.w3.org/2000/svg"}  # the name of SVG's elements


# --- in a browser ---------------------------------------------------------------------------------------------------


def browser() -> str:
    """A browser's command; without one the test is skipped, and fails where $CI is true."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    missing = "no chromium, which this test needs: apt-get install --yes --no-install-recommends chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


def shown(url: str, profile: Path, seconds: float = 2.5, *flags: str) -> str:
    """The page's content as a browser has it after some seconds of its script's time."""
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking", *flags]
    command += [f"--virtual-time-budget={round(1000 * seconds)}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_of(dom: str) -> str:
    dom = re.sub(r"<(script|style|noscript).*?</\1>", "", dom, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", dom).split())


@pytest.mark.slow
def test_a_browser_shows_what_is_served_and_the_latency(tmp_path: Path) -> None:
    with running() as url:
        dom = shown(url, tmp_path)
        latency = json.loads(get(f"{url}/status.json")[1])["status"]["latency"]["total_ms"]
    text = text_of(dom)
    assert "stub, step 7" in text and "running for" in text
    assert "policy (acts), forward" in text and "3 numbers; 16 rows of a chunk, of which 8 are taken" in text
    assert "obs/front (2, 4, 5, 3) uint8 frames oldest first, height, width, RGB" in text
    for count in ("5 received", "4 answered", "1 refused", "0 failed", "0 compiled since the start"):
        assert count in text, text
    shown_ms = re.search(r"([\d.]+) ms, median of a request ([\d.]+) ms, 99th percentile ", text)
    assert shown_ms and float(shown_ms[1]) == pytest.approx(latency["p50"], rel=0.1, abs=0.06)
    assert float(shown_ms[2]) == pytest.approx(latency["p99"], rel=0.1, abs=0.06)
    assert dom.count("<rect") == 4  # a bar for each answer
    assert int(re.search(r'data-polls="(\d+)"', dom)[1]) >= 2, "the page asks again and again"  # type: ignore[index]
    assert "<img" not in dom and 'id="seen" hidden' in dom


@pytest.mark.slow
def test_a_browser_shows_frames_behind_the_token(tmp_path: Path) -> None:
    with running(show=True, token=TOKEN) as url:
        locked = shown(url, tmp_path / "locked")
        opened = shown(f"{url}/#{TOKEN}", tmp_path / "opened")
    assert "locked" in text_of(locked) and "received" not in re.sub(r"<script.*?</script>", "", locked, flags=re.DOTALL)
    assert re.search(r'<img[^>]*src="blob:', opened) and "front" in text_of(opened)
    assert not re.search(r'<form id="login" hidden', locked) and re.search(r'<form id="login" hidden', opened)


@pytest.mark.slow
def test_a_browser_tells_that_the_server_is_gone(tmp_path: Path) -> None:
    with running() as url:
        page = tmp_path / "page.html"
        page.write_text(PAGE.replace('ask("/status.json")', 'ask("http://127.0.0.1:9/status.json")'))
        assert get(url)[0] == 200
    assert "no answer from the server" in text_of(shown(page.as_uri(), tmp_path / "profile"))
