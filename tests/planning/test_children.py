"""Child processes: their answers, their deaths, and the cache of what they answered."""

from __future__ import annotations

import json
import sys

import pytest

from uwm_jax.planning import children

FACTS = {"facts": {"peak": 1}}
REQUEST = {"description": {"topology_name": "v5e:2x2"}, "config": {"batch_size": 4}}


@pytest.fixture
def child(monkeypatch, tmp_path):
    """A function that puts a program in the place of the compiling process; gives the lines that are said."""

    def put(code: str) -> list[str]:
        said: list[str] = []
        file = tmp_path / "child"
        file.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{code}\n")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))
        return said

    return put


def ask(said, cache=None, request=REQUEST):
    return children.ask(request, name="v5e-4", cache=cache, say=said.append)


def test_the_answer_is_that_of_the_child_and_other_lines_are_passed_on(child):
    said = child(
        "request = json.load(sys.stdin)\n"
        "print('the compiler does not know an option')\n"
        "facts = {'rows': request['config']['batch_size'], 'platforms': os.environ['JAX_PLATFORMS']}\n"
        "print(json.dumps({'facts': facts}))"
    )
    answer = ask(said)
    assert answer["facts"] == {"rows": 4, "platforms": "cpu"} and not answer["cached"] and answer["seconds"] > 0
    assert said[0] == "v5e-4: the compiler does not know an option" and said[1].startswith("v5e-4: planned after ")


def test_progress_is_said(child, monkeypatch):
    monkeypatch.setattr(children, "SAY_EVERY", 0.1)
    said = child(
        "print(json.dumps({'stage': 'lowering'}), flush=True); time.sleep(0.5); print(json.dumps({'facts': 1}))"
    )
    ask(said)
    assert {"v5e-4: lowering", "v5e-4: lowering, 0 s"} <= set(said)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('ValueError: no such thing')", "status 1: ValueError: no such thing"),
        ("os.kill(os.getpid(), 9)", "signal 9 (Killed): probably because the machine's memory was full"),
        ("print('Check failed', file=sys.stderr, flush=True); os.abort()", "signal 6 (Aborted): Check failed"),
        ("os.kill(os.getpid(), 15)", "signal 15 (Terminated): it said nothing"),
    ],
)
def test_a_child_that_dies_is_a_failure(child, code, message, tmp_path):
    answer = ask(child(code), tmp_path / "cache")
    assert answer["failure"]["kind"] == "process" and answer["failure"]["message"].endswith(message)
    assert not (tmp_path / "cache").exists(), "it may do better the next time"


def test_evaluations_that_may_do_better_the_next_time_are_not_cached(child, tmp_path):
    cache = tmp_path / "cache"
    said = child("print(json.dumps({'facts': {'evaluation_failure_kind': json.load(sys.stdin)['kind']}}))")
    for kind, kept in (("config", False), ("process", False), ("memory", True), (None, True)):
        asked = REQUEST | {"kind": kind}
        assert ask(said, cache, asked)["facts"] == {"evaluation_failure_kind": kind}
        assert ask(said, cache, asked)["cached"] is kept


def test_answers_are_kept_by_fingerprint(child, tmp_path, monkeypatch):
    cache, count = tmp_path / "cache", tmp_path / "count"
    said = child(f"open({str(count)!r}, 'a').write('x'); print({json.dumps(FACTS)!r})")
    first, second = ask(said, cache), ask(said, cache)
    assert (first["cached"], second["cached"]) == (False, True) and first["facts"] == second["facts"]
    assert count.read_text() == "x"
    (file,) = cache.iterdir()
    file.write_text("{")  # cut off
    assert not ask(said, cache)["cached"] and ask(said, cache)["cached"]
    ask(said, cache, REQUEST | {"latents": True})
    assert count.read_text() == "xxx"
    monkeypatch.setattr(children, "_version", lambda name: "9.9")
    ask(said, cache)
    assert count.read_text() == "xxxx"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_use_enhanced_launch_barrier=true")
    ask(said, cache)
    assert count.read_text() == "xxxxx"
    assert not ask(said, None)["cached"]


def test_libtpu_has_deep_stacks_and_the_flags_of_the_user(child, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_use_enhanced_launch_barrier=true")
    said = child("print(json.dumps({'facts': os.environ['LIBTPU_INIT_ARGS']}))")
    flags = ask(said, None)["facts"].split()
    assert flags[-1] == "--xla_tpu_use_enhanced_launch_barrier=true", "the last of two equal flags counts"
    assert "--fibers_default_thread_stack_size=16777216" in flags
    assert ask(said, None, REQUEST | {"description": None})["facts"].split() == flags[-1:]


def test_the_devices_of_this_machine_are_asked_each_time(child, tmp_path):
    said = child("print(json.dumps({'facts': os.environ.get('TPU_WORKER_HOSTNAMES')}))")
    assert not any(ask(said, tmp_path / "cache", REQUEST | {"description": None})["cached"] for _ in range(2))
