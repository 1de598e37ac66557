"""The training losses on held-out windows, with draws that depend on the window alone."""

from __future__ import annotations

from typing import Any

import jax

from uwm_jax.evaluation.evaluator import Each, Evaluator, join
from uwm_jax.evaluation.metrics import Metrics, summarize
from uwm_jax.training.step import make_eval_step


class HeldOutLosses:
    """Measures the losses of a model's parameters on the windows of an `Evaluator`; `compile` comes first."""

    def __init__(self, evaluator: Evaluator):
        self._evaluator = evaluator

    def compile(self, params: Any, frozen: Any) -> list[Any]:
        """Compiles the program and returns it; arguments as for `Evaluator.compile`."""
        evaluator = self._evaluator
        self._losses = evaluator.program(make_eval_step(evaluator.system), params, frozen, evaluator.example())
        return [self._losses]

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that `run` measures; `compile` comes first."""
        tree = self._losses.out_tree
        return frozenset(jax.tree.unflatten(tree, range(tree.num_leaves)))

    def run(self, params: Any, frozen: Any, *, each: Each = iter) -> Metrics:
        """{`loss/<part>`: interval over windows}, unweighted; `each` as for `Evaluator.run`.

        Raises:
          RunError: a loss is NaN or infinite.
        """
        found = [jax.device_get(self._losses(params, frozen, batch)) for batch in each(self._evaluator.batches())]
        windows = self._evaluator.held_out
        return summarize(join(found, len(windows)), windows.episodes, {})
