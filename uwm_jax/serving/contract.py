"""Contract between a client and a served model: the fields of requests, their checks, and the metadata.

A request names one use of the model (`mode`; without one, the one that acts) and holds one row of its inputs under the
keys of `uwm_jax.sample`'s files, in raw units. It is checked here, completely, before the model sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from uwm_jax.actor import Actor
from uwm_jax.data.cover import cover
from uwm_jax.data.value_ranges import far_out
from uwm_jax.errors import UserError, closest, suggest
from uwm_jax.serving import messages

Arrays = dict[str, np.ndarray]
Like = tuple[tuple[int, ...], np.dtype[Any]]  # shape and dtype of one row
Prompts = Callable[[str], np.ndarray]  # the (E,) float32 embedding of a sentence; UserError for one that is unknown

TEXT, PROMPT = "obs/text", "prompt"
LATENTS = "next_obs_latent"  # of a codec: stands in for the frames `next_obs/<camera>` that a use is given
# Fields of a request that are no inputs of the model.
FIELDS = ("mode", "promised", "seed", "request_id", "reset", PROMPT)
MOST_SEED = 2**32 - 1
MOST_ID = 128  # characters of a request_id
FRAME_LIMIT = (1080, 1920)  # the largest camera frame with `resize`, where the model's is not larger
FAR = 100.0  # normalised values beyond are refused: the model was trained within about 1
_SLACK = 64 << 10  # bytes of a message for names, shapes, strings and small keys that the model does not read


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
      mode: the use.
      inputs: {key of a sample file: one row of it}: `obs/<camera>` (To, H, W, 3) uint8, `obs/<low-dim key>` (To, D)
        float32, `obs/text` (E,), and what the use is given. A request of one step (`Contract.stepwise`) lacks To.
      noise: {modality: one row}, what the request brings itself.
      promised: (d, Dr) float32, rows of the chunk that the robot will execute whatever the reply says; None for none.
      seed: of the noise; None: it follows the connection's counter.
      request_id: returned with the reply; None for none.
      reset: whether the connection starts over.
      repeated: whether a single frame stands for the whole history.
      prompt: the sentence, where one was sent.
      remarks: lines about values far outside of those that the model was trained on.
    """

    mode: str
    inputs: Arrays
    noise: Arrays = dataclasses.field(default_factory=dict)
    promised: np.ndarray | None = None
    seed: int | None = None
    request_id: int | str | None = None
    reset: bool = False
    repeated: bool = False
    prompt: str | None = None
    remarks: tuple[str, ...] = ()


class Contract:
    """The messages of one served model.

    Args:
      actor: the model; its backend answers the uses.
      modes: the uses that are served; () for all.
      execute: actions of a chunk that are taken before the next is asked for.
      stepwise: whether a connection is an episode, whose history the server keeps.
      keys: {name in requests: name here}; "" drops an entry.
      resize: whether frames of another size are resized to cover the model's.
      prompts: embeds sentences; None: requests bring `obs/text` themselves.
      known: keys of the run's data, without `obs/`, which the model need not read.
    Raises:
      UserError: an unknown mode, a renamed key that does not exist, or `execute` beyond the chunk.
    """

    def __init__(
        self,
        actor: Actor,
        *,
        modes: Sequence[str] = (),
        execute: int = 8,
        stepwise: bool = False,
        keys: Mapping[str, str] | None = None,
        resize: bool = False,
        prompts: Prompts | None = None,
        known: Collection[str] = (),
    ):
        backend = actor.backend
        self.actor, self.stepwise, self.execute, self._prompts = actor, stepwise, execute, prompts
        self.acting = backend.acting
        self.modes = tuple(modes) or ((self.acting,) if stepwise else tuple(backend.uses))
        for mode in self.modes:
            if mode not in backend.uses:
                known = ", ".join(backend.uses)
                raise UserError(f"--modes={mode}: expected some of {known}.{suggest(mode, backend.uses)}")
        if self.acting not in self.modes or stepwise and len(self.modes) > 1:
            rest = "alone with --stepwise" if stepwise else "among the modes"
            raise UserError(f"--modes={','.join(self.modes)}: expected {self.acting}, which acts, {rest}.")
        if not 1 <= execute <= actor.horizon:
            raise UserError(f"--execute={execute}: expected 1 to {actor.horizon}, the rows of a chunk from now on.")
        spec = backend.spec
        self._cameras = {f"obs/{camera}": size for camera, size in spec.cameras.items()}
        self._observed = _row(actor.inputs_like(1))
        self._given = {mode: _row(_given_like(backend, mode)) for mode in self.modes}
        self._noise = {mode: _row(_noise_like(backend, mode)) for mode in self.modes}
        of_frames = [mode for mode in self.modes if any(key.startswith("next_obs/") for key in self._given[mode])]
        # Where following frames are latents of a codec, their noise has the shape of these.
        noise = {mode: self._noise[mode].get("noise/next_obs") for mode in of_frames}
        self._latents = {mode: (shape[0], np.dtype(np.float32)) for mode, shape in noise.items() if shape}
        self._frames = len(spec.window.obs)
        self._resize = resize
        self._known = {*self._observed, *FIELDS, *(f"obs/{key}" for key in known)}
        self._known |= {key for like in (*self._given.values(), *self._noise.values()) for key in like}
        self._known |= {LATENTS} if self._latents else set()
        self._keys = dict(keys or {})
        for name, key in self._keys.items():
            if key and key not in self._known:
                raise UserError(f"--keys={name}={key}: no request has {key}.{suggest(key, self._known)}")

    @property
    def reads_text(self) -> bool:
        """Whether the model is conditioned on a text."""
        return TEXT in self._observed

    @property
    def promises(self) -> bool:
        """Whether a request may carry promised rows."""
        return self.actor.backend.can_promise and not self.stepwise

    @property
    def history(self) -> list[int]:
        """Steps back from the present of each observed frame, oldest first."""
        window = self.actor.backend.spec.window
        return [max(window.obs) - i for i in window.obs]

    def examples(self) -> Iterator[Request]:
        """A request of zeros for each program: of every mode, with latents, and with a promised row."""
        for mode in self.modes:
            inputs = [self._given[mode], *([self._without_frames(mode)] if mode in self._latents else [])]
            for given in inputs:
                like = self._observed | given
                request = Request(mode, {key: np.zeros(shape, dtype) for key, (shape, dtype) in like.items()})
                yield request
            if mode == self.acting and self.promises:
                yield dataclasses.replace(request, promised=np.zeros((1, self.actor.width), np.float32))

    def metadata(self) -> dict[str, Any]:
        """The first frame of a connection."""
        backend = self.actor.backend
        spec = backend.spec
        inputs = {}
        for key, (shape, dtype) in self._observed.items():
            inputs[key] = {"shape": list(shape[1:] if self.stepwise and key != TEXT else shape), "dtype": dtype.name}
            axes = "height, width, RGB" if key in self._cameras else "numbers"
            inputs[key]["order"] = axes if self.stepwise or key == TEXT else f"frames oldest first, {axes}"
        modes = {}
        for mode in self.modes:
            use = backend.uses[mode]
            given = self._given[mode].items()
            about = {key: {"shape": list(shape), "dtype": dtype.name} for key, (shape, dtype) in given}
            modes[mode] = {"makes": list(use.makes), "given": about}
            if mode in self._latents:
                modes[mode]["or"] = {LATENTS: {"shape": list(self._latents[mode][0]), "dtype": "float32"}}
        return {
            "server": "uwm_jax",
            "system": backend.system,
            "step": int(backend.step),
            "parameters": backend.parameters,
            "inputs": inputs,
            "order": list(inputs),
            "frames": self._frames,
            "history": self.history,
            "flip": dict(spec.flip),
            **({"robots": sorted(spec.robots)} if spec.robots else {}),
            "action_horizon": self.actor.horizon,
            "action_dim": self.actor.width,
            "execute": self.execute,
            "modes": list(self.modes),
            "uses": modes,
            "acting": self.acting,
            "stepwise": self.stepwise,
            "text": self.reads_text,
            "promised": self.promises,
            "keys": dict(self._keys),
            "resize": "cover" if self._resize else "",
            "most_bytes": self.limit,
        }

    @property
    def limit(self) -> int:
        """Bytes that a message may have: those of the declared inputs of all modes, low-dim ones as float64. An entry
        that is dropped (`--keys=name=`) may be as long as the longest observation."""
        total, longest = _SLACK, 0
        for key, (shape, dtype) in self._observed.items():
            size = 8 if dtype != np.uint8 else 1
            if self._resize and key in self._cameras:
                height, width = (max(pair) for pair in zip(shape[1:3], FRAME_LIMIT, strict=True))
                shape = (shape[0], height, width, 3)
            total += int(np.prod(shape)) * size
            longest = max(longest, int(np.prod(shape)) * size)
        total += longest * sum(not key for key in self._keys.values())
        extra = {key: like for mode in self.modes for key, like in (self._given[mode] | self._noise[mode]).items()}
        for like in self._latents.values():
            extra[LATENTS] = like
        total += sum(int(np.prod(shape)) * (8 if dtype != np.uint8 else 1) for shape, dtype in extra.values())
        return total + self.actor.horizon * self.actor.width * 8

    def read(self, message: bytes) -> Request:
        """The request of a binary frame.

        Raises:
          UserError: naming the fields that are unknown or missing, or have an unfit shape, dtype or value. It starts
            with the request's id, where that could be read.
        """
        entries = messages.decode(message, self.limit)
        request_id = self._request_id(entries)
        try:
            return self._read(self._renamed(entries), request_id)
        except UserError as e:
            if request_id is None:
                raise
            raise UserError(f"request {request_id}: {e}") from e

    def _read(self, entries: dict[str, messages.Value], request_id: int | str | None) -> Request:
        mode = entries.get("mode", self.acting)
        if not isinstance(mode, str) or mode not in self.modes:
            raise UserError(f"mode: expected one of {', '.join(self.modes)}; found {_about(mode)}.")
        problems = []
        for key in sorted(entries.keys() - self._known):
            close = closest(key, self._known, cutoff=0.8)
            problems.append(f"{key}: unknown" + (f", did you mean {close[0]}" if close else ""))
        reset = entries.get("reset", False)
        if not isinstance(reset, bool | np.bool_):
            problems.append(f"reset: expected true or false, found {_about(reset)}")
        seed = entries.get("seed")
        if seed is not None and not (_whole(seed) and 0 <= int(seed) <= MOST_SEED):  # type: ignore[arg-type]
            problems.append(f"seed: expected an integer from 0 to {MOST_SEED}, found {_about(seed)}")
        repeated = False
        inputs: Arrays = {}
        remarks: list[str] = []
        for key, (shape, dtype) in self._observed.items():
            if key == TEXT:
                continue
            single = shape[1:]
            shapes = [single] if self.stepwise else [single, shape]
            value = self._taken(entries, key, dtype, shapes, problems, remarks)
            if value is None:
                continue
            if not self.stepwise and value.ndim == len(single):
                repeated |= self._frames > 1
                value = np.broadcast_to(value, shape)
            inputs[key] = value
        given = self._without_frames(mode) if LATENTS in entries and mode in self._latents else self._given[mode]
        for key, (shape, dtype) in given.items():
            value = self._taken(entries, key, dtype, [shape], problems, remarks)
            if value is not None:
                inputs[key] = value
        noise: Arrays = {}
        for key, (shape, dtype) in self._noise[mode].items():
            if key in entries and (value := self._taken(entries, key, dtype, [shape], problems, remarks)) is not None:
                noise[key.removeprefix("noise/")] = value
        prompt = self._text(entries, inputs, problems)
        promised = self._promised(entries, mode, problems)
        if problems:
            raise UserError("; ".join(problems) + ".")
        seed_of = None if seed is None else int(seed)  # type: ignore[arg-type]
        how = {"reset": bool(reset), "repeated": repeated, "prompt": prompt, "remarks": tuple(remarks)}
        return Request(mode, inputs, noise, promised, seed_of, request_id, **how)  # type: ignore[arg-type]

    def _without_frames(self, mode: str) -> dict[str, Like]:
        """The inputs of a use besides observations, with latents in place of following frames."""
        given = {key: like for key, like in self._given[mode].items() if not key.startswith("next_obs/")}
        return given | {LATENTS: self._latents[mode]}

    def _renamed(self, entries: Mapping[str, messages.Value]) -> dict[str, messages.Value]:
        renamed: dict[str, messages.Value] = {}
        for name, value in entries.items():
            key = self._keys.get(name, name)
            if key in renamed:
                raise UserError(f"{name}: {key} was sent too, under another name (--keys).")
            if key:
                renamed[key] = value
        return renamed

    def _request_id(self, entries: Mapping[str, messages.Value]) -> int | str | None:
        value = entries.get("request_id")
        if value is None or isinstance(value, str) and len(value) <= MOST_ID:
            return value
        if _whole(value):
            return int(value)  # type: ignore[arg-type]
        raise UserError(f"request_id: expected an integer or a string of at most {MOST_ID} characters.")

    def _taken(
        self,
        entries: Mapping[str, messages.Value],
        key: str,
        dtype: np.dtype[Any],
        shapes: Sequence[tuple[int, ...]],
        problems: list[str],
        remarks: list[str],
    ) -> np.ndarray | None:
        """An input in its dtype, of one of these shapes; None after a line was added to `problems`."""
        picture = dtype == np.uint8
        kind = "uint8" if picture else "numbers"
        expected = f"expected {kind} {' or '.join(map(str, shapes))}"
        if key not in entries:
            problems.append(f"missing {key}: {expected}")
            return None
        found = entries[key]
        if isinstance(found, str) or found is None or picture and not isinstance(found, np.ndarray):
            problems.append(f"{key}: {expected}, found {_about(found)}")
            return None
        value = np.asarray(found)
        if not picture and value.shape == () and (1,) in shapes:
            value = value.reshape(1)
        if picture and value.dtype == np.uint8 and self._resize and value.ndim in map(len, shapes):
            value = self._covered(key, value, problems)
        if picture and value.dtype != np.uint8 or value.shape not in shapes:
            hint = " (--resize=cover takes frames of other sizes)" if picture and not self._resize else ""
            problems.append(f"{key}: {expected}, found {value.dtype} {value.shape}{hint}")
            return None
        if picture:
            return value
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        if not np.isfinite(value).all():
            problems.append(f"{key}: holds values that are not finite in float32")
            return None
        free = key == LATENTS or key.startswith("noise/")
        return value if free or self._in_range(key, value, problems, remarks) else None

    def _in_range(self, key: str, value: np.ndarray, problems: list[str], remarks: list[str]) -> bool:
        """Whether raw values are near those that the model was trained on, at least within `FAR` times."""
        normalizer, name = self.actor.backend.spec.normalizer, key.removeprefix("obs/")
        if name not in normalizer.entries or not (told := far_out(normalizer, name, value)):
            return True
        if np.abs(normalizer.normalize(name, value)).max() > FAR:
            problems.append(told.removesuffix("."))
            return False
        remarks.append(told)
        return True

    def _covered(self, key: str, value: np.ndarray, problems: list[str]) -> np.ndarray:
        """Frames (..., h, w, 3) in the model's size, unless they are too large or have no pixels."""
        *_, height, width, channels = value.shape
        size = self._cameras.get(key)
        if size is None or channels != 3 or (height, width) == size:
            return value
        most = tuple(max(pair) for pair in zip(size, FRAME_LIMIT, strict=True))
        if not (0 < height <= most[0] and 0 < width <= most[1]):
            problems.append(f"{key}: expected frames of at most {most[0]} x {most[1]} pixels, found {value.shape}")
            return value
        frames = [cover(frame, size) for frame in value.reshape(-1, height, width, 3)]
        return np.stack(frames).reshape(*value.shape[:-3], *size, 3)

    def _text(self, entries: Mapping[str, messages.Value], inputs: Arrays, problems: list[str]) -> str | None:
        """Adds `obs/text` to the inputs; the prompt of a request, None for none."""
        prompt = entries.get(PROMPT)
        if prompt is not None and not isinstance(prompt, str):
            problems.append(f"{PROMPT}: expected a string, found {_about(prompt)}")
            return None
        if not self.reads_text:
            return prompt
        shape, dtype = self._observed[TEXT]
        if prompt is not None and TEXT in entries:
            problems.append(f"{PROMPT}: {TEXT} was sent too; send one of them")
        elif prompt is not None and self._prompts is not None:
            try:
                inputs[TEXT] = self._prompts(prompt)
            except UserError as e:
                problems.append(f"{PROMPT}: {str(e).removesuffix('.')}")
        elif prompt is not None:
            problems.append(f"{PROMPT}: this server has no text encoder; send the embedding as {TEXT} {shape}")
        elif TEXT not in entries:
            problems.append(f"missing {PROMPT} or {TEXT}: expected a sentence, or its embedding, numbers {shape}")
        elif (value := self._taken(entries, TEXT, dtype, [shape], problems, [])) is not None:
            inputs[TEXT] = value
        return prompt

    def _promised(self, entries: Mapping[str, messages.Value], mode: str, problems: list[str]) -> np.ndarray | None:
        """The promised rows of a request; None for none."""
        value = entries.get("promised")
        if value is None:
            return None
        horizon, width = self.actor.horizon, self.actor.width
        if mode != self.acting or not self.promises:
            reason = f"only a request of mode {self.acting} has it"
            if not self.promises:
                reason = "this model takes no promised rows"
            if self.stepwise:
                reason = "the server keeps the chunk (--stepwise)"
            problems.append(f"promised: {reason}")
            return None
        fits = isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1] == width
        if not fits or not len(value) < horizon:  # type: ignore[arg-type]
            problems.append(f"promised: expected (d, {width}) with d less than {horizon}, found {_about(value)}")
            return None
        with np.errstate(over="ignore"):
            rows = np.asarray(value, np.float32)
        if not np.isfinite(rows).all():
            problems.append("promised: holds values that are not finite in float32")
        return rows if len(rows) else None


def _row(like: Mapping[str, Any]) -> dict[str, Like]:
    """{key: shape and dtype} of one row."""
    return {key: (tuple(x.shape[1:]), np.dtype(x.dtype)) for key, x in like.items()}


def _given_like(backend: Any, mode: str) -> dict[str, Any]:
    """Shapes of what a use is given besides observations, with a batch axis."""
    given = backend.uses[mode].given
    return {key: x for key, x in backend.spec.batch_like(1).items() if key.partition("/")[0] in given}


def _noise_like(backend: Any, mode: str) -> dict[str, np.ndarray]:
    row = np.zeros(1, np.uint32)
    return {f"noise/{modality}": np.asarray(x) for modality, x in backend.noise(mode, 0, row, row).items()}


def _whole(value: Any) -> bool:
    """Whether a value of a message is an integer."""
    if isinstance(value, np.ndarray):
        return value.shape == () and value.dtype.kind in "iu"
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _about(value: Any) -> str:
    """A value of a message in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return repr(value)[:80] if isinstance(value, str) else f"{type(value).__name__} {value!r}"[:80]
