"""A robot policy and world model that `uwm_jax` trained, as one file for PyTorch: torch, numpy and safetensors suffice.

A copy of it lies in every folder that `python -m uwm_jax.convert to-torch --output=DIR/` writes, next to
`model.safetensors` (parameters under the names of the official state dicts) and `model.json` (what they mean). It needs
Python 3.10 and torch 2.4, or newer ones:

    import uwm_torch
    policy = uwm_torch.load("DIR", device="cuda", dtype=torch.bfloat16, cuda_graphs=True)
    policy.reset(1)                                   # one episode; any number at once
    action = policy.act({"front": frame[None], "state": state[None]})[0]   # every control step
    made = policy.sample("forward", {"obs/front": ..., "obs/state": ..., "action": ...})

Observations and actions are the robot's own, in raw units: frames uint8 (H, W, 3) as its dataset has them, red first.
Where `model.json` lists a camera under `flip`, the dataset's pictures were turned upright ("180", or "rows" reversed)
when it was made: show the policy pictures that are turned in the same way.

The parts, from the bottom: rotations and action transforms, images, layers, networks, codecs, sampling, the model (all
uses, tensors in and out), the policy (numpy in and out) and `load`. It runs Unified World Models (Zhu et al. 2025,
arXiv:2504.02792) and Diffusion Policies (Chi et al. 2023, arXiv:2303.04137).

Letters in shapes: B rows, V views (cameras in sorted order), T frames, Ta actions of a chunk, Da columns of a model's
action, Dr of the robot's, F features of the observation, S sampler steps, L tokens, D width.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

FORMAT, FORMAT_VERSION = "uwm_jax.torch", 1
WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"
SYSTEMS = ("uwm", "dp")

Tensors = dict[str, Tensor]
Arrays = Mapping[str, Any]


class UserError(ValueError):
    """What a user can mend: it says what is wrong, what was expected and found, and what to do."""


class RunError(RuntimeError):
    """The model made what no robot should follow."""


# --- rotations: each representation to and from matrices, float64 ---------------------------------------------------
#
# Matrices R map coordinates in the rotated frame to those in the fixed one.


def _matrix(*entries: Tensor) -> Tensor:
    """(..., 3, 3) of nine tensors (...,), row by row."""
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def _unit(v: Tensor) -> Tensor:
    """NaN for a vector of length 0, which has no direction."""
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)


def _from_euler(angles: Tensor) -> Tensor:
    """R = Rx(a) Ry(b) Rz(c)."""
    (ca, cb, cc), (sa, sb, sc) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    return _matrix(
        *(cb * cc, -cb * sc, sb),
        *(ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb),
        *(sa * sc - ca * sb * cc, sa * cc + ca * sb * sc, ca * cb),
    )


def _to_euler(r: Tensor) -> Tensor:
    """(a, b, c) with b in [-pi/2, pi/2]; the three give R at every b."""
    b = torch.atan2(r[..., 0, 2], torch.hypot(r[..., 0, 0], r[..., 0, 1]))
    c = torch.atan2(-r[..., 0, 1], r[..., 0, 0])
    sc, cc = c.sin(), c.cos()
    # The second column of R Rz(c)^T = Rx(a) Ry(b) is (0, cos a, sin a), also at a locked gimbal.
    a = torch.atan2(r[..., 2, 0] * sc + r[..., 2, 1] * cc, r[..., 1, 0] * sc + r[..., 1, 1] * cc)
    return torch.stack([a, b, c], dim=-1)


def _from_quaternion(q: Tensor) -> Tensor:
    """Of (x, y, z, w) of any length but 0."""
    x, y, z, w = _unit(q).unbind(-1)
    return _matrix(
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )


def _to_quaternion(r: Tensor) -> Tensor:
    """(x, y, z, w) with w >= 0: the row of 4 q q^T with the largest diagonal (Shepperd, 1978)."""
    d0, d1, d2 = r.diagonal(dim1=-2, dim2=-1).unbind(-1)
    total = d0 + d1 + d2
    xy, xz, yz = r[..., 0, 1] + r[..., 1, 0], r[..., 0, 2] + r[..., 2, 0], r[..., 1, 2] + r[..., 2, 1]
    wx, wy, wz = r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]
    products = torch.stack(
        [
            *(1 + 2 * d0 - total, xy, xz, wx),
            *(xy, 1 + 2 * d1 - total, yz, wy),
            *(xz, yz, 1 + 2 * d2 - total, wz),
            *(wx, wy, wz, 1 + total),
        ],
        dim=-1,
    ).unflatten(-1, (4, 4))
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*r.shape[:-2], 1, 4)
    q = _unit(products.gather(-2, largest)[..., 0, :])
    return torch.where(q[..., 3:] < 0, -q, q)


def _from_axis_angle(v: Tensor) -> Tensor:
    """Of an axis times its angle in radians."""
    half = torch.linalg.vector_norm(v, dim=-1, keepdim=True) / 2
    return _from_quaternion(torch.cat([v / 2 * torch.sinc(half / math.pi), half.cos()], dim=-1))


def _to_axis_angle(r: Tensor) -> Tensor:
    """With an angle of at most pi."""
    q = _to_quaternion(r)
    length = torch.linalg.vector_norm(q[..., :3], dim=-1, keepdim=True)
    small = length < 1e-12
    factor = torch.where(small, 2.0, 2 * torch.atan2(length, q[..., 3:]) / torch.where(small, 1.0, length))
    return q[..., :3] * factor


def _from_rot6d(x: Tensor) -> Tensor:
    """Of two rows, which Gram-Schmidt makes orthonormal (Zhou et al., arXiv:1812.07035)."""
    first = _unit(x[..., :3])
    second = _unit(x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdim=True) * first)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-2)


class Rotation(NamedTuple):
    width: int
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]


ROTATIONS = {
    # Intrinsic XYZ angles, radians, R = Rx(a) Ry(b) Rz(c).
    "euler": Rotation(3, _from_euler, _to_euler),
    # Roll, pitch, yaw about fixed axes, radians, R = Rz(c) Ry(b) Rx(a): scipy's "xyz".
    "rpy": Rotation(3, lambda x: _from_euler(-x).mT, lambda r: -_to_euler(r.mT)),
    # Axis times angle, radians.
    "axis_angle": Rotation(3, _from_axis_angle, _to_axis_angle),
    "quaternion_xyzw": Rotation(4, _from_quaternion, _to_quaternion),
    "quaternion_wxyz": Rotation(
        4, lambda q: _from_quaternion(q.roll(-1, dims=-1)), lambda r: _to_quaternion(r).roll(1, dims=-1)
    ),
    # The first two rows of R.
    "rot6d": Rotation(6, _from_rot6d, lambda r: r[..., :2, :].flatten(-2)),
}


# --- actions: between the robot's numbers and the model's -----------------------------------------------------------


class Part(NamedTuple):
    """One part of an action: `width` numbers of the robot, `model_width` of the model.

    `to_model` and `to_robot` map (..., T, width) and (..., T, model_width) float64 into each other, given the state
    (..., 1, D) that the part refers to, the columns `state[start:stop]` of the present observation; "" for none.
    """

    width: int
    model_width: int
    to_model: Callable[[Tensor, Any], Tensor]
    to_robot: Callable[[Tensor, Any], Tensor]
    state: str = ""
    columns: slice = slice(None)

    @classmethod
    def parse(cls, name: str, width: int) -> Part:
        """The part of a transform's name in `config.data.action`; UserError for a name that this file does not know."""
        if name == "identity":
            return cls(width, width, lambda x, _: x, lambda y, _: y)
        if name == "gripper_inverted":
            return cls(width, width, lambda x, _: 1 - x, lambda y, _: 1 - y)
        if name.startswith("gripper_scaled:"):
            low, high = map(float, name.split(":")[1:])
            return cls(width, width, lambda x, _: (x - low) / (high - low), lambda y, _: y * (high - low) + low)
        if match := re.fullmatch(r"(xyz_)?(\w+)_to_rot6d", name):
            if match[2] in ROTATIONS:
                return cls._of_pose(ROTATIONS[match[2]], 3 if match[1] else 0)
        if match := re.fullmatch(r"relative:([^\[\]:]+)(?:\[(-?\d*):(-?\d*)\])?(?::(\w+))?(?::(\w+))?", name):
            state, start, stop, of_action = match[1], match[2], match[3], match[4] or "euler"
            columns = slice(int(start) if start else None, int(stop) if stop else None)
            if of_action == "position":
                return cls(width, width, lambda x, s: x - s, lambda y, s: y + s, state, columns)
            if of_action in ROTATIONS and (of_state := match[5] or of_action) in ROTATIONS:
                return cls._relative(ROTATIONS[of_action], ROTATIONS[of_state], state, columns)
        raise UserError(
            f"{DESCRIPTION_FILE}: the action transform {name!r} is unknown to this {Path(__file__).name}; export the "
            "model again, which writes the file that knows it."
        )

    @classmethod
    def _of_pose(cls, rotation: Rotation, position: int) -> Part:
        """Of numbers of which those after `position` are a rotation."""

        def convert(x: Tensor, one: Rotation, other: Rotation) -> Tensor:
            return torch.cat([x[..., :position], other.from_matrix(one.to_matrix(x[..., position:]))], dim=-1)

        rot6d = ROTATIONS["rot6d"]
        return cls(
            position + rotation.width,
            position + 6,
            lambda x, _: convert(x, rotation, rot6d),
            lambda y, _: convert(y, rot6d, rotation),
        )

    @classmethod
    def _relative(cls, rotation: Rotation, of_state: Rotation, state: str, columns: slice) -> Part:
        """A pose p_k, R_k relative to the pose p_s, R_s of the state: p_k - p_s and R_s^T R_k."""
        rot6d = ROTATIONS["rot6d"]

        def forward(x: Tensor, s: Tensor) -> Tensor:
            turned = of_state.to_matrix(s[..., 3:]).mT @ rotation.to_matrix(x[..., 3:])
            return torch.cat([x[..., :3] - s[..., :3], rot6d.from_matrix(turned)], dim=-1)

        def backward(y: Tensor, s: Tensor) -> Tensor:
            turned = of_state.to_matrix(s[..., 3:]) @ rot6d.to_matrix(y[..., 3:])
            return torch.cat([y[..., :3] + s[..., :3], rotation.from_matrix(turned)], dim=-1)

        return cls(3 + rotation.width, 9, forward, backward, state, columns)


class RobotActions:
    """The actions of one robot: its parts, and the states {key of an observation: D} that relative parts refer to."""

    def __init__(self, parts: Sequence[Part], states: Mapping[str, int]):
        self.parts, self.states = tuple(parts), dict(states)
        self.width = sum(part.width for part in self.parts)

    @classmethod
    def of_description(cls, description: Mapping[str, Any], source: str) -> RobotActions:
        """The robot of a source of the training data; "" where all sources have actions of one convention.

        A checkpoint that does not know its robot, such as an official one, gives the model's own columns.
        """
        robots = description.get("robots") or {}
        if source and source not in robots:
            known = ", ".join(sorted(robots)) or "no source that it knows"
            raise UserError(f"source={source!r}: the model was trained on actions of {known}.")
        if not robots:
            columns = description["shapes"]["action"][-1]
            return cls([Part.parse("identity", columns)], {})
        conventions = [
            ([(part["transform"], part["width"]) for part in robot["parts"]], robot["states"])
            for robot in robots.values()
        ]
        if not source and any(one != conventions[0] for one in conventions):
            raise UserError(
                f"the sources {', '.join(sorted(robots))} of this model have different transforms of their actions, so "
                "it has to be said whose robot acts: load(..., source=NAME)."
            )
        chosen = robots[source or sorted(robots)[0]]
        return cls([Part.parse(part["transform"], part["width"]) for part in chosen["parts"]], chosen["states"])

    def to_model(self, actions: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """(..., T, Dr) of the robot -> (..., T, Da) float32 of the model, raw units; states {key: (..., D)}."""
        pieces = zip(self.parts, actions.double().split([p.width for p in self.parts], dim=-1), strict=True)
        return torch.cat([part.to_model(x, self._state(part, states)).float() for part, x in pieces], dim=-1)

    def to_robot(self, actions: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `to_model`; rotations as numbers that mean the same rotation."""
        pieces = zip(self.parts, actions.double().split([p.model_width for p in self.parts], dim=-1), strict=True)
        return torch.cat([part.to_robot(y, self._state(part, states)).float() for part, y in pieces], dim=-1)

    @staticmethod
    def _state(part: Part, states: Mapping[str, Tensor]) -> Tensor | None:
        """(..., 1, D) float64: all actions of a chunk share the present."""
        return states[part.state][..., part.columns].double()[..., None, :] if part.state else None


# --- images ---------------------------------------------------------------------------------------------------------


def resize_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) float32 weights of bilinear resampling with half-pixel centres; shrinking widens the triangle to the
    new pixel's footprint (antialiasing), and weights are renormalised at the edges."""
    step = old / new
    centres = (np.arange(new) + 0.5) * step - 0.5
    distance = np.abs(np.arange(old)[None, :] - centres[:, None]) / max(step, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


class Images(nn.Module):
    """Frames {camera: (B, T, H, W, 3) uint8} to images (B, V, T, 3, h, w) in [0, 1]: resized, then the centre cut out.

    Args:
      cameras: {name: (H, W)} of the raw frames.
      resize, crop: (height, width) of the resized frames, and of what is cut out.
    """

    def __init__(self, cameras: Mapping[str, Sequence[int]], resize: Sequence[int], crop: Sequence[int]):
        super().__init__()
        self.cameras, self.crop = sorted(cameras), tuple(crop)
        self.offsets = [round((old - new) / 2) for old, new in zip(resize, crop, strict=True)]
        for view, camera in enumerate(self.cameras):
            for axis, name in enumerate(("rows", "columns")):
                old, new, start = cameras[camera][axis], resize[axis], self.offsets[axis]
                matrix = None  # an axis that keeps its size is cut, not resampled
                if old != new:
                    matrix = constant(resize_matrix(old, new)[start : start + crop[axis]])
                self.register_buffer(f"{name}_{view}", matrix, persistent=False)

    def forward(self, frames: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self._view(frames[camera], view) for view, camera in enumerate(self.cameras)], dim=1)

    def _view(self, x: Tensor, view: int) -> Tensor:
        rows, columns = self.get_buffer(f"rows_{view}"), self.get_buffer(f"columns_{view}")
        if rows is None:
            x = x.narrow(2, self.offsets[0], self.crop[0])
        if columns is None:
            x = x.narrow(3, self.offsets[1], self.crop[1])
        x = x.movedim(-1, -3).float() / 255
        if columns is not None:
            x = x @ columns.mT
        return x if rows is None else rows @ x


# --- layers ---------------------------------------------------------------------------------------------------------
#
# A product runs in the dtype of its weight, and so does what lies between two of them. With bfloat16 the weights of all
# products but the `exact` ones are bfloat16; the residual stream, normalisation, modulation, embeddings of timesteps
# and the output projections stay in float32. `half_products` makes it so.


class Dense(nn.Linear):
    def __init__(self, inputs: int, outputs: int, bias: bool = True, exact: bool = False):
        super().__init__(inputs, outputs, bias)
        self.exact = exact

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Conv2d(nn.Conv2d):
    exact = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Conv1d(nn.Conv1d):
    exact = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class ConvTranspose1d(nn.ConvTranspose1d):
    exact = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class GroupNorm(nn.GroupNorm):
    """In float32, for any dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def half_products(module: nn.Module, dtype: torch.dtype) -> None:
    """Puts the weights of all products that need not be exact into `dtype`."""
    for part in module.modules():
        if getattr(part, "exact", True) is False:
            part.to(dtype)


def mlp(inputs: int, hidden: int, outputs: int, exact: tuple[bool, bool] = (False, False)) -> list[nn.Module]:
    """Linear, Mish, Linear, for an `nn.Sequential`."""
    return [Dense(inputs, hidden, exact=exact[0]), nn.Mish(), Dense(hidden, outputs, exact=exact[1])]


def constant(values: Any) -> Tensor:
    """A float32 buffer's values, also where a network is made without memory for its parameters."""
    return torch.tensor(np.asarray(values, np.float32), device="cpu")


class Sinusoid(nn.Module):
    """Timesteps (...,) -> (..., dim) float32: sines, then cosines, at dim / 2 frequencies from 1 to 1 / 10000."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        frequency = constant(np.exp(-np.arange(half) * np.log(10_000.0) / (half - 1)))
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        phase = timestep[..., None].float() * self.frequency
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


def of_all_steps(layer: Dense, rows: Tensor, steps: Tensor, steps_first: bool = False) -> Tensor:
    """A layer of conditions [rows | steps] for all of both: features (B, F) and embeddings (S, T), activated, to
    (S, B, outputs) float32.

    The layer is linear, so that B + S products replace B * S of them.
    """
    weight = layer.weight
    if steps_first:
        of_steps, of_rows = weight[:, : steps.shape[-1]], weight[:, steps.shape[-1] :]
    else:
        of_rows, of_steps = weight[:, : rows.shape[-1]], weight[:, rows.shape[-1] :]
    row_part = F.linear(rows.to(weight.dtype), of_rows, layer.bias).float()
    return row_part + F.linear(steps.to(weight.dtype), of_steps).float()[:, None]


# --- image encoder --------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS_PER_GROUP = 16


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(channels // CHANNELS_PER_GROUP, channels, eps=1e-5)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _norm(outputs)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _norm(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(Conv2d(inputs, outputs, 1, stride=stride, bias=False), _norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.downsample(x) + self.bn2(self.conv2(y)))


class ResNet(nn.Module):
    """Images (N, 3, h, w) in [0, 1] -> (N, outputs) float32; torchvision's names, GroupNorm under those of BatchNorm.

    Args:
      encoder: `config.model.encoder`: stage_sizes, width, pool.
      outputs: features of `fc`.
      image_size: (h, w), on which `fc` depends with pool "flatten".
    """

    def __init__(self, encoder: Mapping[str, Any], outputs: int, image_size: Sequence[int]):
        super().__init__()
        width, self.pool = encoder["width"], encoder["pool"]
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, constant(values)[:, None, None], persistent=False)
        self.conv1 = Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = _norm(width)
        self.stages = [f"layer{stage + 1}" for stage in range(len(encoder["stage_sizes"]))]
        channels, halvings = width, 2  # conv1 and the pooling
        for stage, (name, blocks) in enumerate(zip(self.stages, encoder["stage_sizes"], strict=True)):
            inputs, channels, stride = channels, width * 2**stage, 2 if stage else 1
            halvings += stride - 1
            rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
            self.add_module(name, nn.Sequential(BasicBlock(inputs, channels, stride), *rest))
        pixels = math.prod(-(-n // 2**halvings) for n in image_size)
        self.fc = Dense(channels * (pixels if self.pool == "flatten" else 1), outputs, exact=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1((images - self.mean) / self.std)
        x = F.max_pool2d(F.relu(self.bn1(x)), 3, stride=2, padding=1)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        # Flattened maps run over (row, column, channel).
        return self.fc(x.mean(dim=(2, 3)) if self.pool == "average" else x.movedim(1, -1).flatten(1))


class ObsEncoder(nn.Module):
    """The current observation as features (B, F) float32: images, low-dimensional keys, text, those that it reads.

    Args:
      description: `model.json`.
      codec: of the next frames, whose tensors the official state dict keeps here; None for none.
    """

    def __init__(self, description: Mapping[str, Any], codec: nn.Module | None):
        super().__init__()
        model, low_dim = description["config"]["model"], description["low_dim"]
        views, frames, width = len(description["cameras"]), len(description["window"]["obs"]), model["embed_dim"]
        encoder = model["encoder"]
        self.use_low_dim, self.use_language = encoder["use_low_dim"], encoder["use_language"]
        self.low_dim = sorted(low_dim)
        resnet = ResNet(encoder, width, description["images"]["crop"])
        self.frames_first = description["config"]["system"] == "dp"  # image features run over (frame, view), or views
        if self.frames_first:
            self.rgb_encoder = resnet
        else:
            self.img_encoder = nn.ModuleDict({"model": resnet})
        self.num_features = views * frames * width
        if self.use_low_dim:
            self.num_features += frames * sum(low_dim.values())
        if self.use_language:
            self.text_encoder = nn.ModuleDict({"head": Dense(description["text_dim"], width, exact=True)})
            self.num_features += width
        if codec is not None:
            self.add_module(description["codec"]["name"], codec)

    def forward(self, images: Tensor, low_dim: Mapping[str, Tensor], text: Tensor | None) -> Tensor:
        """Images (B, V, T, 3, h, w), {key: (B, T, D)} normalised, (B, E) -> (B, F)."""
        resnet = self.rgb_encoder if self.frames_first else self.img_encoder["model"]
        seen = resnet(images.flatten(0, 2)).unflatten(0, images.shape[:3])
        parts = [(seen.transpose(1, 2) if self.frames_first else seen).flatten(1)]
        if self.use_low_dim:
            parts.append(torch.cat([low_dim[key] for key in self.low_dim], dim=-1).flatten(1))
        if self.use_language:
            parts.append(self.text_encoder["head"](text))
        return torch.cat(parts, dim=-1)


# --- networks -------------------------------------------------------------------------------------------------------
#
# Each has `modulation`, all that timesteps and features say, at all steps of the sampler at once, as a list over steps;
# `embed`, what a noisy modality becomes on its way in; and `forward` of these, one evaluation.

Embedded = dict[str, Tensor]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of tokens (B, L, D) float32 without parameters, scaled and shifted by (B, D) each."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = Dense(width, 3 * width, bias=qkv_bias)
        self.proj = Dense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, D / heads)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Dense(width, hidden)
        self.fc2 = Dense(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block with AdaLN-zero (Peebles and Xie 2023); tokens (B, L, D) float32 in and out.

    Its modulation (B, 6 D) is shift, scale and gate of the attention, then of the MLP.
    """

    def __init__(self, model: Mapping[str, Any], condition: int):
        super().__init__()
        width = model["embed_dim"]
        self.attn = Attention(width, model["num_heads"], model["qkv_bias"])
        self.mlp = MLP(width, int(width * model["mlp_ratio"]))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Dense(condition, 6 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))


class Head(nn.Module):
    """The modulated final projection (B, L, D) -> (B, L, D); modulation (B, 2 D) is shift and scale."""

    def __init__(self, width: int, condition: int):
        super().__init__()
        self.linear = Dense(width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Dense(condition, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.linear(modulate(x, *modulation.chunk(2, dim=-1)))


class Transformer(nn.Module):
    """Blocks and head, which the condition [features | timesteps] modulates."""

    blocks: nn.ModuleList
    head: Head

    def _add_blocks(self, model: Mapping[str, Any], features: int) -> None:
        condition = features + model["timestep_embed_dim"]
        self.blocks = nn.ModuleList(Block(model, condition) for _ in range(model["depth"]))
        self.head = Head(model["embed_dim"], condition)

    def _embed_timesteps(self, timesteps: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def modulation(self, features: Tensor, timesteps: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Modulations of each step: those of the blocks (B, 6 D), last the head's (B, 2 D).

        Args:
          features: (B, F).
          timesteps: {modality: (S,)}, the same for all rows.
        """
        rows, steps = F.silu(features), F.silu(self._embed_timesteps(timesteps))
        layers = [part.adaLN_modulation[1] for part in (*self.blocks, self.head)]
        of_layers = [of_all_steps(layer, rows, steps).unbind(0) for layer in layers]
        return [list(of_step) for of_step in zip(*of_layers, strict=True)]

    def _through_blocks(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        for block, own in zip(self.blocks, modulation[:-1], strict=True):
            x = block(x, own)
        return self.head(x, modulation[-1])


class PatchEncoder(nn.Module):
    """Patches (N, values) to tokens; its weight is that of the convolution that the official network has here."""

    exact = False

    def __init__(self, channels: int, patch: Sequence[int], width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, *patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Patchifier(nn.Module):
    """Latents (B, V, T, h, w, C) to tokens over (view, frame, row, column), and back."""

    def __init__(self, latent_shape: Sequence[int], patch: Sequence[int], width: int):
        super().__init__()
        self.views, *grid, self.channels = latent_shape
        self.patch = tuple(patch)
        self.grid = tuple(n // p for n, p in zip(grid, patch, strict=True))
        self.tokens = self.views * math.prod(self.grid)
        self.patch_encoder = PatchEncoder(self.channels, patch, width)
        self.patch_decoder = Dense(width, self.channels * math.prod(self.patch), exact=True)

    def forward(self, latents: Tensor) -> Tensor:
        (t, h, w), (pt, ph, pw) = self.grid, self.patch
        x = latents.reshape(-1, self.views, t, pt, h, ph, w, pw, self.channels)
        x = x.permute(0, 1, 2, 4, 6, 8, 3, 5, 7)  # (B, V, t, h, w, C, pt, ph, pw)
        return self.patch_encoder(x.reshape(-1, self.tokens, self.channels * math.prod(self.patch)))

    def decode(self, tokens: Tensor) -> Tensor:
        x = self.patch_decoder(tokens).reshape(-1, self.views, *self.grid, self.channels, *self.patch)
        x = x.permute(0, 1, 2, 6, 3, 7, 4, 8, 5)  # (B, V, t, pt, h, ph, w, pw, C)
        size = (n * p for n, p in zip(self.grid, self.patch, strict=True))
        return x.reshape(-1, self.views, *size, self.channels)


class WorldModel(Transformer):
    """The network of a Unified World Model: tokens of actions, video patches and registers.

    Noisy modalities and predictions are {"action": (B, Ta, Da), "next_obs": (B, V, T, h, w, C)}.
    """

    def __init__(self, description: Mapping[str, Any], features: int):
        super().__init__()
        model, (self.action_len, action_dim) = description["config"]["model"], description["shapes"]["action"]
        width, time = model["embed_dim"], model["timestep_embed_dim"]
        hidden = 4 * max(action_dim, width)
        self.obs_patchifier = Patchifier(description["shapes"]["next_obs_latent"], model["patch"], width)
        registers = model["num_registers"]
        self.registers = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        tokens = self.action_len + self.obs_patchifier.tokens + registers
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.action_encoder = nn.Sequential(*mlp(action_dim, hidden, width))
        self.action_decoder = nn.Sequential(*mlp(width, hidden, action_dim, exact=(False, True)))
        self.sinusoid = Sinusoid(time)
        self.timestep_embedding = nn.ModuleDict({"proj": nn.Sequential(*mlp(2 * time, 4 * time, time, (True, True)))})
        self._add_blocks(model, features)

    def _embed_timesteps(self, timesteps: Mapping[str, Tensor]) -> Tensor:
        both = [self.sinusoid(timesteps[m]) for m in ("action", "next_obs")]
        return self.timestep_embedding["proj"](torch.cat(both, dim=-1))

    def embed(self, modality: str, noisy: Tensor) -> Tensor:
        """Tokens (B, L, D) float32 of a modality, with their positions."""
        if modality == "action":
            return self.action_encoder(noisy) + self.pos_embed[:, : self.action_len]
        end = self.action_len + self.obs_patchifier.tokens
        return self.obs_patchifier(noisy) + self.pos_embed[:, self.action_len : end]

    def forward(self, embedded: Embedded, modulation: Sequence[Tensor], wanted: Iterable[str]) -> Tensors:
        """Predictions of the wanted modalities."""
        parts, end = [embedded["action"], embedded["next_obs"]], self.action_len + self.obs_patchifier.tokens
        if self.registers is not None:
            parts.append((self.registers + self.pos_embed[:, end:]).expand(parts[0].shape[0], -1, -1))
        x = self._through_blocks(torch.cat(parts, dim=1), modulation)
        decoders: dict[str, Callable[[], Tensor]] = {
            "action": lambda: self.action_decoder(x[:, : self.action_len]),
            "next_obs": lambda: self.obs_patchifier.decode(x[:, self.action_len : end]),
        }
        return {m: decoders[m]() for m in wanted}


class ActionTransformer(Transformer):
    """The transformer of a Diffusion Policy: one token an action, {"action": (B, Ta, Da)} in and out."""

    def __init__(self, description: Mapping[str, Any], features: int):
        super().__init__()
        model, (length, action_dim) = description["config"]["model"], description["shapes"]["action"]
        width, time = model["embed_dim"], model["timestep_embed_dim"]
        hidden = 4 * max(action_dim, width)
        self.input_encoder = nn.Sequential(*mlp(action_dim, hidden, width))
        self.output_decoder = nn.Sequential(*mlp(width, hidden, action_dim, exact=(False, True)))
        self.timestep_encoder = nn.Sequential(Sinusoid(time), *mlp(time, 4 * time, time, (True, True)))
        self.pos_embed = nn.Parameter(torch.empty(1, length, width))
        self._add_blocks(model, features)

    def _embed_timesteps(self, timesteps: Mapping[str, Tensor]) -> Tensor:
        return self.timestep_encoder(timesteps["action"])

    def embed(self, modality: str, noisy: Tensor) -> Tensor:
        return self.input_encoder(noisy) + self.pos_embed

    def forward(self, embedded: Embedded, modulation: Sequence[Tensor], wanted: Iterable[str]) -> Tensors:
        return {"action": self.output_decoder(self._through_blocks(embedded["action"], modulation))}


class ConvBlock(nn.Module):
    """Convolution along time, GroupNorm, Mish: (B, C, T) -> (B, outputs, T) float32."""

    def __init__(self, inputs: int, outputs: int, taps: int, groups: int):
        super().__init__()
        self.block = nn.Sequential(
            Conv1d(inputs, outputs, taps, padding=taps // 2), GroupNorm(groups, outputs, eps=1e-5), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Residual(nn.Module):
    """Two `ConvBlock`s, of which the condition scales and shifts the first one's output (FiLM, Perez et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, condition: int, taps: int, groups: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            [ConvBlock(inputs, outputs, taps, groups), ConvBlock(outputs, outputs, taps, groups)]
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), Dense(condition, 2 * outputs))
        self.residual_conv = Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(B, C, T) and scale and shift (B, 2 * outputs) -> (B, outputs, T) float32."""
        scale, shift = modulation.chunk(2, dim=-1)
        y = self.blocks[1](scale[..., None] * self.blocks[0](x) + shift[..., None])
        return self.residual_conv(x).float() + y


class Resample(nn.Module):
    """Halves or doubles the length of (B, C, T)."""

    def __init__(self, channels: int, double: bool):
        super().__init__()
        if double:
            self.conv: nn.Module = ConvTranspose1d(channels, channels, 4, stride=2, padding=1)
        else:
            self.conv = Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FourierFeatures(nn.Module):
    """Learned random Fourier features of timesteps (S,) -> (S, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(dim // 2))

    def forward(self, timestep: Tensor) -> Tensor:
        phase = timestep[..., None].float() * self.W * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


FINAL_GROUPS = 8  # of the U-Net's last normalisation


class UNet(nn.Module):
    """The 1-D convolutional U-Net of a Diffusion Policy, {"action": (B, Ta, Da)} in and out."""

    def __init__(self, description: Mapping[str, Any], features: int):
        super().__init__()
        model, (_, action_dim) = description["config"]["model"], description["shapes"]["action"]
        unet, time = model["unet"], model["timestep_embed_dim"]
        dims, taps, groups = list(unet["down_dims"]), unet["kernel_size"], unet["groups"]

        def pair(inputs: int, outputs: int) -> list[nn.Module]:
            condition = time + features
            return [Residual(i, outputs, condition, taps, groups) for i in (inputs, outputs)]

        first = FourierFeatures(time) if unet["fourier"] else Sinusoid(time)
        self.diffusion_step_encoder = nn.Sequential(first, *mlp(time, 4 * time, time, (True, True)))
        self.down_modules = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(zip([action_dim, *dims], dims, strict=False)):
            halve = [Resample(outputs, double=False)] if level + 1 < len(dims) else []
            self.down_modules.append(nn.ModuleList([*pair(inputs, outputs), *halve]))
        self.mid_modules = nn.ModuleList(pair(dims[-1], dims[-1]))
        # The way up has a level less: what the first level kept is not joined in.
        self.up_modules = nn.ModuleList(
            nn.ModuleList([*pair(2 * inputs, outputs), Resample(outputs, double=True)])
            for inputs, outputs in zip(dims[:0:-1], dims[-2::-1], strict=True)
        )
        output = Conv1d(dims[0], action_dim, 1)
        output.exact = True
        self.final_conv = nn.Sequential(ConvBlock(dims[0], dims[0], taps, FINAL_GROUPS), output)

    def modulation(self, features: Tensor, timesteps: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Scales and shifts (B, 2 C) of all residual blocks, in the order in which they are passed, of each step."""
        steps = F.mish(self.diffusion_step_encoder(timesteps["action"]))
        levels = [*self.down_modules, self.mid_modules, *self.up_modules]
        layers = [level[i].cond_encoder[1] for level in levels for i in (0, 1)]
        rows = F.mish(features)
        of_layers = [of_all_steps(layer, rows, steps, steps_first=True).unbind(0) for layer in layers]
        return [list(of_step) for of_step in zip(*of_layers, strict=True)]

    def embed(self, modality: str, noisy: Tensor) -> Tensor:
        return noisy

    def forward(self, embedded: Embedded, modulation: Sequence[Tensor], wanted: Iterable[str]) -> Tensors:
        own = iter(modulation)

        def through(level: nn.ModuleList, x: Tensor) -> Tensor:
            return level[1](level[0](x, next(own)), next(own))

        x, kept = embedded["action"].mT, []
        for level in self.down_modules:
            x = through(level, x)
            kept.append(x)
            x = level[2](x) if len(level) > 2 else x
        x = through(self.mid_modules, x)
        for level in self.up_modules:
            x = level[2](through(level, torch.cat([x, kept.pop()], dim=1)))
        return {"action": self.final_conv(x).mT}


def make_network(description: Mapping[str, Any], features: int) -> Any:
    """The noise-prediction network, `noise_pred_net` of the state dict."""
    if description["config"]["system"] == "uwm":
        return WorldModel(description, features)
    if description["config"]["model"]["predictor"] == "unet":
        return UNet(description, features)
    return ActionTransformer(description, features)


# --- codecs: images (B, V, T, 3, h, w) in [0, 1] to latents (B, V, T, h, w, C) and back -----------------------------


class PixelsCodec(nn.Module):
    """Pixels moved to [-1, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        return images.movedim(-3, -1) * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.movedim(-1, -3) + 1) / 2


class PCACodec(nn.Module):
    """Principal components of image patches, which are flattened over (row, column, colour)."""

    def __init__(self, description: Mapping[str, Any]):
        super().__init__()
        codec, views = description["codec"], len(description["cameras"])
        self.patch = codec["patch"]
        self.register_buffer("mean", torch.empty(views, *description["images"]["crop"], 3))
        self.register_buffer("components", torch.empty(views, self.patch**2 * 3, codec["channels"]))
        self.register_buffer("scale", torch.empty(()))

    def encode(self, images: Tensor) -> Tensor:
        (b, v, t, _, height, width), p = images.shape, self.patch
        centred = images.movedim(-3, -1) - self.mean[:, None]
        patches = centred.reshape(b, v, t, height // p, p, width // p, p, 3).permute(0, 1, 2, 3, 5, 4, 6, 7)
        latents = patches.reshape(b, v, -1, p * p * 3) @ self.components
        return latents.reshape(b, v, t, height // p, width // p, -1) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        (b, v, t, h, w, channels), p = latents.shape, self.patch
        patches = (latents * self.scale).reshape(b, v, -1, channels) @ self.components.mT
        frames = patches.reshape(b, v, t, h, w, p, p, 3).permute(0, 1, 2, 3, 5, 4, 6, 7)
        return (frames.reshape(b, v, t, h * p, w * p, 3) + self.mean[:, None]).movedim(-1, -3)


class VAECodec(nn.Module):
    """Scaled latents of an autoencoder: (mode of the posterior - shift_factor) * scaling_factor, then the official
    wrapper's shift and scale."""

    def __init__(self, description: Mapping[str, Any]):
        super().__init__()
        codec = description["codec"]
        self.vae = Autoencoder(codec["diffusers_config"])
        self.scaling_factor, self.shift_factor = codec["scaling_factor"], codec["shift_factor"]
        self.microbatch = description["config"]["model"]["codec"]["microbatch"]  # frames in one pass
        shape = (1, self.vae.latent_channels, 1, 1)
        self.register_buffer("shift", torch.empty(shape))
        self.register_buffer("scale", torch.empty(shape))

    def encode(self, images: Tensor) -> Tensor:
        z = self._in_passes(self.vae.encode, images.flatten(0, 2) * 2 - 1)
        latents = ((z - self.shift_factor) * self.scaling_factor - self.shift) / self.scale
        return latents.movedim(1, -1).unflatten(0, images.shape[:3])

    def decode(self, latents: Tensor) -> Tensor:
        z = latents.flatten(0, 2).movedim(-1, 1)
        z = (z * self.scale + self.shift) / self.scaling_factor + self.shift_factor
        return ((self._in_passes(self.vae.decode, z) + 1) / 2).unflatten(0, latents.shape[:3])

    def _in_passes(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of at most `microbatch` items at a time; of all in a program, which is for any number of rows."""
        if torch.compiler.is_compiling():
            return function(x)
        return torch.cat([function(part) for part in x.split(self.microbatch)])


# The autoencoder, under the names of diffusers' `AutoencoderKL` (Rombach et al. 2022, arXiv:2112.10752).

# Fields of its configuration that are read here, with diffusers' defaults for what it omits.
_VAE_DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (64,), "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 32, "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip
# Attention of checkpoints from before diffusers 0.18, also as 1x1 convolutions.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")


class VAEResnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class VAEAttention(nn.Module):
    """Single-head self-attention over the pixels of a feature map, with its residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (Dense(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([Dense(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).mT[:, None]  # (N, 1, pixels, channels)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y)[:, 0].mT.reshape(x.shape)


class VAEMid(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class VAEDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and bottom only


class VAEUpsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VAELevel(nn.Module):
    """One resolution: resnets, then the change of resolution, `downsamplers` or `upsamplers`, if there is one."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, resample: str):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResnet(outputs if i else inputs, outputs, groups) for i in range(layers))
        self.resample = resample
        if resample:
            sampler = VAEDownsample if resample == "downsamplers" else VAEUpsample
            self.add_module(resample, nn.ModuleList([sampler(outputs)]))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.get_submodule(self.resample)[0](x) if self.resample else x


class VAEHalf(nn.Module):
    """Encoder ("down") or decoder ("up") of the autoencoder; `widths` of its levels in the order of passing."""

    def __init__(self, direction: str, inputs: int, widths: Sequence[int], outputs: int, layers: int, c: Arrays):
        super().__init__()
        groups, self.direction = c["norm_num_groups"], direction
        self.conv_in = Conv2d(inputs, widths[0], 3, padding=1)
        levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            resample = f"{direction}samplers" if i + 1 < len(widths) else ""
            levels.append(VAELevel(before, width, layers, groups, resample))
        self.add_module(f"{direction}_blocks", levels)
        middle = widths[-1] if direction == "down" else widths[0]
        self.mid_block = VAEMid(middle, groups, c["mid_block_add_attention"])
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        stages = [*self.get_submodule(f"{self.direction}_blocks")]
        stages = [*stages, self.mid_block] if self.direction == "down" else [self.mid_block, *stages]
        x = self.conv_in(x)
        for stage in stages:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x))).float()


class Autoencoder(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] to the mode of the posterior (N, C, h, w), and latents to images."""

    def __init__(self, diffusers_config: Mapping[str, Any]):
        super().__init__()
        c = {name: diffusers_config.get(name, default) for name, default in _VAE_DEFAULTS.items()}
        widths, layers, self.latent_channels = (
            list(c["block_out_channels"]),
            c["layers_per_block"],
            c["latent_channels"],
        )
        moments = 2 * self.latent_channels
        self.encoder = VAEHalf("down", c["in_channels"], widths, moments, layers, c)
        self.decoder = VAEHalf("up", self.latent_channels, widths[::-1], c["out_channels"], layers + 1, c)
        # These two tiny products stay exact: they cost nothing.
        self.quant_conv = nn.Conv2d(moments, moments, 1) if c["use_quant_conv"] else nn.Identity()
        size = self.latent_channels
        self.post_quant_conv = nn.Conv2d(size, size, 1) if c["use_post_quant_conv"] else nn.Identity()

    def encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))[:, : self.latent_channels]

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def make_codec(description: Mapping[str, Any]) -> nn.Module:
    name = description["codec"]["name"]
    if name == "pixels":
        return PixelsCodec()
    if name not in ("pca", "vae"):
        raise UserError(f"{DESCRIPTION_FILE}: the codec {name!r} is unknown; this file has vae, pca and pixels.")
    return (PCACodec if name == "pca" else VAECodec)(description)


# --- sampling -------------------------------------------------------------------------------------------------------


class Promised(NamedTuple):
    """Rows of a chunk that will be executed whatever the sample says.

    Attributes:
      action: (B, Ta, Da) float32, normalised.
      mask: (B, Ta) bool, True where the row is promised.
    """

    action: Any
    mask: Any


GUIDANCE = 5.0  # bound of the guidance's weight, which is 1 / signal


class Sampler(nn.Module):
    """Deterministic DDIM for every combination of roles, or Euler's steps of flow matching.

    Args:
      diffusion: of `model.json`: the config's fields with `timesteps` (S,), falling, where the network is evaluated,
        and `alphas_cumprod` (T,) and `hidden_timestep`, or of flow the `knots` (S + 1,) from 1, noise, to 0, data.
    """

    def __init__(self, diffusion: Mapping[str, Any]):
        super().__init__()
        walk = [int(t) for t in diffusion["timesteps"]]
        hidden = int(diffusion.get("hidden_timestep", 0))
        for role, levels in (("generate", walk), ("given", [0] * len(walk)), ("hidden", [hidden] * len(walk))):
            self.register_buffer(role, torch.tensor(levels, device="cpu"), persistent=False)
        self.prediction, self.clip = diffusion["prediction"], diffusion["clip"]
        self.flow = diffusion.get("kind") == "flow"
        if self.flow:
            noise = np.asarray(diffusion["knots"], np.float32)
            signal = 1 - noise
        else:
            alphas = np.asarray(diffusion["alphas_cumprod"], np.float32)[walk]
            alphas = np.append(alphas, np.float32(1))  # the last step lands on clean data
            signal, noise = np.sqrt(alphas), np.sqrt(1 - alphas)
        # Each step's own, and at last the end's, in float32's numbers.
        self.signal, self.noise = signal.tolist(), noise.tolist()

    def forward(
        self,
        net: Any,
        features: Tensor,
        roles: Mapping[str, str],
        given: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        promised: Promised | None = None,
        guided: bool = False,
    ) -> Tensors:
        """Samples {modality: (B, ...)} of what `roles` generates.

        Promised rows are held at every step's noise level, with the noise that the sample starts from, and the sample
        ends on them. This is replacement, an approximation: the network reads them as noisy as the others. `guided`
        also moves the estimate x0 of the clean sample towards them, by min(5, 1 / signal) J^T (m (p - x0)) with
        J = dx0/dx and m 1 in promised rows: a vector-Jacobian product each step.

        Args:
          net: of "networks" above.
          features: (B, F).
          roles: {modality: generate | given | hidden}.
          given: clean arrays of what is given.
          noise: N(0, 1): where generation starts, or what stands in for what is hidden.
          promised: rows of the action chunk that are known.
        """
        wanted = tuple(m for m, role in roles.items() if role == "generate")
        timesteps = {m: self.get_buffer(role) for m, role in roles.items()}
        fixed = {
            m: net.embed(m, (given if role == "given" else noise)[m]) for m, role in roles.items() if m not in wanted
        }
        x = self._hold({m: noise[m] for m in wanted}, noise, promised, 0)
        for step, modulation in enumerate(net.modulation(features, timesteps)):

            def estimate(x: Tensors, step: int = step, modulation: Any = modulation) -> tuple[Tensors, Tensors]:
                output = net(fixed | {m: net.embed(m, x[m]) for m in wanted}, modulation, wanted)
                both = {m: self._clean_and_noise(m, output[m].float(), x[m], step) for m in wanted}
                return {m: clean for m, (clean, _) in both.items()}, {m: eps for m, (_, eps) in both.items()}

            if guided and promised is not None:
                clean, eps, pull = self._guide(estimate, x, promised, step)
            else:
                (clean, eps), pull = estimate(x), {}
            x = {m: self._land(m, clean[m], eps[m], x[m], pull.get(m), step) for m in wanted}
            x = self._hold(x, noise, promised, step + 1)
        return x

    def _clean_and_noise(self, modality: str, output: Tensor, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Of what x consists, if the network's output is right; of flow the clean data and the velocity."""
        signal, sigma = self.signal[step], self.noise[step]
        if self.flow:
            return x - sigma * output, output
        kind = self.prediction[modality]
        if kind == "epsilon":
            return (x - sigma * output) / signal, output
        if kind == "sample":
            return output, (x - signal * output) / sigma
        return signal * x - sigma * output, signal * output + sigma * x

    def _land(self, modality: str, clean: Tensor, eps: Tensor, x: Tensor, pull: Tensor | None, step: int) -> Tensor:
        """x at the next step's noise; `pull` is what guidance adds to the clean data."""
        signal, sigma = self.signal[step + 1], self.noise[step + 1]
        if self.flow:
            x = x + float(np.float32(sigma) - np.float32(self.noise[step])) * eps
            return x if pull is None else x + signal * pull
        if pull is not None:
            clean = clean + pull
        if clip := self.clip[modality]:  # the estimate of the noise is the one before
            clean = clean.clamp(-clip, clip)
        return signal * clean + sigma * eps

    def _hold(self, x: Tensors, noise: Mapping[str, Tensor], promised: Promised | None, step: int) -> Tensors:
        """x with its promised rows at this step's noise."""
        if promised is None:
            return x
        if self.flow:
            known = promised.action + self.noise[step] * (noise["action"] - promised.action)
        else:
            known = self.signal[step] * promised.action + self.noise[step] * noise["action"]
        return x | {"action": torch.where(promised.mask[..., None], known, x["action"])}

    def _guide(
        self, estimate: Callable[[Tensors], tuple[Tensors, Tensors]], x: Tensors, promised: Promised, step: int
    ) -> tuple[Tensors, Tensors, Tensors]:
        """Both of `estimate` at x, and what guidance adds to the clean data."""
        with torch.enable_grad():
            at = {m: value.detach().requires_grad_() for m, value in x.items()}
            clean, eps = estimate(at)
            found = clean["action"].detach()
            error = torch.where(promised.mask[..., None], promised.action - found, torch.zeros_like(found))
            pulls = torch.autograd.grad(clean["action"], list(at.values()), error)
        weight = min(GUIDANCE, 1 / self.signal[step]) if self.signal[step] else GUIDANCE
        pull = {m: weight * value for m, value in zip(at, pulls, strict=True)}
        return {m: x.detach() for m, x in clean.items()}, {m: x.detach() for m, x in eps.items()}, pull


# --- the model: every use, tensors in raw units in and out ----------------------------------------------------------


class Model(nn.Module):
    """Observation encoder, network, codec and sampler of a description; `forward` answers a use.

    Attributes:
      roles: {use: {modality: generate | given | hidden}}.
      codec: None where the folder was exported without one.
    """

    def __init__(self, description: Mapping[str, Any], with_codec: bool):
        super().__init__()
        config, images = description["config"], description["images"]
        self.cameras = sorted(description["cameras"])
        self.low_dim = sorted(description["low_dim"])
        self.roles: dict[str, dict[str, str]] = description.get("modes") or {"policy": {"action": "generate"}}
        self.images = Images(description["cameras"], images["resize"], images["crop"])
        codec = make_codec(description) if with_codec else None
        self._codec_name = description["codec"]["name"] if codec is not None else ""
        self.obs_encoder = ObsEncoder(description, codec)
        self.noise_pred_net = make_network(description, self.obs_encoder.num_features)
        self.sampler = Sampler(description["diffusion"])
        self.noise_shapes = {"action": tuple(description["shapes"]["action"])}
        if config["system"] == "uwm":
            self.noise_shapes["next_obs"] = tuple(description["shapes"]["next_obs_latent"])
        self._scaled = sorted(description["normalizers"])
        for place, key in enumerate(self._scaled):  # raw = normalised * scale + offset
            for part in ("scale", "offset"):
                value = constant(description["normalizers"][key][part])
                self.register_buffer(f"{part}_{place}", value, persistent=False)

    @property
    def codec(self) -> Any:
        return self.obs_encoder.get_submodule(self._codec_name) if self._codec_name else None

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """(..., D) raw to normalised; a key without a normaliser is unchanged."""
        scale, offset = self._scale_of(key)
        return x if scale is None else (x - offset) / scale

    def unnormalize(self, key: str, x: Tensor) -> Tensor:
        scale, offset = self._scale_of(key)
        return x if scale is None else x * scale + offset

    def _scale_of(self, key: str) -> tuple[Any, Any]:
        if key not in self._scaled:
            return None, None
        place = self._scaled.index(key)
        return self.get_buffer(f"scale_{place}"), self.get_buffer(f"offset_{place}")

    def encode_obs(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features (B, F) of `obs/*` in raw units."""
        images = self.images({camera: inputs[f"obs/{camera}"] for camera in self.cameras})
        low_dim = {key: self.normalize(key, inputs[f"obs/{key}"]) for key in self.low_dim}
        return self.obs_encoder(images, low_dim, inputs.get("obs/text"))

    def forward(
        self,
        use: str,
        inputs: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        promised: Promised | None = None,
        guided: bool = False,
        float_frames: bool = False,
    ) -> Tensors:
        """Answers a use under the keys of `python -m uwm_jax.sample`.

        Args:
          inputs: `obs/<camera>` (B, T, H, W, 3) uint8, `obs/<low-dim key>` (B, T, D), `obs/text` (B, E), and what the
            use is given: `action` (B, Ta, Da), `next_obs/<camera>` or `next_obs_latent`; raw units.
          noise: {modality: (B, ...)} of all that the use is not given.
          promised, guided: as `Sampler` takes them.
          float_frames: whether frames are returned as float32 that is not clipped, too.

        Returns:
          `action` and `action_normalized` (B, Ta, Da); `next_obs_latent` (B, V, T, h, w, C), `next_obs/<camera>`
          (B, T, h, w, 3) uint8 and `next_obs_float/<camera>`: those that the use makes; no frames without the codec.
        """
        roles = self.roles[use]
        given: Tensors = {}
        if roles["action"] == "given":
            given["action"] = self.normalize("action", inputs["action"])
        if roles.get("next_obs") == "given":
            given["next_obs"] = self._given_latents(inputs)
        made = self.sampler(self.noise_pred_net, self.encode_obs(inputs), roles, given, noise, promised, guided)
        out: Tensors = {}
        if "action" in made:
            out["action"], out["action_normalized"] = self.unnormalize("action", made["action"]), made["action"]
        if "next_obs" in made:
            out["next_obs_latent"] = made["next_obs"]
        if "next_obs" in made and self.codec is not None:
            frames = self.codec.decode(made["next_obs"]).movedim(-3, -1)
            pictures = frames.clamp(0, 1).mul(255).round().to(torch.uint8)
            for view, camera in enumerate(self.cameras):
                out[f"next_obs/{camera}"] = pictures[:, view]
                if float_frames:
                    out[f"next_obs_float/{camera}"] = frames[:, view]
        return out

    def _given_latents(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if "next_obs_latent" in inputs:
            return inputs["next_obs_latent"]
        return self.codec.encode(self.images({camera: inputs[f"next_obs/{camera}"] for camera in self.cameras}))


class Runner:
    """Runs a model's uses on its device: eagerly, with its networks compiled, or as CUDA graphs.

    A graph is recorded for each use and number of rows when it is first asked for, and replayed from then on. Graphs
    and compiled networks see 1, 2, 4, 8, ... rows, of which spare ones repeat the others.
    """

    def __init__(self, model: Model, device: torch.device, compiled: bool, cuda_graphs: bool):
        self.model, self.device, self._rounds_up = model, device, compiled or cuda_graphs
        self._graphs: dict[Any, tuple[Any, Tensors, Tensors]] | None = {} if cuda_graphs else None
        self._lock = threading.Lock()  # a graph's inputs and outputs have one place in memory
        if compiled:
            model.obs_encoder.compile(dynamic=False)
            model.noise_pred_net.compile(dynamic=False)

    def __call__(
        self,
        use: str,
        inputs: Mapping[str, Any],
        noise: Mapping[str, Any],
        promised: Promised | None,
        guided: bool,
        float_frames: bool,
    ) -> Tensors:
        """As `Model.forward`, of arrays or tensors that lie anywhere."""
        flat = {f"inputs/{key}": value for key, value in inputs.items()}
        flat |= {f"noise/{m}": value for m, value in noise.items()}
        if promised is not None:
            flat |= {"promised/action": promised.action, "promised/mask": promised.mask}

        def run(tensors: Mapping[str, Tensor]) -> Tensors:
            parts = {
                group: {key.removeprefix(group): x for key, x in tensors.items() if key.startswith(group)}
                for group in ("inputs/", "noise/", "promised/")
            }
            known = Promised(**parts["promised/"]) if parts["promised/"] else None
            return self.model(use, parts["inputs/"], parts["noise/"], known, guided, float_frames)

        with torch.no_grad(), self._lock, _exact_convolutions():
            tensors = {key: torch.as_tensor(value).to(self.device) for key, value in flat.items()}
            rows = len(next(iter(tensors.values())))
            if self._rounds_up and rows & (rows - 1):
                at = torch.arange(1 << rows.bit_length(), device=self.device) % rows
                tensors = {key: value[at] for key, value in tensors.items()}
            if self._graphs is None:
                made = run(tensors)
            else:
                kind = use, guided, float_frames, tuple((key, x.shape, x.dtype) for key, x in sorted(tensors.items()))
                if kind not in self._graphs:
                    self._graphs[kind] = self._record(run, tensors)
                graph, places, outputs = self._graphs[kind]
                for key, value in tensors.items():
                    places[key].copy_(value)
                graph.replay()
                made = {key: value.clone() for key, value in outputs.items()}
            return {key: value[:rows] for key, value in made.items()}

    def _record(self, run: Callable[[Mapping[str, Tensor]], Tensors], tensors: Tensors) -> tuple[Any, Tensors, Tensors]:
        places = {key: value.clone() for key, value in tensors.items()}
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries choose their kernels, and reserve memory, in the first calls
                    run(places)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = run(places)
        return graph, places, outputs


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """float32 means float32: cuDNN's convolutions would otherwise round their inputs to TF32."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


# --- the actor: every use with arrays in and out, and chunks of the robot's actions ---------------------------------


class Actor:
    """The half of a policy without memory.

    Attributes:
      description: `model.json`.
      model: the module, with tensors in and out.
      uses: {use: what it makes, of `action` and `next_obs`}.
      horizon: rows of a chunk from the present on, the newest frame's step; row k is for k steps from now.
      width: Dr, numbers of the robot's action.
      limits: (low, high), each (Dr,) float32, in the robot's columns and units; None for none.
      cut: numbers that the limits have cut so far.
    """

    def __init__(self, description: Mapping[str, Any], runner: Runner, *, limits: Any = None, source: str = ""):
        self.description, self._runner, self.model = dict(description), runner, runner.model
        roles, named = self.model.roles, description.get("uses")
        self.uses = {
            use: tuple(m for m in roles[use] if roles[use][m] == "generate")
            for use in roles
            if named is None or use in named
        }
        window = {group: list(steps) for group, steps in description["window"].items()}
        present = max(window["obs"])
        self._back = [present - step for step in window["obs"]]  # steps back from the present, of each frame
        self._newest = window["obs"].index(present)
        first = window["action"].index(present) if present in window["action"] else 0
        following = window["action"][first:]
        self.horizon = next((i for i, step in enumerate(following) if step != present + i), len(following))
        self._chunk = slice(first, first + self.horizon)  # of the model's actions, those from the present on
        self._robot = RobotActions.of_description(description, source)
        self.width, self.cut = self._robot.width, 0
        stored = description.get("limits")
        given = (limits, (stored["low"], stored["high"]) if stored else None)
        pairs = [self._checked_limits(pair) for pair in given if pair is not None]
        self.limits = (np.max([p[0] for p in pairs], axis=0), np.min([p[1] for p in pairs], axis=0)) if pairs else None

    # --- uses ------------------------------------------------------------------------------------

    def sample(
        self,
        use: str,
        inputs: Mapping[str, Any],
        noise: Mapping[str, Any] | None = None,
        promised: tuple[Any, Any] | None = None,
        guided: bool = False,
        *,
        float_frames: bool = False,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """One use of the model, as `python -m uwm_jax.sample` answers it: the model's own actions, in raw units.

        Args:
          use: one of `uses`.
          inputs: `obs/<camera>` uint8 (B, T, H, W, 3), `obs/<low-dim key>` (B, T, D), `obs/text` (B, E) where the model
            reads text; `action` (B, Ta, Da) where the use is given it; `next_obs/<camera>` or `next_obs_latent`.
          noise: {modality: (B, ...) float}; what is missing is drawn from `seed`, row by row.
          promised: (action (B, Ta, Da) normalised, mask (B, Ta) bool), rows that will be executed in any case.
          guided: whether they also guide the other rows.
          float_frames: whether frames are returned as float32 that is not clipped, too.

        Returns:
          `action`, `action_normalized`, `next_obs_latent`, `next_obs/<camera>` uint8, `next_obs_float/<camera>`: those
          that the use makes.

        Raises:
          UserError: naming every key that is missing, unknown, or has an unfit shape, dtype or value.
        """
        if use not in self.uses:
            raise UserError(f"use {use!r}: this export answers {', '.join(self.uses)}.")
        arrays, rows = self._checked_inputs(use, inputs, noise or {}, promised)
        roles = self.model.roles[use]
        noises = {m: arrays.get(f"noise/{m}") for m, role in roles.items() if role != "given"}
        if any(x is None for x in noises.values()):
            drawn = self._draw([(seed, row) for row in range(rows)])
            noises = {m: drawn[m] if x is None else x for m, x in noises.items()}
        known = Promised(arrays["promised/action"], arrays["promised/mask"]) if promised is not None else None
        batch = {key: x for key, x in arrays.items() if not key.startswith(("noise/", "promised/"))}
        made = self._runner(use, batch, noises, known, guided, float_frames)
        return {key: value.cpu().numpy() for key, value in made.items()}

    def _checked_inputs(
        self, use: str, inputs: Mapping[str, Any], noise: Mapping[str, Any], promised: tuple[Any, Any] | None
    ) -> tuple[dict[str, np.ndarray], int]:
        """The arrays that a use reads, and their rows; UserError names everything that does not fit."""
        model = self.model
        roles = model.roles[use]
        given = dict(inputs) | {f"noise/{m}": value for m, value in noise.items()}
        if promised is not None:
            given |= {"promised/action": promised[0], "promised/mask": promised[1]}
        problems = []
        expected, needed = self._expected(use, given)
        if any(key.startswith("next_obs/") for key in needed) and model.codec is None:
            problems.append("missing next_obs_latent: this folder was exported without the image codec")
        if promised is not None:
            if roles["action"] != "generate":
                problems.append(f"promised: {use} makes no actions, so that none can be promised")
            shape = model.noise_shapes["action"]
            expected |= {"promised/action": (shape, "float32"), "promised/mask": (shape[:1], "bool")}
        known = {"action", "next_obs_latent", *expected}
        for key in given.keys() - known:
            # Further observations are ignored, but for one that may be a missing key, misspelt.
            close = difflib.get_close_matches(key, [k for k in expected if k not in given], n=1, cutoff=0.8)
            if close or not key.startswith(("obs/", "next_obs/")):
                problems.append(f"unknown key {key}" + (f": did you mean {close[0]}?" if close else ""))
        checked: dict[str, np.ndarray] = {}
        rows = 0
        for key, (shape, dtype) in expected.items():
            wanted = f"expected {dtype} ({', '.join(['B', *map(str, shape)])})"
            if key not in given:
                if key in needed:
                    problems.append(f"missing {key}: {wanted}")
                continue
            value, problem = _as_dtype(given[key], dtype)
            if problem or value.ndim != 1 + len(shape) or value.shape[1:] != shape or not len(value):
                problems.append(f"{key}: {wanted}, found {problem or f'{value.dtype} {value.shape}'}")
            elif rows and len(value) != rows:
                problems.append(f"{key}: expected {rows} rows like the keys before it, found {len(value)}")
            else:
                checked[key], rows = value, len(value)
        if problems:
            raise UserError(f"the inputs of {use} do not fit the model:\n  " + "\n  ".join(problems))
        return checked, rows

    def _expected(
        self, use: str, given: Container[str]
    ) -> tuple[dict[str, tuple[tuple[int, ...], str]], tuple[str, ...]]:
        """{key that a use reads: (shape of a row, dtype)}, noise among them, and the keys that have to be there.

        Latents take the place of next frames where they are `given`.
        """
        d, roles = self.description, self.model.roles[use]
        lengths = {group: len(steps) for group, steps in d["window"].items()}
        expected: dict[str, tuple[tuple[int, ...], str]] = {}

        def frames(group: str) -> None:
            shapes = {f"{group}/{camera}": (lengths[group], *size, 3) for camera, size in d["cameras"].items()}
            expected.update({key: (shape, "uint8") for key, shape in shapes.items()})

        frames("obs")
        expected |= {f"obs/{key}": ((lengths["obs"], width), "float32") for key, width in d["low_dim"].items()}
        if d["text_dim"]:
            expected["obs/text"] = (d["text_dim"],), "float32"
        if roles["action"] == "given":
            expected["action"] = self.model.noise_shapes["action"], "float32"
        if roles.get("next_obs") == "given" and "next_obs_latent" in given:
            expected["next_obs_latent"] = self.model.noise_shapes["next_obs"], "float32"
        elif roles.get("next_obs") == "given":
            frames("next_obs")
        needed = tuple(expected)
        expected |= {f"noise/{m}": (shape, "float32") for m, shape in self.model.noise_shapes.items()}
        return expected, needed

    def _draw(self, seeds: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
        """N(0, 1) noise {modality: (B, ...)}; a row's depends on its own seeds alone, on all devices."""
        shapes = self.model.noise_shapes
        generators = [np.random.default_rng(np.random.SeedSequence(seed)) for seed in seeds]
        rows = [{m: g.standard_normal(shape, np.float32) for m, shape in shapes.items()} for g in generators]
        return {m: np.stack([row[m] for row in rows]) for m in shapes}

    def export_program(self, path: str | os.PathLike[str], use: str = "policy") -> None:
        """Writes one file, by `torch.export`, that takes observations and noise and returns the robot's actions.

        It runs without this file, on the device and in the dtype of the policy:

            program = torch.export.load("policy.pt2").module()
            actions = program({"obs/front": frames, "obs/state": state, ...}, {"action": noise, ...})

        Inputs are those of `sample` for the use, with `obs/<key>` (B, T, D) of the states that relative actions refer
        to; noise is of every modality that the use is not given; B may be any number of rows. The result is
        (B, horizon, Dr) float32: row k is for k steps from now, within the limits. `model.json` lies inside, as the
        extra file of that name.

        Args:
          path: ends in `.pt2`.
          use: of `uses`, one that makes actions.
        """
        if Path(path).suffix != ".pt2":
            raise UserError(f"path: expected a name that ends in .pt2, as torch.export wants it; found {str(path)!r}.")
        if "action" not in self.uses.get(use, ()):
            acting = [name for name, makes in self.uses.items() if "action" in makes]
            raise UserError(
                f"use {use!r}: expected one that makes actions, {', '.join(acting) or 'of which none is here'}."
            )
        expected, needed = self._expected(use, ())
        frames = len(self.description["window"]["obs"])
        like = {key: expected[key] for key in needed}
        like |= {f"obs/{key}": ((frames, width), "float32") for key, width in self._robot.states.items()}
        device, roles = self._runner.device, self.model.roles[use]
        dtypes = {"uint8": torch.uint8, "float32": torch.float32}
        inputs = {k: torch.zeros(2, *shape, dtype=dtypes[dtype], device=device) for k, (shape, dtype) in like.items()}
        noise = {
            m: torch.zeros(2, *shape, device=device)
            for m, shape in self.model.noise_shapes.items()
            if roles[m] != "given"
        }
        rows = torch.export.Dim("rows")
        dynamic = {key: {0: rows} for key in inputs}, {m: {0: rows} for m in noise}
        program = _Program(self.model, use, self._robot, self._chunk, self._newest, self.limits).to(device)
        with torch.no_grad():
            exported = torch.export.export(program, (inputs, noise), dynamic_shapes=dynamic)
        torch.export.save(exported, path, extra_files={DESCRIPTION_FILE: json.dumps(self.description)})

    # --- chunks of the robot's actions -------------------------------------------------------------

    def chunks(
        self,
        inputs: Mapping[str, np.ndarray],
        noise: Mapping[str, Any],
        promised: tuple[np.ndarray, np.ndarray] | None = None,
        *,
        guided: bool = False,
    ) -> np.ndarray:
        """Chunks (B, horizon, Dr) float32 of the use `policy`, within the limits; relative actions refer to the newest
        observation.

        Args:
          inputs: as `sample` takes them, with `obs/<key>` (B, T, D) of the states that relative actions refer to.
          noise: {modality: (B, ...)}.
          promised: (actions (B, horizon, Dr) of the robot, count (B,)): the first `count` rows are executed whatever is
            sampled, and returned as they are given.
          guided: whether they also guide the rest.

        Raises:
          RunError: the actions are not finite.
        """
        states = {key: torch.from_numpy(inputs[f"obs/{key}"][:, self._newest]) for key in self._robot.states}
        first = None if promised is None else np.arange(self.horizon) < np.asarray(promised[1])[:, None]
        inside = None if promised is None or first is None else self._inside(promised[0], first, states)
        made = self.sample("policy", inputs, noise, inside, guided)["action"]
        actions = self._robot.to_robot(torch.from_numpy(made[:, self._chunk]), states).numpy()
        if not (np.isfinite(made).all() and np.isfinite(actions).all()):
            raise RunError(
                "the policy's actions are not finite. Check the observations for extreme values, and the parameters."
            )
        if promised is not None and first is not None:
            actions = np.where(first[..., None], promised[0], actions)
        if self.limits is not None:
            within = np.clip(actions, *self.limits)
            self.cut += int((within != actions).sum())
            actions = within
        return actions

    def _inside(
        self, actions: np.ndarray, first: np.ndarray, states: Mapping[str, Tensor]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Robot actions (B, horizon, Dr) and which rows of them are promised, as `sample` takes them."""
        length, columns = self.model.noise_shapes["action"]
        raw = self._robot.to_model(torch.from_numpy(actions), states).to(self._runner.device)
        rows, mask = np.zeros((len(actions), length, columns), np.float32), np.zeros((len(actions), length), bool)
        # Rows that are not promised may mean no rotation.
        rows[:, self._chunk] = np.where(first[..., None], self.model.normalize("action", raw).cpu().numpy(), 0)
        mask[:, self._chunk] = first
        return rows, mask

    def _checked_limits(self, limits: Any) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each (Dr,) float32, of numbers, or one for all columns; None stands for no bound."""
        pair = []
        for unbounded, bounds in zip((-math.inf, math.inf), limits, strict=True):
            numbers = np.array([unbounded if x is None else x for x in np.asarray(bounds, object).ravel()], np.float32)
            if len(numbers) not in (1, self.width) or np.isnan(numbers).any():
                raise UserError(
                    f"limits: expected (low, high), each a number, or {self.width}, one for each column of the robot's "
                    f"action; found {bounds!r}."
                )
            pair.append(np.ascontiguousarray(np.broadcast_to(numbers, (self.width,))))
        if (crossed := pair[0] > pair[1]).any():
            raise UserError(
                f"limits: expected low <= high in every column, found otherwise in {np.flatnonzero(crossed)}."
            )
        return pair[0], pair[1]


class _Program(nn.Module):
    """What `Actor.export_program` writes: inputs and noise in, the robot's actions out."""

    def __init__(self, model: Model, use: str, robot: RobotActions, chunk: slice, newest: int, limits: Any):
        super().__init__()
        self.model, self.use, self.robot, self.chunk, self.newest = model, use, robot, chunk, newest
        low, high = (None, None) if limits is None else map(torch.tensor, limits)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, inputs: Tensors, noise: Tensors) -> Tensor:
        made = self.model(self.use, inputs, noise)["action"][:, self.chunk]
        states = {key: inputs[f"obs/{key}"][:, self.newest] for key in self.robot.states}
        actions = self.robot.to_robot(made, states)
        return actions if self.low is None else actions.clamp(self.low, self.high)


def _as_dtype(value: Any, dtype: str) -> tuple[np.ndarray, str]:
    """An array or tensor as uint8, bool, or float32 made of any finite numbers; and what is wrong with it, "" if
    nothing is."""
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except ValueError:  # lists of different lengths
        return np.zeros(0), "what is no array"
    fits = array.dtype.kind in "fiu" if dtype == "float32" else array.dtype == np.dtype(dtype)
    if not fits:
        return array, f"{array.dtype} {array.shape}"
    with np.errstate(over="ignore"):
        array = np.require(array.astype(dtype, copy=False), requirements=["C", "W"])  # as torch wants memory to be
    return array, "" if dtype != "float32" or np.isfinite(array).all() else "values that are not finite"


def _checked_seed(name: str, seed: Any) -> int:
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"{name}: expected integers from 0 on, found {seed!r}.")
    return int(seed)


# --- the policy: an observation of every step in, the next action out -----------------------------------------------

SWITCHES = ("wait", "naive", "replacement", "guided")  # from one chunk to the next: see `Policy`
HOLDING = ("replacement", "guided")  # those that promise rows
NEVER = -(1 << 40)  # a step that is before all others


class LateAnswer(RunError):
    """A chunk is not there although the one before it is used up, so that there is no action for some rows: a robot has
    to stop. `Policy.act` may be called again, with the next observation.

    Attributes:
      actions: (n, Dr) float32 of the rows that the call was for, NaN in those without an action.
    """

    def __init__(self, message: str, actions: np.ndarray):
        super().__init__(message)
        self.actions = actions


class Policy(Actor):
    """Acts in any number of episodes (rows) at once, as `uwm_jax.policy.Policy` does.

    Receding horizon: from the last observations a chunk of actions is sampled, of which `execute` are taken before the
    next one is asked for. Which older frames are shown follows from the window that the model was trained on; an
    episode's first observation fills its history. A chunk takes `delay` control steps until it is there. By `switch`,
    these steps are spent so:

        wait         the robot waits: its last action is repeated, and the chunk begins when it is there.
        naive        the robot goes on in the chunk before. Row k of a chunk that is asked for at step s is for step
                     s + k, so rows `delay` and later of the new one follow.
        replacement  as naive, and the first `delay` rows of the new chunk are promised: they are what is executed until
                     it is there, and the sampler holds them (`Sampler`).
        guided       as replacement, and the promised rows guide the others.

    The first chunk of an episode is waited for, and used from its first row on. Without a delay all are alike.

    With `deadline` None time is counted in calls of `act`: every answer takes `delay` steps exactly, for simulators.
    With a number of seconds, a thread samples while `act` goes on, and `act` waits so long at most for an answer that
    is due. One that is late is used when it comes; until then the robot goes on in the chunk before, and where that is
    used up `act` raises `LateAnswer`.

    Attributes:
      late: steps of rows that were acted on in the chunk before because an answer was late.
      stops: those for which there was no action.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        runner: Runner,
        *,
        execute: int | None = None,
        delay: int = 0,
        switch: str = "wait",
        seed: int = 0,
        deadline: float | None = None,
        limits: Any = None,
        source: str = "",
    ):
        super().__init__(description, runner, limits=limits, source=source)
        ready = self.horizon if switch == "wait" else self.horizon - delay
        self.execute = min(8, max(ready, 0)) if execute is None else execute
        self.delay, self.switch, self.deadline, self._seed = delay, switch, deadline, _checked_seed("seed", seed)
        self._check_times(stated=execute is not None or delay != 0)
        self._worker = None if deadline is None else ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._warm: set[int] = set()  # numbers of rows that the thread has run already
        self._awaited: list[tuple[np.ndarray, Future[np.ndarray]]] = []
        self.reset(1)

    def reset(self, seeds: int | Sequence[int]) -> None:
        """Starts episodes; what was seen before is forgotten.

        Args:
          seeds: of each row's noise, from 0 on, or the number of rows, whose seeds are 0, 1, 2, ...
        """
        each = range(seeds) if isinstance(seeds, int) else seeds
        self._seeds = [_checked_seed("seeds", seed) for seed in each]
        rows, d = len(self._seeds), self.description
        self.late = self.stops = 0
        self._step = np.zeros(rows, np.int64)  # calls of `act`
        self._decisions = np.zeros(rows, np.int64)
        self._chunks = np.zeros((rows, self.horizon, self.width), np.float32)
        self._origin = np.full(rows, NEVER)  # the step that the chunk's first row is for
        # The answer that is awaited: the step at which it was asked for, the first at which it may be used, whether its
        # first row is for the step at which it comes (else for that at which it was asked for), and, once it is there,
        # itself.
        self._asked, self._due = np.full(rows, NEVER), np.full(rows, NEVER)
        self._fresh, self._answered = np.zeros(rows, bool), np.zeros(rows, bool)
        self._answers = np.zeros_like(self._chunks)
        for _, future in self._awaited:
            future.cancel()
        self._awaited = []
        self._last = np.zeros((rows, self.width), np.float32)  # the action that was taken last
        self._seen = np.zeros(rows, bool)
        like: dict[str, tuple[tuple[int, ...], Any]] = {c: ((*size, 3), np.uint8) for c, size in d["cameras"].items()}
        like |= {key: ((width,), np.float32) for key, width in {**d["low_dim"], **self._robot.states}.items()}
        if d["text_dim"]:
            like["text"] = (d["text_dim"],), np.float32
        length = max(self._back) + 1
        self._frames = {key: np.zeros((rows, length, *shape), dtype) for key, (shape, dtype) in like.items()}
        if self._worker and rows not in self._warm:  # so that no answer is late because a program is new
            self._warm_up(np.arange(rows))

    def act(
        self, observation: Mapping[str, Any], rows: Sequence[int] | None = None, noise: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """The next action of each row; called once for every step of the episode.

        Args:
          observation: {camera: (n, H, W, 3) uint8; low-dimensional key: (n, D), raw units; "text": (n, E) where the
            model reads text; for relative actions, the state that they refer to: (n, D)}. Other keys are ignored.
          rows: (n,) which rows these are of; None: all.
          noise: {modality: (n, ...)} for the chunks that this call asks for; None: of `seed`, the row's seed and the
            number of its decision.

        Returns:
          (n, Dr) float32, the numbers that the robot takes, within the limits.

        Raises:
          UserError: naming every key that is missing or has an unfit shape, dtype or value.
          LateAnswer: some rows have no action.
          RunError: the sampled actions are not finite.
        """
        self._check_times(stated=True)
        at = np.arange(len(self._seeds)) if rows is None else np.asarray(rows, np.int64)
        if strange := [row for row in at.tolist() if not 0 <= row < len(self._seeds)]:
            raise UserError(f"rows: expected 0 to {len(self._seeds) - 1}, as reset was told; found {strange}.")
        for m, x in (noise or {}).items():
            if len(x) != len(at):
                raise UserError(f"noise of {m}: expected {len(at)} rows like the observation, found {len(x)}.")
        self._observe(observation, at)
        self._begin(at)
        due = (self._asked[at] == NEVER) & (self._step[at] - self._origin[at] >= self.execute)
        if due.any():
            self._ask(at[due], None if noise is None else {m: np.asarray(x)[due] for m, x in noise.items()})
            self._begin(at)
        used, late = self._step[at] - self._origin[at], (self._asked[at] != NEVER) & (self._step[at] >= self._due[at])
        action = self._chunks[at, np.minimum(used, self.horizon - 1)]
        waits = self.switch == "wait"
        idle = used >= (self.execute if waits else self.horizon)
        action[idle] = self._last[at[idle]]
        self._last[at] = action
        self._step[at] += 1
        self.late += int((late & ~idle).sum())
        if idle.any() and not waits:
            self._stop(at, idle, action)
        return action

    def close(self) -> None:
        """Ends the thread of a policy with a deadline."""
        if self._worker:
            self._worker.shutdown(cancel_futures=True)

    def _observe(self, observation: Mapping[str, Any], at: np.ndarray) -> None:
        """Takes in one step's observation; an episode's first one fills its whole history."""
        problems, checked = [], {}
        for key, frames in self._frames.items():
            shape, dtype = (len(at), *frames.shape[2:]), frames.dtype
            wanted = f"expected {dtype} {shape}"
            if key in self._robot.states and key not in self.description["low_dim"]:
                wanted += ", which the robot's actions are relative to"
            if key not in observation:
                problems.append(f"missing {key}: {wanted}")
                continue
            value, problem = _as_dtype(observation[key], dtype.name)
            if problem or value.shape != shape:
                problems.append(f"{key}: {wanted}, found {problem or f'{value.dtype} {value.shape}'}")
            checked[key] = value
        if problems:
            raise UserError(
                "the observation does not fit what the model was trained on:\n  "
                + "\n  ".join(problems)
                + f"\nIt has {', '.join(sorted(observation)) or 'no keys'}."
            )
        first = at[~self._seen[at]]
        self._seen[at] = True
        for key, value in checked.items():
            frames = self._frames[key]
            frames[at, :-1] = frames[at, 1:]
            frames[at, -1] = value
            frames[first] = frames[first, -1:]

    def _history(self, at: np.ndarray) -> dict[str, np.ndarray]:
        """What `chunks` takes of these rows."""
        back = [-1 - back for back in self._back]
        return {f"obs/{key}": x[at, -1] if key == "text" else x[at][:, back] for key, x in self._frames.items()}

    def _ask(self, at: np.ndarray, noise: Mapping[str, np.ndarray] | None) -> None:
        """Asks for chunks from what rows have seen up to now."""
        used = self._step[at] - self._origin[at]
        left = np.maximum(self.horizon - used, 0)  # rows of the chunk before, which go on to be executed
        waits = self.switch == "wait"
        ahead = np.minimum(left, self.delay)  # fewer than `delay` after a stop, and none at an episode's start
        self._asked[at], self._fresh[at] = self._step[at], (left == 0) | waits
        self._due[at] = self._step[at] + np.where(waits & (self._origin[at] != NEVER), self.delay, ahead)
        promised = None
        if self.switch in HOLDING and ahead.any():
            places = np.minimum(used[:, None] + np.arange(self.horizon), self.horizon - 1)
            promised = self._chunks[at[:, None], places], ahead
        inputs = self._history(at)
        if noise is None:
            noise = self._draw([(self._seed, self._seeds[row], int(self._decisions[row])) for row in at])
        self._decisions[at] += 1
        future: Future[np.ndarray] = Future()
        if self._worker:
            future = self._worker.submit(self.chunks, inputs, noise, promised, guided=self.switch == "guided")
        else:
            try:
                future.set_result(self.chunks(inputs, noise, promised, guided=self.switch == "guided"))
            except Exception as e:  # as a thread keeps it, for who asks for the result
                future.set_exception(e)
        self._awaited.append((at, future))

    def _begin(self, at: np.ndarray) -> None:
        """Goes over to the chunks that are there and due. One that has no row for this step any more is dropped."""
        self._collect(at)
        at = at[self._answered[at] & (self._step[at] >= self._due[at])]
        origin = np.where(self._fresh[at], self._step[at], self._asked[at])
        self._answered[at], self._asked[at] = False, NEVER
        useful = self._step[at] - origin < self.horizon
        at, origin = at[useful], origin[useful]
        self._chunks[at], self._origin[at] = self._answers[at], origin

    def _collect(self, at: np.ndarray) -> None:
        """Takes in the answers of the thread, and waits for those that are due as long as it may."""
        until = time.monotonic() + (self.deadline or 0)
        for rows, future in self._awaited:
            mine = rows[np.isin(rows, at)]
            if (self._origin[mine] == NEVER).any():
                wait([future])  # a robot that has not moved yet
            elif (self._step[mine] >= self._due[mine]).any():
                wait([future], max(0.0, until - time.monotonic()))
        awaited, self._awaited, errors = self._awaited, [], []
        ended: list[tuple[np.ndarray, Future[np.ndarray]]] = []
        for rows, future in awaited:  # which may end at any time: each is asked once
            (ended if future.done() else self._awaited).append((rows, future))
        for rows, future in ended:
            if error := future.exception():
                self._asked[rows] = NEVER  # so that it is asked for again
                errors.append(error)
            else:
                self._answers[rows], self._answered[rows] = future.result(), True
        if errors:
            raise errors[0]

    def _stop(self, at: np.ndarray, idle: np.ndarray, action: np.ndarray) -> None:
        """Raises LateAnswer."""
        self.stops += int(idle.sum())
        row = at[idle][0]
        raise LateAnswer(
            f"step {self._step[row] - 1} of row {row} has no action: the chunk that was asked for at step "
            f"{self._asked[row]} was due at step {self._due[row]} and is not there, and the one before it is used up "
            f"(stop {self.stops}). Allow more steps than delay={self.delay}, or sample in fewer.",
            np.where(idle[:, None], np.float32(np.nan), action),
        )

    def _warm_up(self, at: np.ndarray) -> None:
        self._warm.add(len(at))
        inputs, noise = self._history(at), self._draw([(0,)] * len(at))
        chunk = self.chunks(inputs, noise)
        if self.delay and self.switch in HOLDING:
            self.chunks(inputs, noise, (chunk, np.full(len(at), self.delay)), guided=self.switch == "guided")

    def _check_times(self, stated: bool) -> None:
        """Raises UserError where `execute` and `delay` do not suit the chunks.

        A model without actions of the present step, or exported without the use, may still be loaded for other uses:
        where nothing is `stated`, only `switch` is checked.
        """
        if self.switch not in SWITCHES:
            raise UserError(f"switch={self.switch!r}: expected one of {', '.join(SWITCHES)}.")
        if not stated:
            return
        if "policy" not in self.uses:
            raise UserError(f"this export answers {', '.join(self.uses)}, but not policy, so it cannot act.")
        about = (
            f"The model was trained on window.action={self.description['window']['action']}, of which {self.horizon} "
            f"follow each other step by step from the newest observed frame on."
        )
        if self.delay < 0:
            raise UserError(f"delay={self.delay}: expected 0 steps or more.")
        if not 1 <= self.execute <= self.horizon:
            expected = f"expected 1 to {self.horizon}" if self.horizon else "no number will do"
            raise UserError(f"execute={self.execute}: {expected}. {about}")
        if self.switch != "wait" and self.execute + self.delay > self.horizon:
            raise UserError(
                f"execute={self.execute} and delay={self.delay} with switch={self.switch}: expected at most "
                f"{self.horizon} together, since a chunk is executed until the next one is there. {about}"
            )
        if self.switch != "wait" and self.delay > self.execute:
            raise UserError(
                f"delay={self.delay} with switch={self.switch}: expected at most execute={self.execute}, since a chunk "
                "is asked for after the one before is there."
            )


# --- loading --------------------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    execute: int | None = None,
    delay: int = 0,
    switch: str = "wait",
    deadline: float | None = None,
    limits: tuple[Any, Any] | None = None,
    seed: int = 0,
    source: str = "",
    compile: bool = False,
    cuda_graphs: bool = False,
) -> Policy:
    """The policy of an export folder.

    Args:
      folder: with `model.safetensors` and `model.json`.
      device: where it runs.
      dtype: float32, or bfloat16 of the large products.
      execute: actions of each chunk that are taken before the next one is asked for; None: 8, or as many as there are.
      delay: control steps until a chunk is there, 0 to `execute`; but for `wait`, execute + delay is at most what the
        chunk has.
      switch: wait, naive, replacement or guided: see `Policy`.
      deadline: seconds that `act` waits for an answer that is due; None: time is counted in steps.
      limits: (low, high) of the robot's actions in its units, each a number, or (Dr,) with None for a column without a
        bound; those that the export states hold too.
      seed: of all noise that `act` draws.
      source: of the training data, whose robot acts; "" where all have actions of one convention.
      compile: whether `torch.compile` compiles the networks.
      cuda_graphs: whether a sample is recorded as a CUDA graph; CUDA devices alone.

    Raises:
      UserError: a file is missing or does not fit, or an argument does not.
    """
    device = _checked_device(device)
    if cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs=True needs a CUDA device, found device={str(device)!r}.")
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"dtype: expected torch.float32 or torch.bfloat16, found {dtype}.")
    description = read_description(folder)
    with _as_described(Path(folder) / DESCRIPTION_FILE):
        with torch.device("meta"):  # nothing is drawn at random that the file replaces
            codec = description["codec"]
            model = Model(description, bool(codec) and codec.get("included", True))
        _fill(model, Path(folder) / WEIGHTS_FILE)
        half_products(model, dtype)
        model.eval().requires_grad_(False).to(device)
        runner = Runner(model, device, compile, cuda_graphs)
        times: dict[str, Any] = {"execute": execute, "delay": delay, "switch": switch, "deadline": deadline}
        return Policy(description, runner, **times, seed=seed, limits=limits, source=source)


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:  # the latter of a torch that was built without CUDA
        told = str(e).splitlines()[0].rstrip(".")
        raise UserError(f"device={str(device)!r}: {told}.") from e
    return found


@contextlib.contextmanager
def _as_described(path: Path) -> Iterator[None]:
    """Turns what a damaged description leads to into an error that names the file."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise UserError(
            f"{path}: a field is missing or not as convert to-torch wrote it ({type(e).__name__}: {e}); export the "
            "model again."
        ) from e


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`model.json` of an export folder; UserError where there is none that this file can run."""
    path = Path(folder) / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); expected a folder of convert to-torch.") from e
    except ValueError as e:
        raise UserError(f"{path}: is not JSON ({e}); export the model again.") from e
    found = [description.get(name) for name in ("format", "format_version")] if isinstance(description, dict) else []
    if found != [FORMAT, FORMAT_VERSION]:
        raise UserError(f"{path}: expected format {FORMAT!r} of version {FORMAT_VERSION}, found {found}.")
    with _as_described(path):
        system = description["config"]["system"]
    if system not in SYSTEMS:
        raise UserError(f"{path}: a {system} model is exported as weights alone; this file runs {', '.join(SYSTEMS)}.")
    return description


def _fill(model: Model, path: Path) -> None:
    """Puts the tensors of a file into a model, float32."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; expected the parameters that convert to-torch writes.")
    try:
        found = {_current_name(name): tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: is not a readable safetensors file ({e}).") from e
    expected = model.state_dict()
    for name, like in expected.items():
        if (
            name in found
            and found[name].shape != like.shape
            and found[name].numel() == like.numel()
            and (".attentions." in name)
        ):
            found[name] = found[name].reshape(like.shape)  # stored as 1x1 convolutions
    faults = [f"missing tensor {name} {tuple(expected[name].shape)}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"extra tensor {name}" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"tensor {name} has shape {tuple(found[name].shape)}, expected {tuple(like.shape)}"
        for name, like in sorted(expected.items())
        if name in found and found[name].shape != like.shape
    ]
    if faults:
        raise UserError(
            f"{path}: the tensors are not those that {DESCRIPTION_FILE} describes:\n  " + "\n  ".join(faults)
        )
    model.load_state_dict(found, assign=True)


def _current_name(name: str) -> str:
    return _OLD_NAME.sub(lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.{m[3]}", name)
