"""A trained model as a policy: raw observations in, the next action out.

Receding horizon: from the last observations the acting use samples a chunk of actions (`uwm_jax.actor`), of which the
first `execute` are taken before the next chunk is sampled; `Policy` says what a robot does meanwhile.

It knows no environment, and drives any number of them at once: rollouts use many rows, a robot's server one a
connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from uwm_jax.actor import Actor, Limits, rows_from_the_present
from uwm_jax.backend import Backend, Noise
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import RunError, UserError, warn

SWITCHES = ("wait", "naive", "replacement", "guided")  # from one chunk to the next: see `Policy`
HOLDING = ("replacement", "guided")  # those that promise rows
HISTORIES = ("kept", "repeated")  # what the network sees of the steps before: see `Policy`
NEVER = -(1 << 40)  # a step that is before all others

Rows = Sequence[int] | np.ndarray | None


class LateAnswer(RunError):
    """A chunk is not there although the one before it is used up, so that there is no action for some rows: a robot has
    to stop. `Policy.act` may be called again, with the next observation.

    Attributes:
        actions: (n, Dr) float32 of the rows that the call was for, NaN in those without an action.
    """

    def __init__(self, message: str, actions: np.ndarray):
        super().__init__(message)
        self.actions = actions


class Policy:
    """Acts in as many episodes (rows) at once as `reset` is told of.

    From the last observations a chunk of actions is sampled, of which `execute` are taken before the next one is asked
    for. A chunk takes `delay` control steps until it is there. By `switch`, these steps are spent so:

        wait         the robot waits: its last action is repeated, and the chunk begins when it is there. (That is
                     standing still where actions are positions.)
        naive        the robot goes on in the chunk before. Row k of a chunk that is asked for at step s is for step
                     s + k, so rows `delay` and later of the new one follow.
        replacement  as naive, and the first `delay` rows of the new chunk are promised: they are what is executed until
                     it is there, and the sampler holds them (`uwm_jax.diffusion.sampler`).
        guided       as replacement, and the promised rows guide the others.

    The first chunk of an episode is waited for, and used from its first row on. Without a delay all are alike.

    There are two forms. With `deadline` None time is counted in calls of `act`: every answer takes `delay` steps
    exactly, for simulators. With a number of seconds, a thread samples while `act` goes on, and `act` waits so long at
    most for an answer that is due. One that is late is used when it comes; until then the robot goes on in the chunk
    before, and where that is used up `act` raises `LateAnswer`. `late` counts the steps of the one, `stops` those of
    the other.

    A row's actions are a function of its own observations, its episode's seed and `seed` alone (and of time, with a
    deadline).

    Args:
        actor: or the backend that it is made of, with `source` and `limits`, and calls of the network of `batch_size`
            rows.
        execute: actions of each chunk that are taken, 1 to as many as the chunk has from the present on.
        delay: control steps until a chunk is there, 0 to `execute`; but for `wait`, `execute + delay` is at most what
            the chunk has.
        switch: one of `SWITCHES`. A system that cannot hold promised rows switches naively instead, and a warning says
            so.
        seed: of the noise that sampling starts from, with the episode's seed and the number of the decision.
        deadline: see above; 0 or more seconds.
        history: `kept`, the frames that were seen; `repeated`, the newest in place of all, as of a server whose clients
            send single frames.
        batch_size, source, limits: see `actor`; of a backend alone.
    Raises:
        UserError: `execute` and `delay` do not fit the window that the model was trained on; limits that an actor would
            not have; or as `Actor`.

    Attributes:
        late: steps of rows that were acted on in the chunk before because an answer was late; stops: those for which
            there was no action.
    """

    def __init__(
        self,
        actor: Actor | Backend,
        *,
        execute: int = 8,
        delay: int = 0,
        switch: str = "wait",
        seed: int = 0,
        deadline: float | None = None,
        history: str = HISTORIES[0],
        batch_size: int = 1,
        source: str = "",
        limits: Limits | None = None,
    ):
        if isinstance(actor, Backend):
            actor = Actor(actor, source=source, limits=limits, sizes=(batch_size,))
        elif source or limits is not None:
            raise UserError("source and limits are those of the actor: give them to Actor(...), or a backend here.")
        window = actor.backend.spec.window
        check_execute(window, execute, delay, switch)
        switch = possible_switch(actor.backend, delay, switch)
        self.actor, self.execute, self.delay, self.switch, self.deadline = actor, execute, delay, switch, deadline
        self._seed = seed
        self._worker = None if deadline is None else ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._warm: set[int] = set()  # numbers of rows whose programs are compiled
        self._awaited: list[tuple[np.ndarray, Future[np.ndarray]]] = []
        if history not in HISTORIES:
            raise UserError(f"history={history}: expected {' or '.join(HISTORIES)}.")
        self._history = [0 if history == "repeated" else window.present - i for i in window.obs]  # steps back
        self.reset((0,))

    def reset(self, seeds: Sequence[int]) -> None:
        """Starts len(seeds) episodes; what was seen before is forgotten.

        Args:
            seeds: of each row's noise, 0 to 2**32 - 1.
        """
        self._seeds = np.array(seeds, np.uint32)
        rows, size = len(self._seeds), (self.actor.horizon, self.actor.width)
        self.late = self.stops = 0
        self._warm_up(rows)
        self._step = np.zeros(rows, np.int64)  # calls of `act`
        self._decisions = np.zeros(rows, np.uint32)
        self._chunks = np.zeros((rows, *size), np.float32)
        self._origin = np.full(rows, NEVER)  # the step that the chunk's first row is for
        # The answer that is awaited: the step at which it was asked for, the first at which it may be used, whether its
        # first row is for the step at which it comes (else for that at which it was asked for), and, once it is there,
        # itself.
        self._asked, self._due = np.full(rows, NEVER), np.full(rows, NEVER)
        self._fresh, self._answered = np.zeros(rows, bool), np.zeros(rows, bool)
        self._answers = np.zeros((rows, *size), np.float32)
        for _, future in self._awaited:
            future.cancel()
        self._awaited = []
        self._last = np.zeros((rows, self.actor.width), np.float32)  # the action that was taken last
        self._seams = np.zeros((2, rows))  # sums of squares, and their number
        self._seen = np.zeros(rows, bool)
        length = max(self._history) + 1
        self._frames = {
            key: np.zeros((rows, length, *like.shape[1:]), like.dtype)
            for key, like in self.actor.observation_like(rows).items()
        }

    def act(self, observation: Mapping[str, np.ndarray], rows: Rows = None, noise: Noise | None = None) -> np.ndarray:
        """The next action of each row; called once for every step of the episode.

        Args:
            observation: {camera: (n, H, W, 3) uint8 as the dataset has them; low-dimensional key: (n, D), raw units;
                "text": (n, E) where the model reads text; for relative actions, the state that they refer to: (n, D),
                raw units}. Other keys are ignored.
            rows: (n,) which rows these are of; None: all.
            noise: {modality: (n, ...)} for the chunks that this call asks for; None: drawn from the seeds.

        Returns:
            (n, Dr) float32, the numbers that the robot takes.

        Raises:
            UserError: naming every key that is missing or has an unfit shape, dtype or value.
            LateAnswer: some rows have no action.
            RunError: the sampled actions are not finite.
        """
        at = self._rows(rows)
        self.observe(observation, at)
        before = self._origin[at].copy()
        self._begin(at)
        due = (self._asked[at] == NEVER) & (self._step[at] - self._origin[at] >= self.execute)
        if due.any():
            self._ask(at[due], None if noise is None else {m: np.asarray(x)[due] for m, x in noise.items()})
            self._begin(at)
        used, late = self._step[at] - self._origin[at], (self._asked[at] != NEVER) & (self._step[at] >= self._due[at])
        action = self._chunks[at, np.minimum(used, self.actor.horizon - 1)]
        waits = self.switch == "wait"
        idle = used >= (self.execute if waits else self.actor.horizon)
        action[idle] = self._last[at[idle]]
        joins = (before != NEVER) & (before != self._origin[at])
        self._measure_seams(at[joins], action[joins])
        self._last[at] = action
        self._step[at] += 1
        self.late += int((late & ~idle).sum())
        if idle.any() and not waits:
            self._stop(at, idle, action)
        return action

    def observe(self, observation: Mapping[str, np.ndarray], rows: Rows = None) -> None:
        """Takes in one step's observation, as `act` does; an episode's first one fills its whole history."""
        at = self._rows(rows)
        checked = self.actor.check(observation, len(at))
        first = at[~self._seen[at]]
        self._seen[at] = True
        for key, value in checked.items():
            frames = self._frames[key]
            frames[at, :-1] = frames[at, 1:]
            frames[at, -1] = value
            frames[first] = frames[first, -1:]

    def inputs(self, rows: Rows = None) -> dict[str, np.ndarray]:
        """What `Actor.chunks` takes of these rows: their histories, raw."""
        at, back = self._rows(rows), [-1 - back for back in self._history]
        return {f"obs/{key}": x[at, -1] if key == "text" else x[at][:, back] for key, x in self._frames.items()}

    def chunks(self) -> np.ndarray:
        """(n, horizon, Dr) float32: the chunk that each row executes."""
        return self._chunks.copy()

    def seams(self) -> np.ndarray:
        """(n,) float64 how far each row's action jumped where one chunk followed another: the root mean square, over
        these steps and the action's columns, of the normalised action minus the one before. NaN without such a step."""
        total, count = self._seams
        return np.sqrt(np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0))

    def close(self) -> None:
        """Ends the thread of the form with a deadline."""
        if self._worker:
            self._worker.shutdown(cancel_futures=True)

    def _ask(self, at: np.ndarray, noise: Noise | None) -> None:
        """Asks for chunks from what rows have seen up to now."""
        used = self._step[at] - self._origin[at]
        left = np.maximum(self.actor.horizon - used, 0)  # rows of the chunk before, which go on to be executed
        waits = self.switch == "wait"
        ahead = np.minimum(left, self.delay)  # fewer than `delay` after a stop, and none at an episode's start
        self._asked[at], self._fresh[at] = self._step[at], (left == 0) | waits
        self._due[at] = self._step[at] + np.where(waits & (self._origin[at] != NEVER), self.delay, ahead)
        promised = None
        if self.delay and self.switch in HOLDING:
            places = np.minimum(used[:, None] + np.arange(self.actor.horizon), self.actor.horizon - 1)
            promised = self._chunks[at[:, None], places], ahead
        inputs, seeds, decisions = self.inputs(at), self._seeds[at], self._decisions[at]
        self._decisions[at] += 1

        def sample() -> np.ndarray:
            given = self.actor.noise(self._seed, seeds, decisions) if noise is None else noise
            return self.actor.chunks(inputs, given, promised, guided=self.switch == "guided")

        self._awaited.append((at, self._worker.submit(sample) if self._worker else _at_once(sample)))

    def _begin(self, at: np.ndarray) -> None:
        """Goes over to the chunks that are there and due. One that has no row for this step any more is dropped."""
        self._collect(at)
        at = at[self._answered[at] & (self._step[at] >= self._due[at])]
        origin = np.where(self._fresh[at], self._step[at], self._asked[at])
        self._answered[at], self._asked[at] = False, NEVER
        useful = self._step[at] - origin < self.actor.horizon
        at, origin = at[useful], origin[useful]
        self._chunks[at], self._origin[at] = self._answers[at], origin

    def _collect(self, at: np.ndarray) -> None:
        """Takes in the answers of the thread, and waits for those that are due as long as it may."""
        until = time.monotonic() + (self.deadline or 0)
        for rows, future in self._awaited:
            mine = rows[np.isin(rows, at)]
            if (self._origin[mine] == NEVER).any():
                wait([future])  # a robot that has not moved yet
            elif (self._step[mine] >= self._due[mine]).any():
                wait([future], max(0.0, until - time.monotonic()))
        awaited, self._awaited, errors = self._awaited, [], []
        ended: list[tuple[np.ndarray, Future[np.ndarray]]] = []
        for rows, future in awaited:  # which may end at any time: each is asked once
            (ended if future.done() else self._awaited).append((rows, future))
        for rows, future in ended:
            if error := future.exception():
                self._asked[rows] = NEVER  # so that it is asked for again
                errors.append(error)
            else:
                self._answers[rows], self._answered[rows] = future.result(), True
        if errors:
            raise errors[0]

    def _measure_seams(self, at: np.ndarray, action: np.ndarray) -> None:
        if not len(at):
            return
        both = np.stack([self._last[at], action], axis=1)
        states = {key: self._frames[key][at, -1] for key in self.actor.states}
        step = np.diff(self.actor.normalized(both, states).astype(np.float64), axis=1)[:, 0]
        self._seams[:, at] += np.mean(np.square(step), axis=-1), np.ones(len(at))

    def _stop(self, at: np.ndarray, idle: np.ndarray, action: np.ndarray) -> None:
        """Raises LateAnswer."""
        self.stops += int(idle.sum())
        row = at[idle][0]
        step, asked = self._step[row] - 1, self._asked[row]
        raise LateAnswer(
            f"step {step} of row {row} has no action: the chunk that was asked for at step {asked}, to be there at "
            f"step {self._due[row]}, has not come, and the one before it is used up (stop {self.stops}). Allow more "
            f"steps than delay={self.delay}, or sample in fewer.",
            np.where(idle[:, None], np.float32(np.nan), action),
        )

    def _warm_up(self, rows: int) -> None:
        """Compiles what the thread runs."""
        if self._worker is None or rows in self._warm:
            return
        self._warm.add(rows)
        inputs = {key: np.zeros(like.shape, like.dtype) for key, like in self.actor.inputs_like(rows).items()}
        zeros = np.zeros(rows, np.uint32)
        noise = self.actor.noise(self._seed, zeros, zeros)
        chunk = self.actor.chunks(inputs, noise)
        if self.delay and self.switch in HOLDING:
            promised = chunk, np.full(rows, self.delay)
            self.actor.chunks(inputs, noise, promised, guided=self.switch == "guided")

    def _rows(self, rows: Rows) -> np.ndarray:
        return np.arange(len(self._seeds)) if rows is None else np.asarray(rows, np.int64)


def possible_switch(backend: Backend, delay: int, switch: str) -> str:
    """`switch`, or `naive` where it promises actions that the system cannot hold, which a warning says."""
    if not delay or switch not in HOLDING or backend.can_promise:
        return switch
    warn(
        f"switch={switch}: config.system={backend.system!r} does not sample in steps, so it cannot hold promised "
        "actions; it switches naively."
    )
    return "naive"


def check_execute(window: WindowSpec, execute: int, delay: int = 0, switch: str = "wait") -> None:
    """Raises UserError where these do not suit the chunks of a window, as `Policy` has them."""
    if switch not in SWITCHES:
        raise UserError(f"switch={switch}: expected one of {', '.join(SWITCHES)}.")
    rows = rows_from_the_present(window)
    ready = rows.stop - rows.start
    about = (
        f"The model was trained on config.data.window.action={window.action}, of which {ready} follow each other step "
        f"by step from the newest observed frame, {window.present}, on."
    )
    if not 1 <= execute <= ready:
        expected = f"expected 1 to {ready}" if ready else "no number will do"
        raise UserError(f"execute={execute}: {expected}. {about}")
    if delay < 0:
        raise UserError(f"delay={delay}: expected 0 steps or more.")
    if switch == "wait":
        return
    if execute + delay > ready:
        raise UserError(
            f"execute={execute} and delay={delay} with switch={switch}: expected at most {ready} together, since a "
            f"chunk is executed until the next one is there. {about}"
        )
    if delay > execute:
        raise UserError(
            f"delay={delay} with switch={switch}: expected at most execute={execute}, since a chunk is asked for after "
            "the one before is there."
        )


def _at_once(function: Callable[[], np.ndarray]) -> Future[np.ndarray]:
    """The result of a function that is called now."""
    done: Future[np.ndarray] = Future()
    try:
        done.set_result(function())
    except Exception as e:  # as a thread keeps it, for who asks for the result
        done.set_exception(e)
    return done
