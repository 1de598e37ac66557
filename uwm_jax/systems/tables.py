"""Tables about parameters that several systems have: AdaLN transformers and the ResNet observation encoder.

The first pattern of a table of mesh rules that matches a parameter's path counts (`*` matches any characters, slashes
too). A partition spec has one entry per axis of the array: None (whole), a mesh axis, or several mesh axes, the first
one outermost. The moments of the optimizer and the moving average lie as their parameters do. Where an axis of the
array is not divisible, mesh axes are left out from the right; the table that a run prints at its start shows what was
done.

Three quarters of all parameters are the AdaLN kernels (depth, features + timestep, 6, width), so they come first.
Both axes cut their width: it is a round number, while the features depend on cameras, frames and robot state.
Of the other products, `tensor` cuts heads and hidden units, on the way in by columns and on the way out by rows, so
that a block needs one sum over `tensor` after its attention and one after its MLP; `fsdp` cuts the other axis.

The ResNet's convolutions stay whole. They are 11.2 M parameters, 0.13 GB with their moments; cut along `fsdp`, their
kernels would be gathered twice a step and the gradients reduced, where gradients of whole ones take one sum, and on 16
devices a piece has 4 to 32 output channels of the 128 that a TPU computes at once.

Along `tensor` the image encoder is repeated (its rows are cut by `data` and `fsdp` only; a frozen codec's frames are
spread over all devices), so `tensor` pays where the transformer is what costs: small images, very wide models. Along
`fsdp` every part of `config.accumulation_steps` gathers the parameters and reduces the gradients again.
"""

from __future__ import annotations

ADALN_TRANSFORMER_RULES = (
    ("noise_pred_net/blocks/adaln/kernel", (None, None, None, ("tensor", "fsdp"))),
    ("noise_pred_net/blocks/adaln/down", (None, None, ("tensor", "fsdp"))),
    ("noise_pred_net/head/adaln/kernel", (None, None, ("tensor", "fsdp"))),
    ("noise_pred_net/adaln/kernel", (None, None, ("tensor", "fsdp"))),
    ("noise_pred_net/blocks/qkv/kernel", (None, "fsdp", None, "tensor", None)),
    ("noise_pred_net/blocks/qkv/bias", (None, None, "tensor", None)),
    ("noise_pred_net/blocks/proj/kernel", (None, "tensor", None, "fsdp")),
    ("noise_pred_net/blocks/fc1/kernel", (None, "fsdp", "tensor")),
    ("noise_pred_net/blocks/fc1/bias", (None, "tensor")),
    ("noise_pred_net/blocks/fc2/kernel", (None, "tensor", "fsdp")),
    ("noise_pred_net/*/fc1/kernel", ("fsdp", "tensor")),
    ("noise_pred_net/*/fc1/bias", ("tensor",)),
    ("noise_pred_net/*/fc2/kernel", ("tensor", "fsdp")),
    ("noise_pred_net/*/kernel", ("fsdp", None)),
)
RESNET_ENCODER_RULES = (
    ("obs_encoder/*/fc/kernel", ("fsdp", None)),
    ("obs_encoder/text_head/kernel", ("fsdp", None)),
    ("obs_encoder/*/kernel", ()),
)
WHOLE = (("*", ()),)  # all that no other rule names

ADALN_TRANSFORMER_GROUPS = (
    ("/adaln/", "adaln"),
    ("/qkv/", "attention"),
    ("/proj/", "attention"),
    ("/blocks/fc", "mlp"),
    ("", "tokens"),  # embeddings of actions, patches, positions, timesteps and registers, and the way back
)
RESNET_ENCODER_GROUPS = (("obs_encoder/", "obs_encoder"),)

# Where the raw values of actions and low-dimensional keys meet an AdaLN transformer.
ACTION_INTERFACE = ("noise_pred_net/action_encoder/fc1/kernel", "noise_pred_net/action_decoder/fc2/kernel")
_READS_CONDITION = {
    "official": "noise_pred_net/blocks/adaln/kernel",
    "shared": "noise_pred_net/adaln/kernel",
    "low_rank": "noise_pred_net/blocks/adaln/down",
}
ADALN_MISFITS = {
    "noise_pred_net/*adaln/*": (
        "The AdaLN kernels read the condition, whose width follows from views, frames, low-dim keys and text, and are "
        "other ones for each config.model.adaln; they start at zero and say most of what the blocks do, so little of "
        "the origin is left without them."
    )
}


def text_interface(use_language: bool) -> dict[str, tuple[str, ...]]:
    """{"text": the arrays of the ResNet encoder that read the text embedding}; empty where it reads none."""
    return {"text": ("obs_encoder/text_head/kernel",)} if use_language else {}


def condition_interface(adaln: str) -> tuple[str, ...]:
    """The arrays that read the condition with `config.model.adaln`."""
    return _READS_CONDITION[adaln], "noise_pred_net/head/adaln/kernel"
