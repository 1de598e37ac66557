"""The Unified World Model (Zhu et al., RSS 2025, arXiv 2504.02792)."""

from uwm_jax.systems import fields
from uwm_jax.systems.base import SystemType
from uwm_jax.systems.uwm import config, words
from uwm_jax.systems.uwm.modes import ACTING, USES
from uwm_jax.systems.uwm.official import OFFICIAL
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.systems.uwm.tree import tree

SYSTEM = SystemType(
    name="uwm",
    title="Unified World Model",
    add_fields=config.add_fields,
    check=config.check,
    make=UWM,
    tree=tree,
    uses=USES,
    acting=ACTING,
    latents=("next_obs",),
    introduction=words.INTRODUCTION,
    questions=words.QUESTIONS,
    fields=config.FIELDS,
    choices=config.CHOICES,
    optional=fields.OPTIONAL,
    remarks=fields.about_clip,
    official=OFFICIAL,
)
