"""The network as a plain PyTorch module, with the names of the official state dict.

Written from the paper (arXiv:2504.02792) and the published shapes, in the eager form of the official code: each
evaluation computes all of the network, modulations too. It is the baseline of `benchmark_step` and
`benchmark_inference`. What exports run is another network of the same tensors, `uwm_torch.py`.

    network = UWM.from_description(description)  # of `convert to-torch`
    features = network.encode_obs(images)
    prediction = network(features, noisy, timestep)

Arrays at its edge are those of our Flax network, channels last: images (B, V, T, H, W, 3) in [0, 1], latents
(B, V, T, h, w, C). Parameters lie in torch's layouts (`uwm_jax.torch_bridge.layout` maps the two). Products run in
float32; `torch.autocast` makes the large ones bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uwm_jax.torch_bridge.torch_codecs import codec_from_description

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHANNELS_PER_GROUP = 16
INIT_STD = 0.02

Arrays = Mapping[str, Tensor]


class UWM(nn.Module):
    """Observation encoder, image codec and noise-prediction network: `obs_encoder.*` and `noise_pred_net.*`.

    Args:
      model: `config.model`, or the JSON of it; options that only steer JAX's compilation are ignored.
      action_shape: (Ta, Da) of an action chunk.
      latent_shape: (V, T, h, w, C) of the next observation's latents; V views and T frames are the current one's too.
      crop: (height, width) of the images.
      low_dim: {key: D}, read in sorted order of keys when `model.encoder.use_low_dim`.
      text_dim: width of the text embedding when `model.encoder.use_language`.
      codec: a module of `torch_codecs`, or None where frames are never encoded; its parameters stay frozen.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        action_shape: Sequence[int],
        latent_shape: Sequence[int],
        crop: Sequence[int],
        low_dim: Mapping[str, int] | None = None,
        text_dim: int = 0,
        codec: nn.Module | None = None,
    ):
        super().__init__()
        width, encoder = model["embed_dim"], model["encoder"]
        views, frames = latent_shape[:2]
        features = views * frames * width
        if encoder["use_low_dim"]:
            features += frames * sum((low_dim or {}).values())
        if encoder["use_language"]:
            features += width
        self.obs_encoder = ObsEncoder(encoder, width, crop, text_dim, codec)
        self.noise_pred_net = NoisePredNet(model, features, action_shape, latent_shape)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> UWM:
        """The network that the `.json` of a `to-torch` export describes, with fresh weights."""
        return cls(
            description["config"]["model"],
            action_shape=description["shapes"]["action"],
            latent_shape=description["shapes"]["next_obs_latent"],
            crop=description["images"]["crop"],
            low_dim=description["low_dim"],
            text_dim=description["text_dim"],
            codec=codec_from_description(description),
        )

    def encode_obs(self, images: Tensor, low_dim: Arrays | None = None, text: Tensor | None = None) -> Tensor:
        """Features (B, F) of the current observation, as `uwm_jax.models.obs_encoder.ObsEncoder` orders them.

        Args:
          images: (B, V, T, H, W, 3) in [0, 1], views in sorted order of camera names.
          low_dim: {key: (B, T, D)}, normalised.
          text: (B, E).
        """
        return self.obs_encoder(images, low_dim, text)

    def encode_frames(self, images: Tensor, sample: bool = False) -> Tensor:
        """Latents (B, V, T, h, w, C) of images (B, V, T, H, W, 3); no gradient. `sample` draws from the posterior."""
        with torch.no_grad():
            return self.obs_encoder.codec.encode(images, sample)

    def forward(self, global_cond: Tensor, noisy: Arrays, timestep: Arrays) -> dict[str, Tensor]:
        """One evaluation; see `NoisePredNet`."""
        return self.noise_pred_net(global_cond, noisy, timestep)


class NoisePredNet(nn.Module):
    """The diffusion transformer: predictions for noisy actions and noisy latents.

    `noisy` and the result are {"action": (B, Ta, Da), "next_obs": (B, V, T, h, w, C)}, `timestep` is {modality: (B,)}
    integers, `global_cond` (B, F). A fresh network predicts 0.
    """

    def __init__(
        self, model: Mapping[str, Any], features: int, action_shape: Sequence[int], latent_shape: Sequence[int]
    ):
        super().__init__()
        width = model["embed_dim"]
        self.action_len, action_dim = action_shape
        hidden, cond = 4 * max(action_dim, width), features + model["timestep_embed_dim"]
        patchifier = Patchifier(latent_shape, model["patch"], width)
        tokens = self.action_len + patchifier.tokens + model["num_registers"]
        # Order matters to what numbers the parameters: it is the official one.
        if model["num_registers"]:
            self.registers = nn.Parameter(torch.empty(1, model["num_registers"], width))
        else:
            self.registers = None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.obs_patchifier = patchifier
        self.action_encoder = nn.Sequential(nn.Linear(action_dim, hidden), nn.Mish(), nn.Linear(hidden, width))
        self.action_decoder = nn.Sequential(nn.Linear(width, hidden), nn.Mish(), nn.Linear(hidden, action_dim))
        self.timestep_embedding = TimestepEmbedding(model["timestep_embed_dim"])
        self.blocks = nn.ModuleList(
            Block(width, model["num_heads"], model["mlp_ratio"], model["qkv_bias"], cond) for _ in range(model["depth"])
        )
        self.head = Head(width, cond)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) weights and zero biases; modulations and the final projection are zero (AdaLN-zero)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("head."):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, global_cond: Tensor, noisy: Arrays, timestep: Arrays) -> dict[str, Tensor]:
        cond = torch.cat([global_cond, self.timestep_embedding(timestep)], dim=-1)
        parts = [self.action_encoder(noisy["action"]), self.obs_patchifier(noisy["next_obs"])]
        if self.registers is not None:
            parts.append(self.registers.expand(len(cond), -1, -1))
        x = torch.cat(parts, dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x, cond)
        x = self.head(x, cond)
        end = self.action_len + self.obs_patchifier.tokens
        return {
            "action": self.action_decoder(x[:, : self.action_len]),
            "next_obs": self.obs_patchifier.decode(x[:, self.action_len : end]),
        }


class Patchifier(nn.Module):
    """Latents (B, V, T, h, w, C) to tokens over (view, frame, row, column), and back."""

    def __init__(self, latent_shape: Sequence[int], patch: Sequence[int], width: int):
        super().__init__()
        views, *grid, channels = latent_shape
        self.patch, self.views, self.channels = tuple(patch), views, channels
        if any(n % p for n, p in zip(grid, patch, strict=True)):
            raise ValueError(f"patch {tuple(patch)} (frames, rows, columns) must divide the latents' {tuple(grid)}")
        self.grid = tuple(n // p for n, p in zip(grid, patch, strict=True))
        self.patch_encoder = nn.Conv3d(channels, width, kernel_size=self.patch, stride=self.patch)
        self.patch_decoder = nn.Linear(width, channels * math.prod(self.patch))

    @property
    def tokens(self) -> int:
        return self.views * math.prod(self.grid)

    def forward(self, latents: Tensor) -> Tensor:
        x = latents.flatten(0, 1).movedim(-1, 1)  # (B * V, C, T, h, w)
        x = self.patch_encoder(x).flatten(2).transpose(1, 2)
        return x.reshape(len(latents), self.tokens, -1)

    def decode(self, tokens: Tensor) -> Tensor:
        x = self.patch_decoder(tokens).reshape(-1, self.views, *self.grid, self.channels, *self.patch)
        x = x.permute(0, 1, 2, 6, 3, 7, 4, 8, 5)  # (B, V, t, pt, h, ph, w, pw, C)
        size = (n * p for n, p in zip(self.grid, self.patch, strict=True))
        return x.reshape(-1, self.views, *size, self.channels)


class TimestepEmbedding(nn.Module):
    """Joint embedding (B, dim) of both timesteps: sines then cosines of each, through an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        frequency = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000.0) / (half - 1)))
        self.register_buffer("frequency", frequency.float(), persistent=False)
        self.proj = nn.Sequential(nn.Linear(2 * dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def sinusoid(self, timestep: Tensor) -> Tensor:
        """(...,) integers -> (..., dim) float32."""
        phase = timestep[..., None].float() * self.frequency
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def forward(self, timestep: Arrays) -> Tensor:
        return self.proj(torch.cat([self.sinusoid(timestep["action"]), self.sinusoid(timestep["next_obs"])], dim=-1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of tokens (B, L, D) without parameters, scaled and shifted by (B, D) each."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, D / heads)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block; the condition (B, F + T) gives shift, scale and gate of the attention and of the MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, cond: int):
        super().__init__()
        self.attn = Attention(width, heads, qkv_bias)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond, 6 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))


class Head(nn.Module):
    """The modulated final projection (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, cond: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond, 2 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(cond).chunk(2, dim=-1)))


class ObsEncoder(nn.Module):
    """`img_encoder`, `text_encoder.head` and, under its official name, the image codec."""

    def __init__(
        self, encoder: Mapping[str, Any], width: int, crop: Sequence[int], text_dim: int, codec: nn.Module | None
    ):
        super().__init__()
        self.use_low_dim, self.use_language = encoder["use_low_dim"], encoder["use_language"]
        self.img_encoder = ImageEncoder(ResNet(encoder["stage_sizes"], encoder["width"], width, encoder["pool"], crop))
        if self.use_language:
            self.text_encoder = nn.ModuleDict({"head": nn.Linear(text_dim, width)})
        self._codec = ""
        if codec is not None:
            self._codec = codec.name
            self.add_module(codec.name, codec.requires_grad_(False))

    @property
    def codec(self) -> Any:
        if not self._codec:
            raise ValueError("this network was made without an image codec")
        return self.get_submodule(self._codec)

    def forward(self, images: Tensor, low_dim: Arrays | None, text: Tensor | None) -> Tensor:
        features = [self.img_encoder(images.flatten(0, 2)).reshape(len(images), -1)]
        if self.use_low_dim:
            if not low_dim:
                raise ValueError("use_low_dim needs at least one low-dim observation, found none")
            features.append(torch.cat([low_dim[key] for key in sorted(low_dim)], dim=-1).flatten(1))
        if self.use_language:
            if text is None:
                raise ValueError("use_language needs a text embedding (B, E), found none")
            features.append(self.text_encoder["head"](text))
        return torch.cat(features, dim=-1)


class ImageEncoder(nn.Module):
    """Images (N, H, W, 3) in [0, 1] -> (N, width): ImageNet's normalisation, then `model`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images.movedim(-1, 1) - self.mean) / self.std)


class ResNet(nn.Module):
    """ResNet of basic blocks with torchvision's names, GroupNorm under those of BatchNorm.

    Args:
      stage_sizes, width, pool: as in `uwm_jax.models.resnet.ResNet`.
      outputs: features of `fc`.
      image_size: (height, width), on which `fc` depends with pool "flatten".
    """

    def __init__(self, stage_sizes: Sequence[int], width: int, outputs: int, pool: str, image_size: Sequence[int]):
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = _norm(width)
        self.stages = [f"layer{stage + 1}" for stage in range(len(stage_sizes))]
        channels, rows, columns = width, *(_half(_half(n)) for n in image_size)  # conv1 and the pooling
        for stage, (name, blocks) in enumerate(zip(self.stages, stage_sizes, strict=True)):
            out, stride = width * 2**stage, 2 if stage else 1
            first = BasicBlock(channels, out, stride)
            self.add_module(name, nn.Sequential(first, *(BasicBlock(out, out, 1) for _ in range(blocks - 1))))
            channels = out
            if stage:
                rows, columns = _half(rows), _half(columns)
        self.fc = nn.Linear(channels * (rows * columns if pool == "flatten" else 1), outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, outputs)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        # Flattened maps run over (row, column, channel).
        x = x.mean(dim=(2, 3)) if self.pool == "average" else x.movedim(1, -1).flatten(1)
        return self.fc(x)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _norm(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), _norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(self.downsample(x) + y)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels, eps=1e-5)


def _half(n: int) -> int:
    """Rows that are left after a convolution or pooling of stride 2."""
    return -(-n // 2)
