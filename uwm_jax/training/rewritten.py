"""An object of a bucket that a run extends or replaces again and again.

Objects cannot be appended to, so a thread puts the newest content whole, now and then; `flush` puts it at once. A put
requires that the object is still the one that this process put last (its generation): a process that has lost its
workdir to another one overwrites nothing of that.
"""

from __future__ import annotations

import hashlib
import threading
import time

from uwm_jax.errors import RunError
from uwm_jax.files import Generation, Place, create, read_with_generation, replace_if, within
from uwm_jax.reading import cause_of

PUT_SECONDS = 10.0  # from a change until the thread puts it; a bucket takes one write of an object a second
SHARE = 0.05  # of the time, at most, that the thread spends on puts: a long `metrics.jsonl` is put less often
TAKE_ATTEMPTS = 10  # of replacing what another process, whose workdir this has become, may still be writing
CLOSE_SECONDS = 30.0  # for what came after the last checkpoint, when a run ends
JOIN_SECONDS = 5.0


class Rewritten:
    """The content of an object, and the thread that puts it. Its methods may be called by several threads.

    Args:
      place: of the object; whatever it holds is replaced at once.
      content: the first.

    Raises:
      RunError: it cannot be written, or another process keeps writing it.
    """

    def __init__(self, place: Place, content: bytes = b"", seconds: float = PUT_SECONDS):
        self.place = place
        self._seconds = seconds
        self._content = bytearray(content)
        self._changed = self._put = 0  # numbers of the newest content, and of the one that the bucket has
        self._tried: set[bytes] = set()  # digests of what puts that failed may have written all the same
        self._failure = ""
        self._of_content, self._of_puts = threading.Lock(), threading.Lock()
        self._generation = self._take(content)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"puts of {place.name}", daemon=True)
        self._thread.start()

    def append(self, data: bytes) -> None:
        """Extends the content."""
        with self._of_content:
            self._content += data
            self._changed += 1

    def replace(self, data: bytes) -> None:
        """Replaces the content."""
        with self._of_content:
            self._content[:] = data
            self._changed += 1

    @property
    def behind(self) -> bool:
        """Whether the bucket does not have the newest content."""
        return self._changed != self._put

    @property
    def failure(self) -> str:
        """The reason why the last put failed; "" where it did not."""
        return self._failure

    def flush(self) -> None:
        """Returns once the bucket has the content of now.

        Raises:
          RunError: it cannot be written, or another process has written it.
        """
        with self._of_puts:
            with self._of_content:
                number, content = self._changed, bytes(self._content)
            if number == self._put:
                return
            try:
                self._generation = self._put_once(content)
            except RunError as e:
                self._failure = cause_of(e)
                raise
            self._put, self._failure = number, ""

    def close(self) -> None:
        """Puts what is left, and ends the thread. Raises as `flush`, after `CLOSE_SECONDS` at most."""
        self._closed.set()
        try:
            with within(CLOSE_SECONDS):
                self.flush()
        finally:
            self._thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        pause = self._seconds
        while not self._closed.wait(pause):
            began = time.monotonic()
            try:
                self.flush()
            except RunError:  # `failure` has it, and the next `flush` of the run raises it
                pass
            pause = max(self._seconds, (time.monotonic() - began) / SHARE)

    def _put_once(self, content: bytes) -> Generation:
        self._tried.add(_digest(content))
        generation = replace_if(self.place, content, self._generation)
        if generation is None:
            generation = self._after_refusal(content)
        self._tried.clear()
        return generation

    def _after_refusal(self, content: bytes) -> Generation:
        """The object is not the one that was put last: an attempt that seemed to fail has written it, somebody has
        deleted it, or another process has this workdir."""
        found = read_with_generation(self.place)
        generation = None
        if found is None:
            generation = create(self.place, content)
        elif found[0] == content:
            generation = found[1]
        elif _digest(found[0]) in self._tried:
            generation = replace_if(self.place, content, found[1])
        if generation is None:
            raise RunError(
                f"{self.place}: another process has written it since this one did: another run is at work in this "
                "workdir. Nothing of it was overwritten; use another --workdir, or end one of the two."
            )
        return generation

    def _take(self, content: bytes) -> Generation:
        for _ in range(TAKE_ATTEMPTS):
            found = read_with_generation(self.place)
            taken = create(self.place, content) if found is None else replace_if(self.place, content, found[1])
            if taken is not None:
                return taken
        raise RunError(
            f"{self.place}: another process keeps writing it, so that this one cannot. End the other run, or use "
            "another --workdir."
        )


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
