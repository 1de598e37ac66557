"""Layout of the arrays of a Unified World Model on the mesh (`data`, `fsdp`, `tensor`).

    python -m uwm_jax.train --config=configs/droid.py --workdir=runs/droid --config.mesh.fsdp=8

`PARAMS` is read from the top for every parameter; the first pattern that matches its path counts (`*` matches any
text, slashes too). A partition spec has one entry per axis of the array: None (whole), a mesh axis, or several mesh
axes, the first one outermost. The moments of the optimizer and the moving average lie as their parameters do. Where
an axis of the array is not divisible, mesh axes are left out from the right; the table that a run prints at its start
shows what was done. `ACTIVATIONS` does the same for the axis names of `uwm_jax.models.activations`.

Three quarters of all parameters are the AdaLN kernels (depth, features + timestep, 6, width), so they come first.
Both axes cut their width: it is a round number, while the features depend on cameras, frames and robot state.
Of the other products, `tensor` cuts heads and hidden units, on the way in by columns and on the way out by rows, so
that a block needs one sum over `tensor` after its attention and one after its MLP; `fsdp` cuts the other axis.

Along `tensor` the frozen codec and the image encoder are repeated (their rows are cut by `data` and `fsdp` only), so
`tensor` pays where the transformer is what costs: batches of latents, very wide models. Along `fsdp` every part of
`config.accumulation_steps` gathers the parameters and reduces the gradients again.
"""

PARAMS = (
    ("noise_pred_net/blocks/adaln/kernel", (None, None, None, ("tensor", "fsdp"))),
    ("noise_pred_net/head/adaln/kernel", (None, None, ("tensor", "fsdp"))),
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
    ("obs_encoder/*/fc/kernel", ("fsdp", None)),
    ("obs_encoder/text_head/kernel", ("fsdp", None)),
    ("obs_encoder/*/kernel", (None, None, None, "fsdp")),
    ("*", ()),
)

ACTIVATIONS = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("heads", "tensor"),
    ("hidden", "tensor"),
)
