"""Config fields of data: `config.data`, and a source of a mixture, which configs make by `uwm_jax.config.source`."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def data_fields() -> ConfigDict:
    """`config.data` with its defaults."""
    d = ConfigDict()
    d.path = "droid"  # dataset directory, relative to $UWM_DATA_DIR (default data/) unless absolute
    # of the order of samples, their augmentation and the codec's posterior; -1 = config.seed
    d.seed = -1
    d.split = "train"  # the dataset's own split; validation episodes are held out of it
    d.sources = ConfigDict()  # {name: source()} of a mixture; empty = data.path alone
    # observation keys of the images, one view each; of one size after resizing
    d.cameras = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    # {name: keys}: a name for `cameras` (or `text`) that stands for one of these keys, drawn for each sample; held-out
    # windows take the first. A policy's observation has the name: {"exterior": ("exterior_image_1_left", ...)}
    d.choices = ConfigDict()
    d.low_dim = ()  # observation keys of low-dimensional state, e.g. ("gripper_position",)
    # step key of a precomputed text embedding, or of a string with text_table; also a name of choices; "" = none
    d.text = ""
    # name of the table of embeddings that data_prep.text made of each dataset's strings, such as "clip"; "" = none
    d.text_table = ""
    # pairs (step key, transform) that make the action, joined in this order, e.g. (("action[:6]", "xyz_rpy_to_rot6d"),
    # ("action[6:]", "gripper_inverted")): docs/choosing.md; uwm_jax.config.preset("bridge"), or droid, libero
    d.action = (("action", "identity"),)
    d.window = ConfigDict()  # a group of steps that is () is absent: it is neither in batches nor decoded
    d.window.obs = (0, 1)  # current frames, in steps from the window's origin
    d.window.action = tuple(range(1, 17))  # steps of the action chunk, from the window's origin
    d.window.next_obs = (17, 18)  # frames to predict, in steps from the window's origin
    d.window.pad = "none"  # none: windows lie inside the episode; edge: its first and last step are repeated
    # () or (first, last) steps that lie inside the episode as well, unread, so that configs with shorter windows have
    # the windows (episode and origin) of the longest
    d.window.reserve = ()
    # whether to leave out episodes with NaN or infinity, or numbers that mean no rotation, in the keys that are read
    d.drop_nonfinite = False
    # ranges of steps at which the present frame of a window lies: the name that data_prep.ranges gave them, or the path
    # of a .json of openpi; "" = everywhere
    d.ranges = ""
    # pairs (step key of the action or columns of it, bound in its units before the transform): windows with an action
    # beyond +-bound are left out, e.g. (("action_dict/cartesian_velocity", 1.0),) or (("action[:6]", 0.2),)
    d.max_action = ()
    d.val_ratio = 0.05  # share of episodes held out for evaluation
    # of an episode, where the data mark it by is_last (RLDS leaves it undefined): drop, or keep (official)
    d.last_action = "drop"
    # of actions and low-dimensional state, to [-1, 1]: minmax, quantile (1 % to 99 %), none
    d.normalize = "minmax"
    # streams that the windows are divided among, each shuffled within its own range; fixes the order
    d.num_streams = 1024
    d.num_threads = 4  # threads that read and decode, in each process
    # windows whose reads from a bucket are under way before a thread asks for them; a window takes some MB
    d.read_ahead = 64
    d.prefetch = 4  # batches that are on the device ahead of the step
    # bad records (damaged, at odds with the manifest, unreadable) that a run bears: their rows repeat earlier ones of
    # their streams; one more ends it
    d.max_bad_records = 0
    # seconds after which a read of a record is tried again, as after a passing error of the disk; 0 = none
    d.read_timeout_seconds = 0.0
    d.resize = (240, 320)  # (height, width) that camera images are resized to
    d.crop = (224, 224)  # (height, width) of the crop: random in training where data.augment says so, else central
    d.augment = ConfigDict()
    d.augment.random_crop = True  # whether to crop at random places in training
    d.augment.brightness = 0.2  # largest relative change of brightness in training; 0 = none
    d.augment.contrast = 0.2  # largest relative change of contrast; 0 = none
    d.augment.saturation = 0.2  # largest relative change of saturation; 0 = none
    d.augment.hue = 0.2  # largest change of hue, in turns of the colour circle, at most 0.5; 0 = none
    # sample: one draw of the augmentation per sample and view; batch: per batch and view (official)
    d.augment.draw = "sample"
    # name of the codec whose latents, which data_prep.latents has cached beside the frames, are read in place of
    # encoding frames in every step; "" = frames are encoded
    d.latents = ""
    return d


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
    s.min_steps = 0  # steps that an episode has at least
    s.max_steps = 0  # steps that an episode has at most; 0 = any number
    # step key that tells success, such as reward: only episodes are used of which it is above 0 at some step; "" = all
    s.success = ""
    s.max_episodes = 0  # at most so many of the episodes that pass, held-out ones included; 0 = all
    s.max_episodes_seed = 0  # decides which episodes max_episodes takes
    s.ranges = ""  # as config.data.ranges; "" = that, none = no ranges
    s.max_action = ()  # as config.data.max_action; () = that, for the keys that this source reads
    s.cameras = ()  # this source's keys for config.data.cameras, in that order; () = the same keys
    s.choices = ConfigDict()  # {name: keys} of this source, in place of those of config.data.choices with these names
    # What a source without actions shows in views that it has no camera for: same (its first camera), none (black; its
    # camera's view is drawn for each sample), random (other windows of the source)
    s.fill_views = "same"
    s.action = ()  # as config.data.action; () = that one
    s.update(fields)
    return s
