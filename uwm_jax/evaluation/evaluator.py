"""All uses of a model on fixed held-out windows: one program over the devices of a mesh, a number per window out.

The trainer and `python -m uwm_jax.evaluate` both use `Evaluator`. A window's noise depends on its number alone, so
that two checkpoints, or two ways of sampling, are compared on the same inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from uwm_jax.data.held_out import FixedWindows
from uwm_jax.data.run_data import RunData
from uwm_jax.data.sources import of_episodes
from uwm_jax.errors import UserError
from uwm_jax.evaluation.metrics import CHANGED, Metrics, Pairs, errors, names_of, pairs_of, summarize
from uwm_jax.files import Place, write_text
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.sharding import Rules
from uwm_jax.systems.base import Encoded, System
from uwm_jax.training.step import compile_for

Arrays = dict[str, jax.Array]
Each = Callable[[Iterator[Any]], Iterator[Any]]
Windows = dict[str, np.ndarray]

AT_A_TIME = 64  # windows in a batch, over all devices, or few more
SHOWN = 8  # windows that come to the host, evenly spread
DENOISED = 3  # of them, whose frames are decoded on their way from noise
MEAN_IMAGE_WINDOWS = 256  # of training episodes, whose next frames are averaged


class Evaluator:
    """Evaluates parameters of a model on the held-out windows of its data.

    All processes of a run make one and call it together; each has all results. `compile` comes first.

    Args:
      system: the model.
      data: for the baselines.
      held_out: the windows.
      mesh, rules: where the batch lies, and the parameters that will be given.
      batch_size: windows in one run of the program, over all devices; `rows_at_a_time` gives a fitting one.
      denoising: whether windows are shown with the states on the way to samples of `traced_use`.

    Raises:
      UserError: `config.eval.action_plane` for actions of one number.
    """

    def __init__(
        self,
        system: System,
        data: RunData,
        held_out: FixedWindows,
        mesh: Mesh,
        rules: Rules,
        batch_size: int,
        *,
        denoising: bool = True,
    ):
        if system.config.eval.action_plane and system.spec.action_dim < 2:
            raise UserError(
                f"config.eval.action_plane={system.config.eval.action_plane} needs actions of at least two numbers, a "
                "position; they have one here. Leave it empty: ()."
            )
        self.held_out = held_out
        self.system, self._data, self._mesh, self._rules = system, data, mesh, rules
        self._batch_size = batch_size
        self._by_rows, self._whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
        self._batches = list(held_out.batches(batch_size))
        self._num_shown = min(SHOWN, len(held_out))
        self._references: Arrays | None = None  # of the training data, made when they are first needed
        self._shown = spread(len(held_out), SHOWN).astype(np.int32)
        self._denoised = spread(self._num_shown, DENOISED)
        plane = system.config.eval.action_plane
        self._view = system.cameras.index(plane[0]) if plane and plane[0] in system.cameras else 0
        self._traced = traced_use(system) if denoising else ""

    def compile(self, params: Any, frozen: Any) -> list[Any]:
        """Compiles the programs and returns them; runs none of them.

        Args:
          params, frozen: arrays, or shapes with shardings, of what will be evaluated.
        """
        system, batch = self.system, self.example()

        def whole(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._whole)

        window, references, programs = system.spec.window, {}, []
        if window.action:
            references["mean_action"] = whole(system.spec.action_dim)
        if window.next_obs and system.cameras:
            references["mean_image"] = whole(len(system.cameras), 1, *system.config.data.crop, 3)
            weight = jax.ShapeDtypeStruct((self._batch_size,), jnp.float32, sharding=self._by_rows)
            self._frame_sum = self.program(make_frame_sum(system), batch, weight)
            programs.append(self._frame_sum)
        inputs = params, frozen, batch, references, whole(self._num_shown, dtype=jnp.int32)
        evaluate = make_evaluation(system, self._traced)
        self._evaluate = self.program(evaluate, *inputs)
        states = jax.eval_shape(evaluate, *inputs)[1].get("denoise/next_obs_latent")
        if states is not None:
            _, steps, views, _, *latent = states.shape
            self._decode = self.program(self._one_view, frozen, whole(steps * len(self._denoised), views, 1, *latent))
            programs.append(self._decode)
        return [self._evaluate, *programs]

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that `run` can measure; `compile` comes first."""
        tree = self._evaluate.out_tree
        scores, _ = jax.tree.unflatten(tree, range(tree.num_leaves))
        return names_of(scores, self._pairs())

    def batches(self) -> Iterator[Arrays]:
        """The windows on the devices, as `FixedWindows.batches` gives them, one batch at a time: during
        training, all may not fit in memory."""
        return (mesh_lib.place(batch, self._by_rows) for batch in self._batches)

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of each of `batches`, with shardings."""
        return mesh_lib.with_sharding(self.held_out.batch_like(self._batch_size), self._by_rows)

    def run(
        self,
        params: Any,
        frozen: Any,
        *,
        progress: bool = False,
        each: Each = iter,
    ) -> tuple[Metrics, Windows]:
        """The metrics over all windows, and a few windows to be shown.

        Args:
          progress: whether to show a progress bar.
          each: gives the batches of an iterator on, one by one; what it raises ends the evaluation.

        Returns:
          {metric: {mean, lo, hi, n, episodes}}, and numpy arrays of N windows for pictures, as far as the data and the
          uses have them: `episode` (N,), `action`, `shuffled_action` (N, Ta, Da) and `last_action` (N, Da) normalised,
          `current`, `next_obs` (N, V, T, h, w, 3) float32 in [0, 1], `mean_image` (V, 1, h, w, 3), `<use>/action` and
          `<use>/next_obs` of what each use makes, `<use>_shuffled/next_obs` of what it makes of another window's
          actions, and if `denoising` the states of `traced_use` from noise to end: `denoise/action` (S + 1, N, Ta, Da),
          and `denoise/next_obs` (S + 1, D, h, w, 3), the last frame of the view `denoise/view` () int of those windows
          that `denoise/windows` (D,) int numbers.

        Raises:
          RunError: a metric is NaN or infinite.
        """
        total = len(self.held_out)
        if self._references is None:
            self._references = self._make_references(each)
        scores, shown = [], []
        with tqdm(total=total, desc="sampling all uses", unit="window", disable=not progress) as bar:
            for number, batch in enumerate(each(self.batches())):
                found, rows = self._evaluate(params, frozen, batch, self._references, self._shown_of(number))
                scores.append(jax.device_get(found))
                if count := int(np.count_nonzero(self._shown // self._batch_size == number)):
                    shown.append({name: np.asarray(x)[:count] for name, x in rows.items()})
                bar.update(min(self._batch_size, total - bar.n))
        return summarize(join(scores, total), self.held_out.episodes, self._pairs()), self._windows(shown, frozen)

    def about(self) -> dict[str, Any]:
        """Provenance of the metrics: {"windows": number, "episodes": of how many, "datasets": {source: identity}},
        and how it samples."""
        return {
            "windows": len(self.held_out),
            "episodes": len(set(self.held_out.episodes.tolist())),
            **({"bad_windows": {str(n): why for n, why in self.held_out.bad.items()}} if self.held_out.bad else {}),
            "datasets": {name: of_episodes(source.identity) for name, source in self._data.sources.items()},
            **self.system.describe_sampling(),
        }

    def run_uses(self, system: System, params: Any, frozen: Any, progress: str = "") -> Metrics:
        """The metrics of the uses alone for another system of the same parameters, such as one with fewer steps.

        Args:
          progress: the progress bar's description; "" shows none.

        Raises:
          RunError: a metric is NaN or infinite.
        """
        with tqdm(total=len(self._batches), desc=progress, unit="batch", disable=not progress) as bar:
            program = self.program(make_scores(system), params, frozen, self.example())
            scores = []
            for batch in self.batches():
                scores.append(jax.device_get(program(params, frozen, batch)))
                bar.update()
        return summarize(join(scores, len(self.held_out)), self.held_out.episodes, self._pairs())

    def _pairs(self) -> Pairs:
        return pairs_of(self.system.uses, self.system.acting)

    def _shown_of(self, number: int) -> jax.Array:
        """The places in a batch of the windows to be shown, filled up with 0."""
        places = self._shown[self._shown // self._batch_size == number] % self._batch_size
        return mesh_lib.place(np.resize(np.append(places, 0), self._num_shown).astype(np.int32), self._whole)

    def _windows(self, shown: list[Any], frozen: Any) -> Windows:
        windows: Windows = {name: np.concatenate([part[name] for part in shown]) for name in shown[0]}
        windows["episode"] = self.held_out.episodes[self._shown]
        if self._references and "mean_image" in self._references:
            windows["mean_image"] = np.asarray(self._references["mean_image"])
        states = {name: windows.pop(name).swapaxes(0, 1) for name in list(windows) if name.startswith("denoise/")}
        if states:
            windows |= {"denoise/windows": self._denoised, "denoise/view": np.asarray(self._view)}
        if "denoise/next_obs_latent" in states:
            latents = states.pop("denoise/next_obs_latent")[:, self._denoised, :, -1:]
            flat = mesh_lib.place(latents.reshape(-1, *latents.shape[2:]), self._whole)
            frames = np.asarray(self._decode(frozen, flat))
            windows["denoise/next_obs"] = frames.reshape(*latents.shape[:2], *frames.shape[1:])
        return windows | states

    def _one_view(self, frozen: Any, latents: jax.Array) -> jax.Array:
        return _clipped(self.system, frozen, {"next_obs_latent": latents})[:, self._view, -1]

    def _make_references(self, each: Each) -> Arrays:
        """Quantities of the training episodes for the baselines: `mean_action` (Da,), `mean_image` (V, 1, h, w, 3), of
        these what the windows have."""
        window, references = self.system.spec.window, {}
        if window.action:
            references["mean_action"] = self._data.mean_action()
        if not window.next_obs or not self.system.cameras:
            return mesh_lib.place(references, self._whole)
        windows = self._data.training_windows(MEAN_IMAGE_WINDOWS)
        total: Any = 0.0
        for number, batch in enumerate(each(windows.batches(self._batch_size))):
            own = number * self._batch_size + np.arange(self._batch_size) < len(windows)  # the last batch starts over
            inputs = mesh_lib.place((batch, own.astype(np.float32)), self._by_rows)
            total = total + np.asarray(self._frame_sum(*inputs), np.float64)
        mean = (total / (len(windows) * len(window.next_obs))).astype(np.float32)[:, None]
        return mesh_lib.place({**references, "mean_image": mean}, self._whole)

    def program(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """A function of arrays, compiled for the mesh of the windows."""
        return compile_for(self._mesh, self._rules, function, *inputs, updates_state=False)


def rows_at_a_time(mesh: Mesh, num_windows: int) -> int:
    """Rows of a batch of `Evaluator` of so many windows: few enough that it takes seconds, a multiple of the shares
    that the mesh cuts it into."""
    shares = math.prod(mesh.shape[axis] for axis in mesh_lib.BATCH_AXES)
    return shares * -(-min(AT_A_TIME, num_windows) // shares)


def join(parts: list[dict[str, np.ndarray]], total: int) -> dict[str, np.ndarray]:
    """(N,) of each metric from its values in batches, the last of which was filled up from the beginning."""
    return {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` evenly spread numbers below `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def write_results(folder: Place, metrics: Metrics, about: Mapping[str, Any]) -> None:
    """Writes `metrics.json`, which `Evaluator.run` returned, to a folder, and its provenance to `about.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(folder / "about.json", json.dumps(about, indent=2) + "\n")


# --- what is compiled ----------------------------------------------------------------------------------


def traced_use(system: System) -> str:
    """The use whose way from noise is shown, the one that makes most; "" where a system does not sample in steps."""
    if not system.describe_sampling():
        return ""
    return max(system.uses, key=lambda use: len(system.uses[use].makes), default="")


def make_evaluation(system: System, traced: str = "") -> Callable[..., tuple[Arrays, Arrays]]:
    """`(params, frozen, batch, references, shown) -> (scores, windows)`.

    Args:
      traced: the use whose states on the way are among the windows; "" for none.

    Args of the function:
      batch: of `FixedWindows`.
      references: `mean_action` (Da,) normalised, `mean_image` (V, 1, h, w, 3), of these what the windows have.
      shown: (K,) int32, rows of the batch.

    It returns what `uwm_jax.evaluation.metrics.summarize` takes, (B,), and of the rows `shown` what `Evaluator.run`
    returns, windows first, with latents in place of the frames of `denoise/next_obs`.
    """

    def evaluate(params: Any, frozen: Any, batch: Arrays, references: Arrays, shown: Any) -> tuple[Arrays, Arrays]:
        encoded, truth = _inputs(system, frozen, batch)
        shuffled = {**encoded, "action": batch["shuffled_action"]} if "shuffled_action" in batch else encoded
        made, states = {}, {}
        for use in system.uses:
            made[use] = _sample(system, params, encoded, use, batch["row"], trace=use == traced)
            if use == traced:
                states, made[use] = made[use], {name: x[-1] for name, x in made[use].items()}
            if "action" in system.uses[use].given:
                made[f"control/{use}_shuffled"] = _sample(system, params, shuffled, use, batch["row"])
        if not latents_alone(system):
            made = _with_frames(system, frozen, made)

        scores = _scores(system, made | _baselines(system, frozen, batch, truth, references), truth)
        for name, probe in system.probes.items():
            scores[name] = probe(params, encoded, shuffled, _noise(system, batch["row"], next(iter(system.uses))))
        if "changed" in truth:
            scores["has_changed"] = _has_changed(truth)
        if "has_last_action" in batch:
            scores["has_last_action"] = batch["has_last_action"]

        windows: Arrays = {name: truth[name] for name in ("action", "current", "next_obs") if name in truth}
        windows |= {name: batch[name] for name in ("last_action", "shuffled_action") if name in batch}
        shown_states = ("action", "next_obs_latent")
        windows |= {f"denoise/{name}": jnp.moveaxis(x, 0, 1) for name, x in states.items() if name in shown_states}
        windows, made = jax.tree.map(lambda x: x[shown], (windows, made))
        if latents_alone(system):
            made = _with_frames(system, frozen, made)
        for name, parts in made.items():
            short = name.removeprefix("control/")
            windows |= {f"{short}/{part}": x for part, x in parts.items() if part in ("action", "next_obs")}
        return scores, windows

    return evaluate


def latents_alone(system: System) -> bool:
    """Whether predicted frames are measured by their latents alone, and decoded only to be shown: that of a run which
    trains from cached latents."""
    return bool(system.config.data.latents)


def make_scores(system: System) -> Callable[..., Arrays]:
    """`(params, frozen, batch) -> scores` of the uses alone, with the noise of `make_evaluation`."""

    def scores(params: Any, frozen: Any, batch: Arrays) -> Arrays:
        encoded, truth = _inputs(system, frozen, batch)
        made = {use: _sample(system, params, encoded, use, batch["row"]) for use in system.uses}
        found = _scores(system, made if latents_alone(system) else _with_frames(system, frozen, made), truth)
        return found | ({"has_changed": _has_changed(truth)} if "changed" in truth else {})

    return scores


def make_frame_sum(system: System) -> Callable[..., jax.Array]:
    """`(batch, weight (B,)) -> (V, h, w, 3)`, the sum of the batch's next frames."""

    def frame_sum(batch: Arrays, weight: jax.Array) -> jax.Array:
        _, following = system.images(batch)
        assert following is not None
        return (following * weight.reshape(-1, 1, 1, 1, 1, 1)).sum(axis=(0, 2))

    return frame_sum


def _inputs(system: System, frozen: Any, batch: Arrays) -> tuple[Encoded, Arrays]:
    """The system's inputs from a batch, and the truth: `action`, `current`, `next_obs`, its latents and `changed`, of
    these what the windows have."""
    encoded = system.encode(frozen, batch)
    truth = {name: encoded[name] for name in ("next_obs_latent",) if name in encoded}
    if "action" in batch:
        truth["action"] = batch["action"]
    if system.cameras:
        truth["current"], following = system.images(batch)
        if following is not None:
            changed = jnp.abs(following - truth["current"][:, :, -1:]) > CHANGED
            truth |= {"next_obs": following, "changed": changed}
    return encoded, truth


def _noise(system: System, rows: jax.Array, use: str) -> Arrays:
    return system.noise(jax.random.key(0), rows, use)


def _sample(
    system: System, params: Any, encoded: Encoded, use: str, rows: jax.Array, *, trace: bool = False
) -> dict[str, jax.Array]:
    return system.sample(params, encoded, use, _noise(system, rows, use), trace=trace)


def _clipped(system: System, frozen: Any, made: Mapping[str, jax.Array]) -> jax.Array:
    """Frames of a sample in [0, 1]."""
    return jnp.clip(system.frames(frozen, made), 0.0, 1.0)


def _with_frames(system: System, frozen: Any, made: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Samples, those of `next_obs` with its frames in [0, 1]."""
    return {
        name: parts | ({"next_obs": _clipped(system, frozen, parts)} if any(map(_is_next_obs, parts)) else {})
        for name, parts in made.items()
    }


def _is_next_obs(name: str) -> bool:
    return name in ("next_obs_latent", "next_obs_float")


def _baselines(
    system: System,
    frozen: Any,
    batch: Arrays,
    truth: Arrays,
    references: Mapping[str, jax.Array],
) -> dict[str, Arrays]:
    """Baselines, which need no model, in the form of samples."""
    found: dict[str, Arrays] = {}
    if "action" in truth:
        last = batch["last_action"][:, None]
        steps = np.asarray(system.spec.window.action, np.float32)
        way = ((steps - steps[0] + 1) / (steps[-1] - steps[0] + 1))[:, None]  # from the step before the chunk on
        found |= {
            "baseline/mean_action": {"action": references["mean_action"]},
            "baseline/last_action": {"action": last},
            "baseline/linear_interpolation": {"action": last + way * (truth["action"][:, -1:] - last)},
        }
    if "next_obs" in truth:
        has_latents = "next_obs_latent" in truth
        frames = {"copied_frame": truth["current"][:, :, -1:], "mean_image": references["mean_image"][None]}
        for name, x in frames.items():
            latents = {"next_obs_latent": system.encode_frames(frozen, x)} if has_latents else {}
            found[f"baseline/{name}"] = {"next_obs": x, **latents}
        if has_latents and not latents_alone(system):
            latent = {"next_obs_latent": truth["next_obs_latent"]}
            found["baseline/codec"] = {"next_obs": _clipped(system, frozen, latent)}
    return found


def _scores(system: System, made: Mapping[str, Arrays], truth: Arrays) -> Arrays:
    if latents_alone(system):
        made = {name: {part: x for part, x in parts.items() if part != "next_obs"} for name, parts in made.items()}
    return {f"{name}/{metric}": x for name, parts in made.items() for metric, x in errors(parts, truth).items()}


def _has_changed(truth: Arrays) -> jax.Array:
    return truth["changed"].reshape(truth["changed"].shape[0], -1).any(axis=1)
