"""All modes of a model on fixed held-out windows: one program over the devices of a mesh, a number per window out.

The trainer and `python -m uwm_jax.evaluate` both use `Evaluator`. A window's noise depends on its number alone, so
that two checkpoints, or two ways of sampling, are compared on the same inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from uwm_jax.data.loader import FixedWindows, Loader
from uwm_jax.errors import UserError
from uwm_jax.evaluation.metrics import CHANGED, Metrics, errors, summarize
from uwm_jax.files import write_text
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.sharding import Rules
from uwm_jax.systems.uwm.modes import MODALITIES, MODES, USES
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.training.step import compile_for

Arrays = dict[str, jax.Array]
Each = Callable[[Iterator[Any]], Iterator[Any]]
Windows = dict[str, np.ndarray]

AT_A_TIME = 64  # windows in a batch, over all devices, or few more
SHOWN = 8  # windows that come to the host, evenly spread
DENOISED = 3  # of them, whose frames are decoded on their way from noise
MEAN_IMAGE_WINDOWS = 256  # of training episodes, whose next frames are averaged

_JOINT = next(mode for mode in MODES if USES[mode].makes == MODALITIES)  # the mode whose denoising is shown


class Evaluator:
    """Evaluates parameters of a model on the held-out windows of its data.

    All processes of a run make one and call it together; each has all results. `compile` comes first.

    Args:
      system: the model.
      loader: of its data, for the baselines.
      held_out: the windows.
      mesh, rules: where the batch lies, and the parameters that will be given.
      batch_size: windows in one run of the program, over all devices; `rows_at_a_time` gives a fitting one.
      denoising: whether windows are shown with the joint mode's states on the way to its samples.

    Raises:
      UserError: `config.eval.action_plane` for actions of one number.
    """

    def __init__(
        self,
        system: UWM,
        loader: Loader,
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
        self._system, self._loader, self._mesh, self._rules = system, loader, mesh, rules
        self._batch_size, self._denoising = batch_size, denoising
        self._by_rows, self._whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
        self._batches = list(held_out.batches(batch_size))
        self._num_shown = min(SHOWN, len(held_out))
        self._references: Arrays | None = None  # of the training data, made when they are first needed
        self._shown = spread(len(held_out), SHOWN).astype(np.int32)
        self._denoised = spread(self._num_shown, DENOISED)
        plane = system.config.eval.action_plane
        self._view = system.cameras.index(plane[0]) if plane and plane[0] in system.cameras else 0

    def compile(self, params: Any, frozen: Any) -> None:
        """Compiles the programs; runs none of them.

        Args:
          params, frozen: arrays, or shapes with shardings, of what will be evaluated.
        """
        system, batch = self._system, self.example()

        def whole(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._whole)

        image = whole(len(system.cameras), 1, *system.config.data.crop, 3)
        references = {"mean_action": whole(system.spec.action_dim), "mean_image": image}
        shown = self._shown_of(0)
        self._evaluate = self._compile(
            make_evaluation(system, self._denoising), params, frozen, batch, references, shown
        )
        if self._denoising:
            states = (system.schedule.num_inference_steps + 1) * len(self._denoised)
            views, _, *latent = system.latent_shape
            self._decode = self._compile(self._one_view, frozen, whole(states, views, 1, *latent))
        weight = jax.ShapeDtypeStruct((self._batch_size,), jnp.float32, sharding=self._by_rows)
        self._frame_sum = self._compile(make_frame_sum(system), batch, weight)

    def batches(self) -> Iterator[Arrays]:
        """The windows on the devices, as `FixedWindows.batches` gives them, one batch at a time: beside a training
        step there may be no room for all."""
        return (mesh_lib.place(batch, self._by_rows) for batch in self._batches)

    def example(self) -> Arrays:
        """The first of `batches`."""
        return next(self.batches())

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
          {metric: {mean, lo, hi, n, episodes}}, and numpy arrays of N windows for pictures: `episode` (N,), `action`,
          `shuffled_action` (N, Ta, Da) and `last_action` (N, Da) normalised, `current`, `next_obs` (N, V, T, h, w, 3)
          float32 in [0, 1], `mean_image` (V, 1, h, w, 3), `<mode>/action` and `<mode>/next_obs` of what each mode
          generates, `forward_shuffled/next_obs`, and if `denoising` the joint mode's samples from noise to end:
          `denoise/action` (S + 1, N, Ta, Da), and `denoise/next_obs` (S + 1, D, h, w, 3), the last frame of the view
          `denoise/view` () int of those windows that `denoise/windows` (D,) int numbers.

        Raises:
          RunError: a metric is NaN or infinite.
        """
        total = len(self.held_out)
        if self._references is None:
            self._references = self._make_references(each)
        scores, shown = [], []
        with tqdm(total=total, desc="sampling all modes", unit="window", disable=not progress) as bar:
            for number, batch in enumerate(each(self.batches())):
                found, rows = self._evaluate(params, frozen, batch, self._references, self._shown_of(number))
                scores.append(jax.device_get(found))
                if count := int(np.count_nonzero(self._shown // self._batch_size == number)):
                    shown.append({name: np.asarray(x)[:count] for name, x in rows.items()})
                bar.update(min(self._batch_size, total - bar.n))
        return summarize(join(scores, total), self.held_out.episodes), self._windows(shown, frozen)

    def about(self) -> dict[str, Any]:
        """Provenance of the metrics: {"windows": number, "episodes": of how many, "datasets": {source: identity}},
        and how it samples."""
        return {
            "windows": len(self.held_out),
            "episodes": len(set(self.held_out.episodes.tolist())),
            "datasets": {name: source.identity for name, source in self._loader.sources.items()},
            **self._system.describe_sampling(),
        }

    def run_modes(self, system: UWM, params: Any, frozen: Any, progress: str = "") -> Metrics:
        """The metrics of the modes alone for another system of the same parameters, such as one with fewer steps.

        Args:
          progress: the progress bar's description; "" shows none.

        Raises:
          RunError: a metric is NaN or infinite.
        """
        with tqdm(total=len(self._batches), desc=progress, unit="batch", disable=not progress) as bar:
            program = self._compile(make_scores(system), params, frozen, self.example())
            scores = []
            for batch in self.batches():
                scores.append(jax.device_get(program(params, frozen, batch)))
                bar.update()
        return summarize(join(scores, len(self.held_out)), self.held_out.episodes)

    def _shown_of(self, number: int) -> jax.Array:
        """The places in a batch of the windows to be shown, filled up with 0."""
        places = self._shown[self._shown // self._batch_size == number] % self._batch_size
        return mesh_lib.place(np.resize(np.append(places, 0), self._num_shown).astype(np.int32), self._whole)

    def _windows(self, shown: list[Any], frozen: Any) -> Windows:
        windows: Windows = {name: np.concatenate([part[name] for part in shown]) for name in shown[0]}
        windows["episode"] = self.held_out.episodes[self._shown]
        assert self._references is not None
        windows["mean_image"] = np.asarray(self._references["mean_image"])
        if not self._denoising:
            return windows
        for name in ("action", "next_obs_latent"):
            windows[f"denoise/{name}"] = windows[f"denoise/{name}"].swapaxes(0, 1)
        latents = windows.pop("denoise/next_obs_latent")[:, self._denoised, :, -1:]
        flat = mesh_lib.place(latents.reshape(-1, *latents.shape[2:]), self._whole)
        frames = np.asarray(self._decode(frozen, flat))
        windows["denoise/next_obs"] = frames.reshape(*latents.shape[:2], *frames.shape[1:])
        windows |= {"denoise/windows": self._denoised, "denoise/view": np.asarray(self._view)}
        return windows

    def _one_view(self, frozen: Any, latents: jax.Array) -> jax.Array:
        return make_decoder(self._system)(frozen, latents)[:, self._view, -1]

    def _make_references(self, each: Each) -> Arrays:
        """Quantities of the training episodes for the baselines: `mean_action` (Da,), `mean_image` (V, 1, h, w, 3)."""
        windows = self._loader.training_windows(MEAN_IMAGE_WINDOWS)
        total: Any = 0.0
        for number, batch in enumerate(each(windows.batches(self._batch_size))):
            own = number * self._batch_size + np.arange(self._batch_size) < len(windows)  # the last batch starts over
            inputs = mesh_lib.place((batch, own.astype(np.float32)), self._by_rows)
            total = total + np.asarray(self._frame_sum(*inputs), np.float64)
        mean = (total / (len(windows) * self._system.num_frames)).astype(np.float32)[:, None]
        return mesh_lib.place({"mean_action": self._loader.mean_action(), "mean_image": mean}, self._whole)

    def _compile(self, function: Callable[..., Any], *inputs: Any) -> Any:
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


def write_results(folder: Path, metrics: Metrics, about: Mapping[str, Any]) -> None:
    """Writes `metrics.json`, which `Evaluator.run` returned, to a folder, and its provenance to `about.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(folder / "about.json", json.dumps(about, indent=2) + "\n")


# --- what is compiled ----------------------------------------------------------------------------------


def make_evaluation(system: UWM, denoising: bool = True) -> Callable[..., tuple[Arrays, Arrays]]:
    """`(params, frozen, batch, references, shown) -> (scores, windows)`.

    Args of the function:
      batch: of `FixedWindows`.
      references: `mean_action` (Da,) normalised, `mean_image` (V, 1, h, w, 3).
      shown: (K,) int32, rows of the batch.

    It returns what `uwm_jax.evaluation.metrics.summarize` takes, (B,), and of the rows `shown` what `Evaluator.run`
    returns, windows first, with latents in place of the frames of `denoise/next_obs`.
    """

    def evaluate(params: Any, frozen: Any, batch: Arrays, references: Arrays, shown: Any) -> tuple[Arrays, Arrays]:
        encoded, truth, noise = _inputs(system, frozen, batch)
        shuffled = {**encoded, "action": batch["shuffled_action"]}
        made = {mode: system.sample(params, encoded, mode, noise) for mode in MODES if mode != _JOINT}
        joint = system.sample(params, encoded, _JOINT, noise, trace=denoising)
        made[_JOINT] = {name: x[-1] for name, x in joint.items()} if denoising else joint
        made["control/forward_shuffled"] = system.sample(params, shuffled, "forward", noise)
        made = _decoded(system, frozen, made)

        scores = _scores(made | _baselines(system, frozen, batch, truth, references), truth)
        scores |= {name: probe(params, encoded, shuffled, noise) for name, probe in system.probes.items()}
        scores["has_changed"] = _has_changed(truth)
        scores["has_last_action"] = batch["has_last_action"]

        windows = {name: truth[name] for name in ("action", "current", "next_obs")}
        windows |= {name: batch[name] for name in ("last_action", "shuffled_action")}
        for name, parts in made.items():
            short = name.removeprefix("control/")
            windows |= {f"{short}/{part}": x for part, x in parts.items() if part != "next_obs_latent"}
        if denoising:
            windows |= {f"denoise/{name}": jnp.moveaxis(x, 0, 1) for name, x in joint.items()}
        return scores, {name: x[shown] for name, x in windows.items()}

    return evaluate


def make_scores(system: UWM) -> Callable[..., Arrays]:
    """`(params, frozen, batch) -> scores` of the modes alone, with the noise of `make_evaluation`."""

    def scores(params: Any, frozen: Any, batch: Arrays) -> Arrays:
        encoded, truth, noise = _inputs(system, frozen, batch)
        made = {mode: system.sample(params, encoded, mode, noise) for mode in MODES}
        return {**_scores(_decoded(system, frozen, made), truth), "has_changed": _has_changed(truth)}

    return scores


def make_frame_sum(system: UWM) -> Callable[..., jax.Array]:
    """`(batch, weight (B,)) -> (V, h, w, 3)`, the sum of the batch's next frames."""

    def frame_sum(batch: Arrays, weight: jax.Array) -> jax.Array:
        _, following = system.images(batch)
        assert following is not None
        return (following * weight.reshape(-1, 1, 1, 1, 1, 1)).sum(axis=(0, 2))

    return frame_sum


def make_decoder(system: UWM) -> Callable[..., jax.Array]:
    """`(frozen, latents (B, V, T, h, w, C)) -> (B, V, T, H, W, 3)`, frames in [0, 1]."""
    return lambda frozen, latents: jnp.clip(system.frames(frozen, {"next_obs_latent": latents}), 0.0, 1.0)


def _inputs(system: UWM, frozen: Any, batch: Arrays) -> tuple[Any, Arrays, Arrays]:
    """What the system takes of a batch, the truth, and the noise of each window."""
    current, following = system.images(batch)
    assert following is not None
    encoded = system.encode(frozen, batch)
    truth = {
        "action": batch["action"],
        "current": current,
        "next_obs": following,
        "next_obs_latent": encoded["next_obs_latent"],
        "changed": jnp.abs(following - current[:, :, -1:]) > CHANGED,
    }
    return encoded, truth, system.noise(jax.random.key(0), batch["row"], _JOINT)


def _decoded(system: UWM, frozen: Any, made: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Samples, with frames in [0, 1] next to latents."""
    decode = make_decoder(system)
    return {
        name: parts | ({"next_obs": decode(frozen, parts["next_obs_latent"])} if "next_obs_latent" in parts else {})
        for name, parts in made.items()
    }


def _baselines(
    system: UWM, frozen: Any, batch: Arrays, truth: Arrays, references: Mapping[str, jax.Array]
) -> dict[str, Arrays]:
    """Baselines, which need no model, in the form of samples."""
    last = batch["last_action"][:, None]
    steps = np.asarray(system.config.data.window.action, np.float32)
    way = ((steps - steps[0] + 1) / (steps[-1] - steps[0] + 1))[:, None]  # from the step before the chunk to its end
    frames = {
        "copied_frame": truth["current"][:, :, -1:],
        "mean_image": references["mean_image"][None],
    }
    return {
        "baseline/mean_action": {"action": references["mean_action"]},
        "baseline/last_action": {"action": last},
        "baseline/linear_interpolation": {"action": last + way * (truth["action"][:, -1:] - last)},
        **{
            f"baseline/{name}": {"next_obs": x, "next_obs_latent": system.encode_frames(frozen, x)}
            for name, x in frames.items()
        },
        "baseline/codec": {"next_obs": make_decoder(system)(frozen, truth["next_obs_latent"])},
    }


def _scores(made: Mapping[str, Arrays], truth: Arrays) -> Arrays:
    return {f"{name}/{metric}": x for name, parts in made.items() for metric, x in errors(parts, truth).items()}


def _has_changed(truth: Arrays) -> jax.Array:
    return truth["changed"].reshape(truth["changed"].shape[0], -1).any(axis=1)
