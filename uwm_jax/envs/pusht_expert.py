"""An expert for PushT: sampling MPC that solves `uwm_jax.envs.pusht_simulator`.

The expert plans on a second copy of the physics. At each decision it draws candidate pushes (go
round the block, come to a random point of its outline, push in a direction near the inward normal),
simulates each one with the environment's own controller and time step, and keeps the push and the
length of it that brings the block's eight corners closest to the goal, minus a small price per step.
Nothing of the expert draws a picture, so it costs milliseconds.

Units are those of the environment: positions in pixels of a 512 x 512 board, y downwards, angles in
radians, one step = 0.1 s = 10 physics steps. An action is the absolute position (x, y) in [0, 512]
that the agent is pulled towards.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from uwm_jax.envs.pusht_simulator import (
    AGENT_RADIUS,
    BOARD,
    DAMPING,
    DT,
    GOAL_POSE,
    STIFFNESS,
    SUBSTEPS,
    load_gym_pusht,
    make_env,
    read_bodies,
    read_state,
)

SETTLE = 2  # steps that the agent needs to come to rest at its target

# The block is two axis-aligned boxes in its own frame: centre and half size of bar and stem.
_BOX_CENTER = np.array([[0.0, 15.0], [0.0, 75.0]])
_BOX_HALF = np.array([[60.0, 15.0], [15.0, 45.0]])
# The outline of the T in its own frame; the inside lies along (-dy, dx) of each edge.
_OUTLINE = np.array([[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], float)
_CENTER = np.array([0.0, 45.0])  # the block's centre of gravity in its own frame
_CORNERS = np.array(
    [[-60, 30], [60, 30], [60, 0], [-60, 0], [-15, 30], [-15, 120], [15, 120], [15, 30]], float
)  # the eight corners of the two boxes


def corners(pose: np.ndarray) -> np.ndarray:
    """Positions (..., 8, 2) of the block's corners at poses (..., 3) = x, y, angle."""
    cos, sin = np.cos(pose[..., 2, None]), np.sin(pose[..., 2, None])
    x = pose[..., 0, None] + cos * _CORNERS[:, 0] - sin * _CORNERS[:, 1]
    y = pose[..., 1, None] + sin * _CORNERS[:, 0] + cos * _CORNERS[:, 1]
    return np.stack([x, y], -1)


_GOAL_CORNERS = corners(np.array(GOAL_POSE))


def goal_distance(pose: np.ndarray) -> np.ndarray:
    """Mean distance (...,) in pixels of the block's corners to where they shall be; pose (..., 3)."""
    return np.linalg.norm(corners(pose) - _GOAL_CORNERS, axis=-1).mean(-1)


def agent_path(position: np.ndarray, velocity: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities of the agent under the environment's controller.

    The agent is kinematic, so the block never changes its path. targets (..., T, 2) -> two arrays
    (..., T*10, 2): the velocity set before each physics step and the position after it.
    """
    shape = (*targets.shape[:-2], targets.shape[-2] * SUBSTEPS, 2)
    positions, velocities = np.empty(shape), np.empty(shape)
    x = np.broadcast_to(position, (*targets.shape[:-2], 2))
    v = np.broadcast_to(velocity, x.shape)
    for t in range(targets.shape[-2]):
        for k in range(t * SUBSTEPS, (t + 1) * SUBSTEPS):
            v = v + (STIFFNESS * (targets[..., t, :] - x) - DAMPING * v) * DT
            x = x + v * DT
            positions[..., k, :], velocities[..., k, :] = x, v
    return positions, velocities


class PushTSimulator:
    """A second copy of the environment's physics that can be put into any state.

    Without the callback on every contact that the environment has, so it is many times faster.
    """

    def __init__(self) -> None:
        self.set_state(read_state(make_env()))

    def set_state(self, state: np.ndarray) -> None:
        """Puts the bodies into `state` (10,).

        Everything is built anew: Chipmunk keeps the impulses of earlier contacts, a correction of
        overlaps that is due at the next step, and an order of its shapes that grows with use, all out
        of sight. With those left in place the same state would not always have the same future.
        """
        import pymunk

        env = load_gym_pusht().PushTEnv
        self.space = pymunk.Space()
        self.space.gravity = 0, 0
        self.space.damping = 0.0
        corner = [(5, 506), (5, 5), (506, 5), (506, 506)]
        walls = [(0, 1), (1, 2), (2, 3), (0, 3)]
        self.space.add(*[env.add_segment(self.space, corner[a], corner[b], 2) for a, b in walls])
        self.agent = env.add_circle(self.space, (256, 400), AGENT_RADIUS)
        self.block, _ = env.add_tee(self.space, (256, 300), 0)

        values = [float(x) for x in state]
        self.agent.position, self.agent.velocity = tuple(values[0:2]), tuple(values[2:4])
        # The angle first: setting it turns the block about its centre of gravity, not its origin.
        self.block.angle, self.block.position = values[6], tuple(values[4:6])
        self.block.velocity, self.block.angular_velocity = tuple(values[7:9]), values[9]

    def get_state(self) -> np.ndarray:
        """The state (10,) of the bodies now."""
        return read_bodies(self.agent, self.block)

    def step(self, target: np.ndarray) -> None:
        """One step of the environment (0.1 s) with action `target` (2,)."""
        x, y = float(target[0]), float(target[1])
        for _ in range(SUBSTEPS):
            (px, py), (vx, vy) = self.agent.position, self.agent.velocity
            self.agent.velocity = (
                vx + (STIFFNESS * (x - px) + DAMPING * (0 - vx)) * DT,
                vy + (STIFFNESS * (y - py) + DAMPING * (0 - vy)) * DT,
            )
            self.space.step(DT)

    def run(self, velocities: np.ndarray) -> np.ndarray:
        """Moves the agent by velocities (K, 2), one a physics step.

        Returns the block's poses (ceil(K/10), 3) after physics steps K-10n, ..., K-10, K.
        """
        agent, block, space = self.agent, self.block, self.space
        poses = []
        left = len(velocities)
        for velocity in velocities.tolist():
            agent.velocity = velocity
            space.step(DT)
            left -= 1
            if left % SUBSTEPS == 0:
                poses.append((*block.position, block.angle))
        return np.array(poses)


class _Push(NamedTuple):
    targets: np.ndarray  # (T, 2)
    begin: int  # the first step of the push itself
    direction: np.ndarray  # (2,) unit vector of the push

    def stop(self, last: int, end: np.ndarray) -> np.ndarray:
        """The targets up to step `last`, changed so that the agent rests where it would be then, `end`.

        The agent runs behind its target: the target stops where the agent shall, and waits for it.
        """
        targets = self.targets[: last + 1].copy()
        beyond = np.maximum((targets[self.begin :] - end) @ self.direction, 0)
        targets[self.begin :] -= beyond[:, None] * self.direction
        return np.concatenate([targets, np.repeat(targets[-1:], SETTLE, 0)])


class PushTExpert:
    """Sampling MPC. `act` is called once per step with the state and answers with the target.

    The result is a function of the seed and of the states seen since `reset`.
    """

    def __init__(
        self,
        candidates: int = 24,
        free_speed: float = 20.0,
        push_speed: float = 10.0,
        step_price: float = 0.1,
        longest_push: float = 200.0,
    ):
        """candidates: pushes simulated per decision; speeds: pixels per step of the target with and
        without contact; step_price: pixels of mean corner distance that one step must earn."""
        self.candidates = candidates
        self.free_speed = free_speed
        self.push_speed = push_speed
        self.step_price = step_price
        self.longest_push = longest_push
        self.simulator = PushTSimulator()
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forgets the plan and restarts the random numbers; call it at the start of an episode."""
        self._rng = np.random.default_rng(seed)
        self._plan: list[np.ndarray] = []

    def act(self, state: np.ndarray) -> np.ndarray:
        """state (10,) of `read_state` -> the target (2,) float32 in [0, 512] of the next step."""
        if not self._plan:
            self._plan = list(self._decide(np.asarray(state, float)))
        return self._plan.pop(0).astype(np.float32)

    def _decide(self, state: np.ndarray) -> np.ndarray:
        """The targets (T, 2) of the best of the candidate pushes."""
        now = float(goal_distance(state[4:7]))
        best_score, best = np.inf, None
        for _ in range(4):  # where no push helps, look again; after that take the least bad one
            pushes = [self._candidate(state) for _ in range(self.candidates)]
            longest = max(len(p.targets) for p in pushes)
            targets = np.stack([np.pad(p.targets, ((0, longest - len(p.targets)), (0, 0)), "edge") for p in pushes])
            positions, velocities = agent_path(state[:2], state[2:4], targets)
            distance = _block_distance(positions, state[4:7])
            touching = min(AGENT_RADIUS + 0.3, float(_block_distance(state[:2], state[4:7])) - 0.3)
            for push, x, v, d in zip(pushes, positions, velocities, distance, strict=True):
                steps = len(push.targets)
                hits = np.flatnonzero(d[: steps * SUBSTEPS] < touching)
                if not hits.size:
                    continue
                first = int(hits[0])  # until then the block stands still and nothing need be simulated
                start = np.concatenate([x[first - 1], v[first - 1]]) if first else state[:4]
                self.simulator.set_state(np.concatenate([start, state[4:]]))
                poses = self.simulator.run(v[first : steps * SUBSTEPS])
                at = np.arange(steps - len(poses), steps)
                score = goal_distance(poses) + self.step_price * (at + 1)
                score[at < push.begin] = np.inf
                i = int(score.argmin())
                if score[i] < best_score:
                    best_score = float(score[i])
                    best = push.stop(int(at[i]), x[(at[i] + 1) * SUBSTEPS - 1])
            if best_score < now:
                break
        return np.clip(best if best is not None else pushes[0].targets, 0, BOARD)

    def _candidate(self, state: np.ndarray) -> _Push:
        """Round the block to a random point of its outline, and a push from there."""
        rng = self._rng
        agent, origin, angle = state[:2], state[4:6], state[6]
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        edges = np.roll(_OUTLINE, -1, 0) - _OUTLINE
        lengths = np.linalg.norm(edges, axis=1)
        edge = rng.choice(len(edges), p=lengths / lengths.sum())
        normal = np.array([-edges[edge, 1], edges[edge, 0]]) / lengths[edge]  # inwards
        point = turn @ (_OUTLINE[edge] + rng.uniform() * edges[edge]) + origin
        bend = rng.normal(0, 0.3)
        c, s = np.cos(bend), np.sin(bend)
        direction = turn @ np.array([c * normal[0] - s * normal[1], s * normal[0] + c * normal[1]])
        start = point - (turn @ normal) * (AGENT_RADIUS + 6)
        length = rng.uniform(20, self.longest_push)
        way = _walk(np.concatenate([_go_round(agent, start, state[4:7]), [start]]), self.free_speed)
        line = _walk(np.stack([start, start + direction * length]), self.push_speed)
        return _Push(np.concatenate([way, line]), len(way), direction)


def _block_distance(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Distance (...) of points (..., 2) to the block at pose (3,); 0 inside."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    local = (points - pose[:2]) @ np.array([[cos, -sin], [sin, cos]])
    outside = np.maximum(np.abs(local[..., None, :] - _BOX_CENTER) - _BOX_HALF, 0)
    return np.linalg.norm(outside, axis=-1).min(-1)


def _go_round(agent: np.ndarray, start: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Corners (N, 2) of a way from agent to start that keeps off the block where it can."""
    line = agent + np.linspace(0, 1, 24)[:, None] * (start - agent)
    if _block_distance(line[2:], pose).min() > AGENT_RADIUS + 2:
        return agent[None]
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    center = pose[:2] + np.array([[cos, -sin], [sin, cos]]) @ _CENTER
    radius = 112.0  # the farthest corner of the T is 77 away, and the agent has a radius of 15
    a, b = agent - center, start - center
    from_angle, to_angle = np.arctan2(a[1], a[0]), np.arctan2(b[1], b[0])
    swing = (to_angle - from_angle + np.pi) % (2 * np.pi) - np.pi
    angles = from_angle + np.linspace(0, 1, 2 + int(abs(swing) / 0.2)) * swing
    arc = center + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    arc = np.clip(arc, 5 + AGENT_RADIUS, BOARD - 5 - AGENT_RADIUS)
    return np.concatenate([agent[None], arc])


def _walk(way: np.ndarray, speed: float) -> np.ndarray:
    """Points (T, 2) every `speed` pixels along the polyline `way` (N, 2), its end included."""
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(way, axis=0), axis=1))])
    at = np.append(np.arange(speed, along[-1], speed), along[-1])
    return np.stack([np.interp(at, along, way[:, 0]), np.interp(at, along, way[:, 1])], -1)
