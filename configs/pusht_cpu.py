"""PushT on two CPU cores in an hour: `configs/quickstart.py` with more demonstrations, steps and one more block.
In PushT a blue disc has to push a grey T onto the green one, and an action is the position that the disc is sent to.

Command:
    python -m data_prep.demo --episodes=1000 --output=${UWM_DATA_DIR:-data}/pusht_1000
    python -m uwm_jax.train --config=configs/pusht_cpu.py --workdir=runs/pusht_cpu
    python -m uwm_jax.evaluate --workdir=runs/pusht_cpu
    python -m uwm_jax.rollout --workdir=runs/pusht_cpu --env=pusht --episodes=50

`configs/pusht_cpu.py:short` trains for 1,000 steps, for comparing seeds and settings; the comparison systems are
below.

Hardware: two CPU cores.

Expect: 26 minutes of training at 200 to 225 samples a second on two shared cores, and a minute for the 4 evaluations in
it; twice that at the 100 samples a second that such cores made on another day. 3 to 8 minutes for the demonstrations, 1
to 3 for the two commands after it. One seed, 256 held-out windows of 100 episodes, 95 % intervals over episodes:

    policy   action MSE 0.034 [0.029, 0.039], normalised; the mean action has 0.109 [0.101, 0.119]
    inverse  action MSE 0.011 [0.009, 0.014], a tenth of the mean action's; a straight line to the chunk's end, which
             knows where that is, has 0.019 [0.017, 0.021]: paired, 0.0080 [0.0050, 0.0110] more
    joint    action MSE 0.032 [0.028, 0.038], PSNR 26.2 dB [25.9, 26.4]
    forward  PSNR 26.3 dB [26.0, 26.5]; shuffle gap 0.056 [0.045, 0.068]; as samples, another window's actions cost
             0.00015 [0.00009, 0.00021] more on all pixels and 0.0026 [0.0013, 0.0039] on those that changed
    video    PSNR 26.2 dB [25.9, 26.4]; the current frame has 25.3 dB [24.9, 25.6], the mean image 26.1 [25.9, 26.3]

    closed loop, 50 starts: mean best coverage 0.716 [0.668, 0.761], 3 solved; random targets 0.150 [0.100, 0.201], held
    for 8 steps 0.191 [0.138, 0.247]; expert 0.963 [0.960, 0.966]; doing nothing 0.133 [0.085, 0.182]

The short form, seeds 0 to 2: policy 0.050 to 0.059, inverse 0.043 to 0.051, mean best coverage 0.27 to 0.31.

Comparison systems, `configs/pusht_cpu.py:SYSTEM[,short]`: `dp`, `dp_unet`, `dp_flow` (Diffusion Policy: transformer,
1-D U-Net, flow matching), `pad`, `gr1`; `uwm` is the model above. All have the same demonstrations, steps, batch and
evaluations of the network in a sample, about the same width and depth, and are measured on the same held-out windows.
Each has the inputs of its official code: UWM and DP see frames and the disc's position, PAD and GR1 frames alone.
Diffusion systems predict x0 here, flow matching its velocity; GR1's ViT starts from random parameters.
docs/comparisons.md has the results.
"""

from ml_collections import ConfigDict

from configs import quickstart
from uwm_jax.config import base

SYSTEMS = ("uwm", "dp", "dp_unet", "dp_flow", "pad", "gr1")
STEPS = {"full": 10_000, "short": 1_000}
RESERVE = (0, 18)  # steps that the longest window, UWM's, reaches: shorter ones have the same held-out windows


data_sizes = quickstart.data_sizes


def get_config(argument: str = "uwm") -> ConfigDict:
    name, _, length = argument.partition(",")
    if name in STEPS:
        name, length = "uwm", name
    length = length or "full"
    if name not in SYSTEMS or length not in STEPS:
        raise ValueError(
            f"unknown argument {argument!r}, expected one of {', '.join(SYSTEMS)}, alone or with ,short; or full, short"
        )
    c = {"uwm": _uwm, "pad": _pad, "gr1": _gr1}.get(name, _dp)(name)
    c.total_steps = STEPS[length]
    c.log_every = 100
    c.checkpoint.every = 1_000
    c.checkpoint.keep = 2
    c.eval.every = 2_500 if length == "full" else 0  # held-out curves
    c.data.path = "pusht_1000"
    c.optimizer.warmup_steps = 200
    c.optimizer.ema_decay = 0.999 if length == "full" else 0.99  # an average over a tenth of the run
    c.optimizer.ema_warmup = "none"  # as in the runs whose numbers stand above
    return c


def _uwm(name: str) -> ConfigDict:
    c = quickstart.get_config()
    c.model.depth = 4
    return c


def _dp(name: str) -> ConfigDict:
    c = base("dp")
    quickstart.use_demonstrations(c)
    c.data.window.reserve = RESERVE
    quickstart.use_small_resnet(c)
    c.model.embed_dim, c.model.timestep_embed_dim = 128, 128
    if name == "dp_unet":
        c.model.predictor = "unet"
        c.model.unet.down_dims = (64, 128, 256)
    else:
        c.model.depth, c.model.num_heads = 4, 4
    if name == "dp_flow":
        c.diffusion.kind = "flow"
    else:
        c.diffusion.prediction.action = "sample"
        c.diffusion.spacing = "trailing"
    return c


def _pad(name: str) -> ConfigDict:
    c = base("pad")
    quickstart.use_demonstrations(c)
    c.data.low_dim = ()
    c.model.embed_dim, c.model.depth, c.model.num_heads = 128, 4, 4
    c.model.timestep_embed_dim = 128
    c.model.patch = (2, 2, 2)
    c.model.codec.name = "pca"
    c.diffusion.prediction.action = c.diffusion.prediction.next_obs = "sample"
    c.diffusion.spacing = "trailing"
    c.loss.weights.action = 5.0
    return c


def _gr1(name: str) -> ConfigDict:
    c = base("gr1")
    quickstart.use_demonstrations(c)
    c.data.low_dim = ()
    c.model.embed_dim, c.model.depth, c.model.num_heads = 128, 4, 4
    c.model.patch = (16, 16)  # pixels: as many tokens a frame as the other systems' video has
    c.model.encoder.patch, c.model.encoder.width, c.model.encoder.depth, c.model.encoder.mlp_dim = 16, 128, 3, 512
    c.model.resampler.depth, c.model.resampler.head_dim = 2, 32
    c.model.decoder.depth, c.model.decoder.num_heads = 2, 4
    c.optimizer.learning_rate = 3e-4  # at the others' rate, 1,000 steps leave it at the mean action and frame
    c.loss.weights.action = 5.0
    return c
