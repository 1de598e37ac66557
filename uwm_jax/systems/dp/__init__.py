"""Diffusion Policy (Chi et al. 2023, arXiv:2303.04137), as the Unified World Models code compares itself with it."""

from uwm_jax.systems import fields
from uwm_jax.systems.base import SystemType
from uwm_jax.systems.dp import config
from uwm_jax.systems.dp.official import OFFICIAL
from uwm_jax.systems.dp.system import ACTING, DP, USES
from uwm_jax.systems.dp.tree import tree

SYSTEM = SystemType(
    name="dp",
    title="Diffusion Policy",
    add_fields=config.add_fields,
    check=config.check,
    make=DP,
    tree=tree,
    uses=USES,
    acting=ACTING,
    fields=config.FIELDS,
    choices=config.CHOICES,
    at_least_one=("model.unet.kernel_size", "model.unet.groups", "diffusion.num_train_noise_samples"),
    optional=fields.OPTIONAL,
    remarks=config.remarks,
    official=OFFICIAL,
)
