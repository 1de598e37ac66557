"""Who takes part in a run, what processes agree on, and how one failure ends all of them."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from launch.rehearse import Processes, one_device
from uwm_jax.errors import RunError, UserError
from uwm_jax.parallel import distributed
from uwm_jax.parallel.company import place
from uwm_jax.parallel.launch import find_launch

NO_FLAGS = {"coordinator_address": None, "num_processes": None, "process_id": None}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}


def flags(address="host:1234", count=4, index=2):
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def test_one_process_is_the_default():
    assert find_launch(NO_FLAGS, {}) is None
    assert find_launch(flags("host:1234", 1, 0), {}) is None
    assert (
        find_launch(NO_FLAGS, {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h:1"})
        is None
    )


def test_flags_go_before_the_environment_and_that_before_slurm():
    environ = {"JAX_COORDINATOR_ADDRESS": "other:99", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "7", **SLURM}
    expected = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 2}
    assert find_launch(flags(), environ).arguments == expected | {"cluster_detection_method": "deactivate"}
    launch = find_launch(NO_FLAGS, environ)
    assert (launch.arguments["coordinator_address"], launch.arguments["process_id"]) == ("other:99", 7)
    assert launch.described == "process 7 of 8 (coordinator other:99)"
    assert find_launch(NO_FLAGS, SLURM).arguments == {"cluster_detection_method": "slurm"}


def test_a_coordinator_on_this_machine_listens_to_this_machine_only():
    assert find_launch(flags("127.0.0.1:5000"), {}).arguments["coordinator_bind_address"] == "127.0.0.1:5000"
    assert "coordinator_bind_address" not in find_launch(flags("10.0.0.1:5000"), {}).arguments


def test_slurm_counts_the_tasks_of_the_step():
    """A script that sbatch runs, or a shell in an allocation of four tasks, is one process."""
    script = {k: v for k, v in SLURM.items() if "STEP" not in k}
    assert find_launch(NO_FLAGS, script) is None
    assert find_launch(NO_FLAGS, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_a_slurm_task_alone_on_its_node_takes_all_gpus():
    alone = SLURM | {"SLURM_GPUS_ON_NODE": "8"}
    assert find_launch(NO_FLAGS, alone).arguments["local_device_ids"] == list(range(8))
    shared = alone | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}
    assert "local_device_ids" not in find_launch(NO_FLAGS, shared).arguments
    chosen = alone | {"JAX_LOCAL_DEVICE_IDS": "0,1"}
    assert "local_device_ids" not in find_launch(NO_FLAGS, chosen).arguments


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        (flags(index=None), {}, "--process-id missing beside --coordinator-address=host:1234, --num-processes=4"),
        (flags(address=None, index=None), {}, "--coordinator-address and --process-id missing"),
        (flags(index=4), {}, "--process-id=4: expected 0 to 3, as --num-processes=4"),
        (flags(address="host"), {}, "--coordinator-address=host: expected HOST:PORT"),
        (flags(address="host:99999"), {}, "expected HOST:PORT"),
        (NO_FLAGS, {"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES missing"),
        (NO_FLAGS, {"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID missing"),
        (
            NO_FLAGS,
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "four", "JAX_PROCESS_ID": "1"},
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID: expected integers",
        ),
    ],
)
def test_what_is_given_in_part_is_named(given, environ, message):
    with pytest.raises(UserError, match=message):
        find_launch(given, environ)


def test_alone_everything_is_trivial(capsys):
    with distributed.session():
        assert distributed.is_main() and place() == "process 0 of 1"
        assert distributed.agree({"step": 3}) == {"step": 3}
        assert distributed.any_process(True) is True and distributed.any_process(False) is False
        distributed.require_same("the config", {"step": 3})
        distributed.barrier("nobody else", seconds=1)
        distributed.say("hello", 3)
    assert capsys.readouterr().out == "hello 3\n"
    with pytest.raises(KeyError), distributed.session():
        raise KeyError("passes through")


# A command like the train command, whose "training" is what --scenario says.
PROGRAM = """
import os, signal, sys, time
from absl import flags
from uwm_jax import cli
from uwm_jax.errors import Preempted, UserError
from uwm_jax.parallel.ahead import Ahead
from uwm_jax.parallel import distributed as d
from uwm_jax.parallel import signals
from uwm_jax.parallel.company import announce
from uwm_jax.parallel.turns import Left, Turns

def define_flags():
    d.define_flags()
    flags.DEFINE_string("scenario", "", "")

def main(argv):
    scenario, first = flags.FLAGS.scenario, flags.FLAGS.process_id == 0
    if scenario == "unreachable":
        d.initialize(join_seconds=3)
    d.initialize.__defaults__ = (60, 5.0)
    with d.session():
        assert d.agree([flags.FLAGS.process_id, "x" * 1000]) == [0, "x" * 1000]
        assert d.any_process(not first) and not d.any_process(False) and d.any_process(first)
        d.require_same("the config", {"seed": 0, "cameras": ("wrist",)})
        if scenario == "differs":
            d.require_same("the data order", {"seed": 0, "datasets": {"robot": "abc" if first else "xyz"}})
        for _ in range(3):
            d.barrier("again")
        assert d.is_main() == first
        d.say("said by", flags.FLAGS.process_id)
        if scenario == "early":
            if not first:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        signals.take()
        def items():
            for number in range(1000):
                if number == 20 and scenario == "damaged" and not first:
                    raise UserError("shard 3 is damaged")
                yield number
        data = Ahead(items())
        with Turns(0) as turns:
            for step in range(1, 1000):
                time.sleep(0.02 if first else 0.03)
                if step % 10 == 0:
                    d.barrier("in step")
                if step == 15 and scenario == "error" and first:
                    raise UserError("this file is no good")
                if step == 15 and not first:
                    if scenario == "late":
                        time.sleep(30)
                    if scenario in ("stopped", "preempted"):
                        os.kill(os.getpid(), signal.SIGSTOP if scenario == "stopped" else signal.SIGTERM)
                if step == 15 and scenario == "slow":  # one fails and is long in closing; the other's error comes late
                    if not first:
                        announce(UserError("this file is no good"))
                    time.sleep(6 if first else 9)
                    raise RuntimeError("gloo: connection closed") if first else UserError("this file is no good")
                if scenario == "late" and first and step == 15:
                    d.barrier("a late one", seconds=1)
                turn = turns.next(data)
                if step % 4 == 0:  # an evaluation
                    try:
                        for number in turns.each(iter(range(3))):
                            time.sleep(0.001)
                    except Left:
                        turn = turns.next(data)
                if turn.end:
                    print("told at", step, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)  # once more, while it saves
                    raise turn.end(step)
                next(data)
        assert scenario == "plain"

cli.run(main, define_flags)
"""


def test_a_service_that_refuses_a_process_may_take_it_the_next_time(monkeypatch):
    """Status 1, after which a supervisor starts it again: as when the others still are those of an earlier start."""

    def refuse(**_):
        raise jax.errors.JaxRuntimeError("ABORTED: 1 unexpectedly tried to connect with a different incarnation.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name, value in (("COORDINATOR_ADDRESS", "127.0.0.1:9"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(RunError, match=r"process 1 of 2 .* cannot join the run: ABORTED: .* Is the port"):
        distributed.initialize()


def run(scenario, count=2):
    command = [sys.executable, "-c", PROGRAM, f"--scenario={scenario}"]
    with Processes(count, command, os.environ) as processes:
        statuses = processes.wait(90)
    return statuses, ["\n".join(lines) for lines in processes.lines]


@pytest.mark.slow
@pytest.mark.multihost
def test_a_sigterm_to_one_process_stops_all_at_the_same_step():
    statuses, output = run("preempted", 3)
    assert statuses == [143] * 3, output
    told = {line for text in output for line in text.splitlines() if line.startswith("told at")}
    assert len(told) == 1 and all("told at" in text for text in output)
    assert ["said by 0" in text for text in output] == [True, False, False]


@pytest.mark.slow
@pytest.mark.multihost
def test_a_sigterm_to_one_process_while_the_run_starts_ends_all():
    """Also where one of them hangs: there is nothing that would have to be saved first."""
    statuses, output = run("early")
    assert statuses == [143] * 2, output
    assert "process 1 of 2 was told to end (SIGTERM) before the first step." in output[1]
    assert "error: process 1 of 2 failed: told to end (SIGTERM) before the first step" in output[0]


@pytest.mark.slow
@pytest.mark.multihost
def test_data_that_one_process_cannot_read_ends_all_at_the_same_step():
    statuses, output = run("damaged")
    assert statuses == [2, 2], output
    assert all("told at 21" in text and text.count("error:") == 1 for text in output), output
    assert "error: shard 3 is damaged" in output[1]
    assert "error: process 1 of 2 failed: shard 3 is damaged" in output[0]


@pytest.mark.slow
@pytest.mark.multihost
def test_an_error_of_one_process_is_the_end_and_the_message_of_all():
    statuses, output = run("error")
    assert statuses == [2, 2], output
    assert "error: this file is no good" in output[0] and "process 0 of 2 failed: this file is no good" in output[1]
    assert not any("Traceback" in text or "Check failure" in text for text in output), output


@pytest.mark.slow
@pytest.mark.multihost
def test_a_process_that_ends_because_of_another_says_so_once():
    statuses, output = run("slow")
    assert statuses == [2, 2], output
    assert all(text.count("error:") == 1 and "this file is no good" in text for text in output), output
    assert "process 1 of 2 failed" in output[0] and "Traceback" not in output[0], output


@pytest.mark.slow
@pytest.mark.multihost
def test_processes_that_were_started_differently_end_with_what_differs():
    statuses, output = run("differs", 3)
    assert statuses == [2] * 3, output
    message = (
        'error: the data order: process 1, 2 of 3 differs from process 0: datasets.robot is "xyz" on process 1, but '
        'datasets.robot is "abc" on process 0. Start all processes with the same command'
    )
    assert all(text.count("error:") == 1 and message in text for text in output), output


@pytest.mark.slow
@pytest.mark.multihost
def test_a_process_that_shows_no_life_ends_the_others():
    with Processes(2, [sys.executable, "-c", PROGRAM, "--scenario=stopped"], os.environ) as processes:
        assert processes.popen[0].wait(90) == 1, processes.lines
    text = "\n".join(processes.lines[0])
    assert "process 1 of 2 failed: it showed no life for 5 s" in text and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.multihost
def test_a_barrier_names_itself_and_who_is_missing():
    statuses, output = run("late")
    assert statuses == [1, 1], output
    assert "error: barrier 'a late one': 1 of 2 processes came within 1 s; process 1 did not" in output[0]
    assert "process 0 of 2 failed: barrier 'a late one'" in output[1]


@pytest.mark.slow
@pytest.mark.multihost
def test_a_coordinator_that_is_not_there_is_one_message():
    command = [sys.executable, "-c", PROGRAM, "--scenario=unreachable"]
    address = ["--coordinator-address=127.0.0.1:9", "--num-processes=2", "--process-id=1"]
    result = subprocess.run(
        [*command, *address], env=one_device(os.environ), capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 1 and "Check failure" not in result.stderr
    assert result.stderr.startswith(
        "error: process 1 of 2 (coordinator 127.0.0.1:9) could not join the run within 3 s. Start all processes"
    )
