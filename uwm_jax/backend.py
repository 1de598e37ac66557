"""A trained model, whatever runs it: raw inputs in, answers in raw units out, by use.

Keys and units are those of the files of `uwm_jax.sample`. What a program of JAX and one of PyTorch share is said here
once: `Backend`. `JaxBackend` runs a `System`; `torch_bridge.torch_backend` runs an export folder.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.data.spec import DataSpec
from uwm_jax.systems.base import Promised, System, Use

Arrays = dict[str, np.ndarray]
Noise = Mapping[str, Any]  # {modality: (B, ...) float32}, numpy or JAX arrays


class Backend(abc.ABC):
    """A trained model that answers the uses of its system.

    Attributes:
        system: its name in the registry.
        config: the run's, with what changes sampling.
        spec: of the data.
        uses: {name: Use} of what it answers, those of the system that it has the weights for.
        acting: the use that makes an action from nothing given; "" where there is none.
        can_promise: whether `sample` takes promised actions.
        step: of the checkpoint.
        parameters: "raw" or "average".
        limits: (lowest, highest) action of the robot that were stated with it, each (Dr,); None: none.
    """

    system: str
    config: ConfigDict
    spec: DataSpec
    uses: Mapping[str, Use]
    acting: str
    can_promise: bool
    step: int
    parameters: str
    limits: tuple[np.ndarray, np.ndarray] | None = None

    @abc.abstractmethod
    def noise(self, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> Noise:
        """The noise of decisions in episodes, as `episode_noise` draws it: {modality: (B, ...)}.

        Args:
            seed: of all, 0 to 2**32 - 1.
            seeds, decisions: (B,) uint32, each row's episode and number of the decision in it.
        """

    @abc.abstractmethod
    def sample(
        self,
        use: str,
        inputs: Mapping[str, np.ndarray],
        noise: Noise,
        promised: Promised | None = None,
        *,
        guided: bool = False,
        actions_only: bool = False,
    ) -> Arrays:
        """Answers a use for B rows.

        Args:
            inputs: `obs/<camera>` (B, To, H, W, 3) uint8, `obs/<low-dim key>` (B, To, D) raw, `obs/text` (B, E), and
                what the use is given: `action` (B, Ta, Da) raw units of the model's action, `next_obs/<camera>` or
                `next_obs_latent`.
            noise: {modality: (B, ...)}, where sampling starts.
            promised: rows of the chunk that are executed whatever the sample says; None for plain sampling.
            guided: whether promised rows also guide the rest.
            actions_only: whether to leave out what the use makes besides actions.

        Returns:
            of what the use makes: `action` (B, Ta, Da) raw and `action_normalized`, float32; `next_obs_latent`;
            `next_obs/<camera>` (B, T, H, W, 3) uint8, of the cropped size.
        """

    @abc.abstractmethod
    def describe_sampling(self) -> dict[str, Any]:
        """How it samples, for the files of results (JSON), as `System.describe_sampling`."""


class JaxBackend(Backend):
    """A `System` with its parameters, compiled once for every use and number of rows.

    Args:
        model, params, frozen: as `inference.load_for_inference` gives them.
        step, parameters: of the checkpoint.
        act: the program of the acting use's actions, `answering(model, (model.acting,), actions_only=True)`, compiled
            for where `params` lie; None: it is compiled for one device.
    """

    def __init__(
        self,
        model: System,
        params: Any,
        frozen: Any,
        *,
        step: int = 0,
        parameters: str = "raw",
        act: Callable[..., Any] | None = None,
    ):
        self.model, self._params, self._frozen, self._act = model, params, frozen, act
        self.system, self.config, self.spec = model.config.system, model.config, model.spec
        self.uses, self.acting, self.can_promise = model.uses, model.acting, model.can_promise
        self.step, self.parameters = step, parameters

    @property
    def arrays(self) -> tuple[Any, Any]:
        """`params` and `frozen`."""
        return self._params, self._frozen

    def noise(self, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> Noise:
        return episode_noise(self.model, use, seed, seeds, decisions)

    def sample(
        self,
        use: str,
        inputs: Mapping[str, np.ndarray],
        noise: Noise,
        promised: Promised | None = None,
        *,
        guided: bool = False,
        actions_only: bool = False,
    ) -> Arrays:
        plain = promised is None
        if plain and actions_only and use == self.acting and self._act:
            run = self._act
        else:
            run = _compiled(self.model, (use,), actions_only, guided and not plain)
        made = run(self._params, self._frozen, self.spec.normalized(inputs), {use: noise}, promised)
        return self._out(use, made[use])

    def answers(
        self,
        uses: Sequence[str],
        inputs: Mapping[str, np.ndarray],
        noise: Mapping[str, Noise],
        *,
        float_frames: bool = False,
    ) -> dict[str, Arrays]:
        """Several uses of the same inputs in one program, which encodes these once: {use: as `sample` returns}.

        Args:
            noise: {use: {modality: (B, ...)}}.
            float_frames: whether to return `next_obs_float/<camera>` too, float32 in [0, 1] units, not clipped.
        """
        run = _compiled(self.model, tuple(uses))
        made = run(self._params, self._frozen, self.spec.normalized(inputs), dict(noise), None)
        return {use: self._out(use, made[use], float_frames) for use in uses}

    def describe_sampling(self) -> dict[str, Any]:
        return self.model.describe_sampling()

    def _out(self, use: str, made: Mapping[str, jax.Array], float_frames: bool = False) -> Arrays:
        """What a program made in the names and units of files."""
        out = {key: np.asarray(value) for key, value in made.items()}
        if "action" in out:
            out["action_normalized"] = out["action"]
            out["action"] = np.asarray(self.spec.normalizer.unnormalize("action", out["action"]), np.float32)
        if latents := {key: x for key, x in out.items() if key.startswith("next_obs_")}:
            frames = np.asarray(_frames(self.model)(self._frozen, latents))
            out.pop("next_obs_float", None)
            with np.errstate(invalid="ignore"):  # what is not finite is for the caller to refuse
                pictures = np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)
            out |= {f"next_obs/{camera}": pictures[:, view] for view, camera in enumerate(self.model.cameras)}
            if float_frames:
                out |= {f"next_obs_float/{camera}": frames[:, view] for view, camera in enumerate(self.model.cameras)}
        return out


def answering(
    model: System, uses: tuple[str, ...], *, actions_only: bool = False, guided: bool = False
) -> Callable[..., dict[str, Any]]:
    """`(params, frozen, batch, noise, promised) -> {use: what System.sample makes}`, to be compiled.

    Args of the function:
        batch: as `System.encode` takes it, normalised; noise: {use: {modality: (B, ...)}}; promised: None, or of one
        use.
    """

    def answer(
        params: Any, frozen: Any, batch: Mapping[str, Any], noise: Mapping[str, Noise], promised: Promised | None = None
    ) -> dict[str, Any]:
        encoded = model.encode(frozen, batch)
        how: dict[str, Any] = {} if promised is None else {"promised": promised, "guided": guided}
        made = {use: model.sample(params, encoded, use, dict(noise[use]), **how) for use in uses}
        return {use: {"action": x["action"]} if actions_only else x for use, x in made.items()}

    return answer


def episode_noise(model: System, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> dict[str, jax.Array]:
    """The noise of a use, {modality: (B, ...)}: row i is a function of (seed, seeds[i], decisions[i]) alone.

    Args: as `Backend.noise`.
    """
    return _noise(model, use)(np.uint32(seed), np.asarray(seeds, np.uint32), np.asarray(decisions, np.uint32))


# Cached, so that backends of one system compile once.
@functools.lru_cache(maxsize=16)
def _compiled(
    model: System, uses: tuple[str, ...], actions_only: bool = False, guided: bool = False
) -> Callable[..., Any]:
    return jax.jit(answering(model, uses, actions_only=actions_only, guided=guided))


@functools.lru_cache(maxsize=4)
def _frames(model: System) -> Callable[..., Any]:
    return jax.jit(model.frames)


@functools.lru_cache(maxsize=16)
def _noise(model: System, use: str) -> Callable[..., Any]:
    return drawing(lambda key, rows: model.noise(key, rows, use))


def drawing(draw: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]) -> Callable[..., dict[str, jax.Array]]:
    """`(seed, seeds (B,), decisions (B,)) -> {modality: (B, ...)}` as `Backend.noise` returns it, compiled.

    Args:
        draw: (key, row numbers (1,)) -> the noise of one row, {modality: (1, ...)}.
    """

    def one(key: jax.Array, seed: jax.Array, decision: jax.Array) -> dict[str, jax.Array]:
        own = jax.random.fold_in(jax.random.fold_in(key, seed), decision)
        return jax.tree.map(lambda x: x[0], draw(own, jnp.zeros(1, jnp.int32)))

    def noise(seed: jax.Array, seeds: jax.Array, decisions: jax.Array) -> dict[str, jax.Array]:
        return jax.vmap(functools.partial(one, jax.random.key(seed)))(seeds, decisions)

    return jax.jit(noise)
