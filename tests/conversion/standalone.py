"""Run by a process of its own, in a folder that holds an export called DIR only: `python -I standalone.py OUT.npz`.

Nothing but torch, numpy and safetensors can help it: what the rest of the project is made of cannot be imported. It
answers every use from the probe's inputs, and acts for two episodes in OUT.npz's `frames`, with `noise` there.
"""

import importlib.abc
import sys

BLOCKED = {"jax", "jaxlib", "flax", "uwm_jax", "diffusers", "einops"}


class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not to be had here", name=name)


def main(inputs, output):
    sys.meta_path.insert(0, Blocked())
    for name in BLOCKED:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise SystemExit(f"{name} was imported")
    sys.path.insert(0, "DIR")
    import numpy as np
    import torch
    import uwm_torch

    torch.set_num_threads(1)
    policy = uwm_torch.load("DIR", execute=2)
    probe = dict(np.load("DIR/probe.npz"))
    given = {key.removeprefix("inputs/"): x for key, x in probe.items() if key.startswith("inputs/")}
    noise = {key.removeprefix("noise/"): x for key, x in probe.items() if key.startswith("noise/")}
    results = {}
    for use in policy.uses:
        results |= {f"{use}/{key}": x for key, x in policy.sample(use, given, noise).items()}
    refused = []
    for use in sys.argv[3:]:
        try:
            policy.sample(use, given, noise)
        except ValueError as e:
            refused.append(str(e))
    steps = dict(np.load(inputs))
    policy.reset(2)
    acted = []
    for step in range(len(next(iter(steps.values())))):
        now = {key: x[step] for key, x in steps.items()}
        observation = {key.removeprefix("obs/"): x for key, x in now.items() if key.startswith("obs/")}
        own = {key.removeprefix("noise/"): x for key, x in now.items() if key.startswith("noise/")}
        acted.append(policy.act(observation, noise=own))
    modules = {name.partition(".")[0] for name in sys.modules}
    assert not modules & BLOCKED, modules & BLOCKED
    np.savez(output, refused=np.array(refused, str), acted=np.stack(acted), **results)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
