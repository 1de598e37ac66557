"""A Unified World Model in words, for the page of a run."""

INTRODUCTION = (
    "A robot that learns from recordings usually learns one thing: which action to take next. A Unified World Model is "
    "one network that sees actions and later camera frames together, each under noise of a strength of its own, and "
    "learns to take the noise away. What it is given clean it takes as known, what is pure noise it does without, so "
    "the same weights act (`policy`), predict (`video`, `forward`), explain (`inverse`) and imagine (`joint`)."
)

QUESTIONS = {
    "paired/policy_vs_mean_action/action_mse": "Does it act? The policy mode against the mean action",
    "paired/policy_vs_last_action/action_mse": "\u2026 against the last action, repeated",
    "paired/inverse_vs_mean_action/action_mse": "Does it explain? The inverse mode against the mean action",
    "paired/inverse_vs_policy/action_mse": "\u2026 against the policy mode, which does not see the later frame",
    "paired/inverse_vs_linear_interpolation/action_mse": "\u2026 against a straight line to the true last action",
    "control/shuffle_gap": (
        "Does it predict what actions do? One evaluation with the true actions against another window's"
    ),
    "paired/forward_vs_shuffled/pixel_mse": "\u2026 samples, all pixels",
    "paired/forward_vs_shuffled/changed_mse": "\u2026 samples, pixels that changed",
    "paired/forward_vs_video/changed_mse": (
        "Do known actions help to predict? Forward against video, pixels that changed"
    ),
    "paired/forward_vs_copied_frame/pixel_mse": "Are the forward mode's frames better than the current frame, copied?",
    "paired/forward_vs_mean_image/pixel_mse": "Are they better than the mean image?",
    "paired/forward_vs_mean_image/changed_mse": "\u2026 on pixels that changed",
}
