"""The page of a policy server at `/`: what is served, its status and its latency, live; frames only where it is asked.

The page itself holds nothing: its script asks for `/status.json` every second, with the token that the reader enters or
that the address's fragment holds (`/#TOKEN`), and `/frame/<camera>` for the newest frames. It loads nothing from
elsewhere.
"""

from __future__ import annotations

import json
import threading
import time
from http import HTTPStatus
from urllib.parse import unquote

import numpy as np

from uwm_jax.data.episodes import encode_jpeg
from uwm_jax.errors import UserError
from uwm_jax.serving.connections import Server
from uwm_jax.serving.contract import Request
from uwm_jax.serving.front import Page

FRAME_SECONDS = 0.5  # between two frames that are encoded for the page
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Frames:
    """The newest frame of each camera as JPEG, of whichever client was answered last.

    Takes in what a recorder does (`connections.Recorder`), and answers from another thread.
    """

    def __init__(self) -> None:
        self._jpegs: dict[str, bytes] = {}
        self._next = 0.0
        self._lock = threading.Lock()

    def step(self, connection: int, request: Request, action: np.ndarray) -> None:
        if time.monotonic() < self._next:
            return
        frames = {k.removeprefix("obs/"): x for k, x in request.inputs.items() if x.dtype == np.uint8 and x.ndim >= 3}
        jpegs = {name: encode_jpeg(np.asarray(x if x.ndim == 3 else x[-1])) for name, x in frames.items()}
        with self._lock:
            self._jpegs |= jpegs
        self._next = time.monotonic() + FRAME_SECONDS

    def end(self, connection: int) -> None:
        """Nothing: the last frame stays."""

    def get(self, camera: str) -> bytes | None:
        with self._lock:
            return self._jpegs.get(camera)


class Pages:
    """Answers plain requests: `/`, `/status.json` and, with `frames`, `/frame/<camera>`.

    Args:
        frames: those to show; None for none.
        token: that the server asks for.
    Raises:
        UserError: frames would be shown without a token.
    """

    def __init__(self, frames: Frames | None = None, token: str = ""):
        if frames is not None and not token:
            raise UserError("--show_frames: frames are shown behind a token alone: --token_file=FILE.")
        self._frames = frames
        self._server: Server | None = None
        self._page = PAGE.encode()

    def of(self, server: Server) -> None:
        """Tells whose status is shown."""
        self._server = server

    def __call__(self, path: str, authorized: bool) -> Page | None:
        """The answer to a GET; None for an unknown path. It does not block."""
        if path == "/":
            return Page(HTTPStatus.OK, "text/html; charset=utf-8", self._page, _HEADERS)
        if path != "/status.json" and not path.startswith("/frame/"):
            return None
        if not authorized:
            return _text(HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key TOKEN")
        if path == "/status.json":
            return self._status()
        if self._frames is None:
            return _text(HTTPStatus.FORBIDDEN, "frames are not shown: start the server with --show_frames")
        frame = self._frames.get(unquote(path.removeprefix("/frame/")))
        if frame is None:
            return _text(HTTPStatus.NOT_FOUND, "no frame of this camera yet")
        return Page(HTTPStatus.OK, "image/jpeg", frame, _HEADERS)

    def _status(self) -> Page:
        if self._server is None:
            return _text(HTTPStatus.SERVICE_UNAVAILABLE, "starting")
        served = self._server.contract.metadata()
        cameras = [key.removeprefix("obs/") for key, like in served["inputs"].items() if like["dtype"] == "uint8"]
        about = {
            "served": served,
            "status": self._server.status.to_json(),
            "cameras": cameras if self._frames else [],
        }
        return Page(HTTPStatus.OK, "application/json", json.dumps(about).encode(), _HEADERS)


def _text(status: HTTPStatus, text: str) -> Page:
    return Page(status, "text/plain; charset=utf-8", f"{text}\n".encode(), _HEADERS)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>policy server</title>
<style>
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #c62828; --mark: #2a6fdb; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 62rem; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; }
h2 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
#state { font-weight: 600; }
#state.good { color: var(--good); }
#state.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span, .note { opacity: .75; font-size: .85rem; }
.tile.warn b { color: var(--bad); }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; opacity: .75; white-space: nowrap; }
svg { width: 100%; height: 7rem; border: 1px solid var(--line); border-radius: 6px; display: block; }
code { font-size: .9em; overflow-wrap: anywhere; }
#frames { display: flex; flex-wrap: wrap; gap: .8rem; }
#frames figure { margin: 0; }
#frames img { max-width: 20rem; min-width: 8rem; image-rendering: pixelated; display: block; border-radius: 6px; }
form { margin: 1rem 0; }
input, button { font: inherit; padding: .25rem .5rem; }
[hidden] { display: none !important; }
</style>
</head>
<body>
<h1 id="title">policy server</h1>
<div><span id="state">connecting</span> <span id="since" class="note"></span></div>
<form id="login" hidden>
  <label>Token <input id="token" type="password" autocomplete="off"></label> <button>Show</button>
  <span id="refused" class="note"></span>
</form>
<div id="content" hidden>
  <h2>Latency</h2>
  <div class="tiles" id="latency"></div>
  <p class="note" id="over"></p>
  <svg id="chart" viewBox="0 0 500 100" preserveAspectRatio="none" role="img" aria-label="ms of the last requests">
  </svg>
  <h2>Requests</h2>
  <div class="tiles" id="counts"></div>
  <div id="seen" hidden><h2>Newest frames</h2><div id="frames"></div></div>
  <h2>What is served</h2>
  <table><tbody id="served"></tbody></table>
  <h2>Inputs of a request</h2>
  <table>
    <thead><tr><th>key</th><th>shape</th><th>dtype</th><th>axes</th></tr></thead>
    <tbody id="inputs"></tbody>
  </table>
</div>
<noscript>This page needs JavaScript; <code>/status.json</code> and <code>/metrics</code> hold the same.</noscript>
<script>
"use strict";
const $ = id => document.getElementById(id);
let token = "", told = "", polls = 0, lastFrame = 0;
try {
  token = sessionStorage.getItem("token") || "";
  if (location.hash.length > 1) {
    token = decodeURIComponent(location.hash.slice(1));
    sessionStorage.setItem("token", token);
    history.replaceState(null, "", location.pathname);
  }
} catch (e) {}
const ask = path => fetch(path, {
  cache: "no-store",
  headers: token ? { Authorization: "Api-Key " + token } : {},
  signal: AbortSignal.timeout(5000),
});
const make = (tag, text, into) => {
  const node = document.createElement(tag);
  node.textContent = text;
  if (into) into.append(node);
  return node;
};
const number = x => x === undefined ? "\\u2013" : x.toFixed(x < 10 ? 2 : x < 100 ? 1 : 0);
const duration = s =>
  s < 120 ? s.toFixed(0) + " s" : s < 7200 ? (s / 60).toFixed(0) + " min" : (s / 3600).toFixed(1) + " h";
function state(text, good) {
  $("state").textContent = text;
  $("state").className = good ? "good" : "bad";
}
function tiles(id, entries) {
  $(id).replaceChildren(...entries.map(([label, value, warn]) => {
    const tile = make("div", "");
    tile.className = warn ? "tile warn" : "tile";
    make("b", value, tile);
    make("span", label, tile);
    return tile;
  }));
}
function chart(ms) {
  const name = "http://www.w3.org/2000/svg", svg = $("chart");
  svg.replaceChildren();
  if (!ms.length) return;
  const most = Math.max(...ms) * 1.1 || 1, width = 500 / 50;
  ms.forEach((value, i) => {
    const bar = document.createElementNS(name, "rect"), height = 100 * value / most;
    for (const [key, x] of Object.entries({
      x: (50 - ms.length + i) * width + 1, y: 100 - height, width: width - 2, height, fill: "var(--mark)",
    })) bar.setAttribute(key, x);
    const title = document.createElementNS(name, "title");
    title.textContent = number(value) + " ms";
    bar.append(title);
    svg.append(bar);
  });
}
function served(about) {
  const said = JSON.stringify(about);
  if (said === told) return;
  told = said;
  $("title").textContent = about.system + ", step " + about.step;
  document.title = $("title").textContent + " \\u2013 policy server";
  const rows = [
    ["system", about.system], ["step", about.step], ["parameters", about.parameters],
    ["modes", about.modes.map(m => m === about.acting ? m + " (acts)" : m).join(", ")],
    ["actions", about.action_dim + " numbers; " + about.action_horizon + " rows of a chunk, of which " + about.execute
      + " are taken"],
    ["frames", about.frames + " (" + about.history.map(n => n ? n + " back" : "now").join(", ") + ")"],
    ["protocol", about.stepwise ? "stepwise: each control step in, one action out" : "stateless requests"],
    ["text", about.text ? "reads text" : "none"],
    ["promised rows", about.promised ? "taken" : "not taken"],
  ];
  const flips = Object.entries(about.flip || {});
  if (flips.length) rows.push(["frames must be turned", flips.map(([camera, how]) => camera + ": " + how).join(", ")]);
  const names = Object.entries(about.keys || {});
  if (names.length) rows.push(["renamed", names.map(([a, b]) => a + " = " + (b || "(dropped)")).join(", ")]);
  if (about.resize) rows.push(["other frame sizes", about.resize]);
  $("served").replaceChildren(...rows.map(([label, value]) => {
    const row = make("tr", "");
    make("th", label, row);
    make("td", value, row);
    return row;
  }));
  $("inputs").replaceChildren(...(about.order || Object.keys(about.inputs)).map(key => {
    const row = make("tr", ""), like = about.inputs[key];
    make("code", key, make("td", "", row));
    make("td", "(" + like.shape.join(", ") + ")", row);
    make("td", like.dtype, row);
    make("td", like.order || "", row);
    return row;
  }));
}
async function frames(cameras) {
  $("seen").hidden = !cameras.length;
  for (const camera of cameras) {
    const answer = await ask("/frame/" + encodeURIComponent(camera));
    if (!answer.ok) continue;
    const id = "frame-" + camera, url = URL.createObjectURL(await answer.blob());
    let image = $(id);
    if (!image) {
      const figure = make("figure", "", $("frames"));
      image = make("img", "", figure);
      image.id = id;
      image.alt = camera;
      make("figcaption", camera, figure).className = "note";
    }
    const old = image.src;
    image.src = url;
    if (old) URL.revokeObjectURL(old);
  }
}
function show({ served: about, status, cameras }) {
  state(status.draining ? "draining" : "running", !status.draining);
  $("since").textContent = "for " + duration(status.uptime_s);
  const { total_ms: total, infer_ms: infer, requests } = status.latency;
  tiles("latency", [
    ["ms, median of a request", number(total.p50)], ["ms, 99th percentile", number(total.p99)],
    ["ms, median of the model", number(infer.p50)], ["ms, 99th percentile of the model", number(infer.p99)],
  ]);
  $("over").textContent = "Of the last " + requests + " answered requests, received to sent; bars: the newest 50.";
  chart(status.last_ms);
  const some = ["received", "answered", "refused", "failed", "gone", "connections"];
  tiles("counts", [
    ...some.map(name => [name, status[name], name === "failed" && status[name] > 0]),
    ["compiled since the start", status.compilations, status.compilations > 0],
  ]);
  served(about);
  $("content").hidden = false;
  document.body.dataset.polls = ++polls;
  return frames(cameras);
}
async function poll() {
  try {
    const answer = await ask("/status.json");
    if (answer.status === 401) {
      $("login").hidden = false;
      $("content").hidden = true;
      $("refused").textContent = token ? "this token is not the server's" : "";
      state("locked", false);
    } else if (answer.ok) {
      $("login").hidden = true;
      await show(await answer.json());
    } else {
      state("HTTP " + answer.status, false);
    }
  } catch (e) {
    state("no answer from the server", false);
  }
  setTimeout(poll, 1000);
}
$("login").addEventListener("submit", event => {
  event.preventDefault();
  token = $("token").value;
  try { sessionStorage.setItem("token", token); } catch (e) {}
});
poll();
</script>
</body>
</html>
"""
