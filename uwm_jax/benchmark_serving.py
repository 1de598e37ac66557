"""Measures the policy server: latencies of 1 to 8 clients at once, and what hostile messages change.

    python -m uwm_jax.benchmark_serving [--hostile=10000] -- --workdir=DIR [flags of uwm_jax.serve]

Starts `python -m uwm_jax.serve` with the flags after `--`, on loopback. Each client sends its next request when the
reply to the one before is there. The latencies before and after the hostile messages are one client's, each the median
over --rounds of a round's p99. Ends with status 1 where it has grown by more than 20 %, or the memory by more than 5 %.
"""

from __future__ import annotations

import statistics
from typing import Any

from absl import flags

from uwm_jax import cli
from uwm_jax.errors import RunError, UserError

FLAGS = flags.FLAGS

SLOWER, LARGER = 1.2, 1.05  # the most that p99 and memory may grow by
_FILL = 1000  # hostile messages before the memory is measured: allocators and caches have their fill


def define_flags() -> None:
    flags.DEFINE_list("clients", ["1", "2", "4", "8"], "numbers of clients at once")
    flags.DEFINE_integer("requests", 100, "of each client", lower_bound=10)
    flags.DEFINE_integer("hostile", 10_000, "messages; 0 leaves them out", lower_bound=0)
    flags.DEFINE_integer("rounds", 5, "before and after the hostile messages", lower_bound=1)
    cli.pass_on()


def main(call: cli.Call) -> None:
    clients = _numbers()
    if not call.passed_on:
        raise UserError("expected the server's flags after --, such as: -- --workdir=DIR")
    cli.need_extra("serve", "msgpack", "websockets")
    from uwm_jax.benchmarking import serving_load

    with serving_load.ServeProcess(call.passed_on) as server:
        rows = [["clients", "p50 ms", "p99 ms", "requests/s"]]
        for count in clients:
            found = serving_load.measure(server.address, count, FLAGS.requests)
            rows.append([str(count), f"{found.p50_ms:.2f}", f"{found.p99_ms:.2f}", f"{found.per_second:.1f}"])
        print(cli.table(rows), flush=True)
        grown = _attacked(serving_load, server) if FLAGS.hostile else []
        status, printed = server.end()
        print(printed.strip())
    if status:
        raise RunError(f"the server ended with status {status}.")
    if grown:
        raise RunError(f"hostile messages changed the server: {', '.join(grown)}.")


def _attacked(load: Any, server: Any) -> list[str]:
    """Prints what hostile messages changed; what they changed by too much. `load` is the module `serving_load`."""
    load.attack(server.address, _FILL, seed=1)
    p99, memory = _p99(load, server), server.memory()
    harm = load.attack(server.address, FLAGS.hostile)
    p99_after, memory_after = _p99(load, server), server.memory()
    print(
        f"{FLAGS.hostile} hostile messages: {harm.refused} refused, {harm.answered} answered, in {harm.seconds:.0f} s"
    )
    lines = []
    for what, before, after, most, unit in (
        ("p99", p99, p99_after, SLOWER, "ms"),
        ("memory", memory / 2**20, memory_after / 2**20, LARGER, "MiB"),
    ):
        line = f"{what} {before:.2f} -> {after:.2f} {unit} ({after / before:.3f}, at most {most})"
        print(line, flush=True)
        if after > most * before:
            lines.append(line)
    return lines


def _p99(load: Any, server: Any) -> float:
    return statistics.median(load.measure(server.address, 1, FLAGS.requests).p99_ms for _ in range(FLAGS.rounds))


def _numbers() -> list[int]:
    try:
        numbers = [int(text) for text in FLAGS.clients]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or max(numbers) > 64:
        raise UserError(f"--clients={','.join(FLAGS.clients)}: expected numbers from 1 to 64, joined by commas.")
    return numbers


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
