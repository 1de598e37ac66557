"""GR-1 (Wu et al., 2023, arXiv 2312.13139) as the baseline of the UWM paper has it."""

from uwm_jax.systems import fields
from uwm_jax.systems.base import SystemType
from uwm_jax.systems.gr1 import config
from uwm_jax.systems.gr1.official_run import OFFICIAL
from uwm_jax.systems.gr1.system import ACTING, GR1, USES
from uwm_jax.systems.gr1.tree import TREE

SYSTEM = SystemType(
    name="gr1",
    title="GR-1",
    add_fields=config.add_fields,
    check=config.check,
    make=GR1,
    tree=lambda config: TREE,
    uses=USES,
    acting=ACTING,
    fields=config.FIELDS,
    at_least_one=config.AT_LEAST_ONE,
    optional=fields.OPTIONAL,
    official=OFFICIAL,
)
