"""The config fields of one source of a mixture, which configs make by `uwm_jax.config.source`."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def source(**fields: Any) -> ConfigDict:
    """One source of `config.data.sources`; `fields` change the defaults."""
    s = ConfigDict()
    s.path = ""  # as config.data.path; "" = that one
    s.split = ""  # as config.data.split; "" = that one
    s.weight = 1.0  # share of the samples, relative to the other sources; may change when a run continues
    s.use_actions = True  # False: its actions are not used, as with video; rows have action_mask False
    # Conditions of which an episode must meet one: a string that its path contains, or (key, string) that this text of
    # the episode contains. Strings of one key are alternatives, and every key that occurs must match:
    # ("success", ("recording_folderpath", "LAB")). () = all episodes
    s.include = ()
    s.exclude = ()  # conditions, as in include, of which an episode may meet none
    s.path_key = "episode_metadata/file_path"  # key of the episode's path
    s.max_episodes = 0  # at most so many of the episodes that pass, held-out ones included; 0 = all
    s.max_episodes_seed = 0  # decides which episodes max_episodes takes
    s.cameras = ()  # this source's keys for config.data.cameras, in that order; () = the same keys
    # What a source without actions shows in views that it has no camera for: same (its first camera), none (black; its
    # camera's view is drawn for each sample), random (other windows of the source)
    s.fill_views = "same"
    s.action = ()  # as config.data.action; () = that one
    s.update(fields)
    return s
