"""Prediction with Action (Guo et al. 2024, arXiv 2411.18179), as Unified World Models compares itself with it."""

from uwm_jax.systems import fields
from uwm_jax.systems.base import SystemType
from uwm_jax.systems.pad import config
from uwm_jax.systems.pad.official import OFFICIAL
from uwm_jax.systems.pad.system import ACTING, PAD, USES
from uwm_jax.systems.pad.tree import TREE

SYSTEM = SystemType(
    name="pad",
    title="PAD",
    add_fields=config.add_fields,
    check=config.check,
    make=PAD,
    tree=lambda config: TREE,
    uses=USES,
    acting=ACTING,
    latents=("obs", "next_obs"),
    fields=config.FIELDS,
    optional=fields.OPTIONAL,
    remarks=config.remarks,
    official=OFFICIAL,
)
