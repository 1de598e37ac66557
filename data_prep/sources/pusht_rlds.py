"""The TFDS builder of the PushT demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class PushtExpert(tfds.core.GeneratorBasedBuilder):
    """PushT demonstrations as RLDS. Writing and reading them in ArrayRecord needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, image_size: int, records: Callable[[], Iterable[dict[str, Any]]], **kwargs: Any):
        """records: called once, gives the episodes in the order in which they are written."""
        self._image_size, self._records = image_size, records
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        pixels = (self._image_size, self._image_size, 3)
        step = {
            "observation": features.FeaturesDict(
                {
                    "image": features.Image(shape=pixels, encoding_format="png", doc="the board from above"),
                    "agent_pos": features.Tensor(shape=(2,), dtype=np.float32, doc="x, y in [0, 512], y downwards"),
                }
            ),
            "action": features.Tensor(
                shape=(2,), dtype=np.float32, doc="absolute position in [0, 512] that the agent is pulled towards"
            ),
            "reward": features.Scalar(np.float32, doc="share of the goal that is covered, over 0.95, at most 1"),
            "discount": features.Scalar(np.float32),
            "is_first": features.Scalar(np.bool_),
            "is_last": features.Scalar(np.bool_),
            "is_terminal": features.Scalar(np.bool_, doc="the goal is covered to 95 %"),
        }
        metadata = {
            "seed": features.Scalar(np.int64, doc="`PushTEnv.reset(seed=...)` starts this episode"),
            "final_coverage": features.Scalar(np.float32, doc="share of the goal that the block covers in the end"),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="PushT (gym-pusht) solved by sampling MPC; every episode ends with the goal covered.",
            features=features.FeaturesDict(
                {"steps": features.Dataset(step), "episode_metadata": features.FeaturesDict(metadata)}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._records())
