"""Rows of a plan from answers of child processes: what a chip holds, what fits, and failures as rows."""

from __future__ import annotations

import json

import pytest

from tests.planning.facts import facts
from uwm_jax import config as config_lib
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.planning import children, rows, topology
from uwm_jax.planning.rows import Question
from uwm_jax.planning.sizes import Data
from uwm_jax.planning.table import table

GB = 10**9


def question(config, **options) -> Question:
    cameras = dict.fromkeys(config.data.cameras, (180, 320))
    spec = DataSpec(WindowSpec.from_config(config.data.window), cameras, {}, 10, 0, Normalizer())
    return Question(Data(spec, None, "a test"), **options)


def base():
    config = config_lib.base()
    config.batch_size = 32
    return config


@pytest.fixture
def plan(monkeypatch):
    """A function that makes the row of v5e-16 of an answer, and checks that it can be printed and stored."""

    def row(answer, config=None, name="v5e-16", **options):
        config = config or base()
        monkeypatch.setattr(children, "ask", lambda *_, **__: {**answer, "seconds": 1.0, "cached": False})
        found = rows.row(name, config, question(config, **options), print)
        assert found["status"] == "predicted, never run"
        assert json.loads(json.dumps(found)) == found and "predicted, never run" in table([found])
        assert set(rows.KEYS) <= found.keys()
        return found

    return row


def test_what_the_compiler_leaves_out_counts(plan):
    found = plan({"facts": facts()})
    prefetch = config_lib.base().data.prefetch * 10**7 + 100
    parts = {"decoder": 2 * 10**8, "prefetch": prefetch, "code": 10**8}
    assert {name: found[f"extra_hbm_bytes/{name}"] for name in parts} == parts
    assert found["extra_hbm_bytes"] == sum(parts.values()) and found["peak_hbm_bytes"] == 8 * GB
    assert found["fits"] and found["activation_bytes"] == 5 * GB
    assert (found["chips"], found["cores"], found["hbm_limit_bytes"]) == (16, 16, int(15.75 * 2**30))
    assert found["flops_per_step"] == 2 * 197e12
    assert found["collective_bytes/all-reduce"] == 2 * 10**8 and found["collective_bytes/all-gather"] == 10**7 + 1


def test_a_step_that_fits_alone_does_not_fit_with_what_is_left_out(plan):
    limit = int(15.75 * 2**30)
    memory = facts()["memory"] | {"peak": limit - 10**8}
    found = plan({"facts": facts(memory=memory)})
    assert found["peak_hbm_bytes"] < found["hbm_limit_bytes"] and found["fits"] is False


def test_evaluations_in_training_may_need_more_than_the_step(plan):
    found = plan({"facts": facts(evaluation={"peak": 13 * GB, "code": 2 * 10**8})})
    batches = (1 + config_lib.base().data.prefetch) * 10**7 + 100
    assert found["evaluation_hbm_bytes"] == 3.3 * GB + 24 + batches + 10**8 + 13 * GB + 2 * 10**8
    assert found["fits"] is True
    assert plan({"facts": facts(evaluation={"peak": 14 * GB, "code": 2 * 10**8})})["fits"] is False
    failure = "Used 20.1G of 15.75G hbm"
    failed = plan({"facts": facts(evaluation_failure=failure, evaluation_failure_kind="memory")})
    assert failed["fits"] is False and "evaluations in training: Used 20.1G" in failed["failure"]


def test_evaluations_that_cannot_be_planned_leave_the_step(plan):
    failure = {"evaluation_failure": "install gym-pusht", "evaluation_failure_kind": "config"}
    failed = plan({"facts": facts(**failure)})
    assert failed["fits"] is None and failed["failure_kind"] == "config" and failed["step_seconds_estimate"]
    assert "refused: evaluations in training: install gym-pusht" in table([failed])
    large = facts()["memory"] | {"peak": 20 * GB}
    assert plan({"facts": facts(memory=large, **failure)})["fits"] is False


def test_the_parts_of_the_memory_are_those_of_the_peak(plan):
    held = facts()["bytes"] | {"parameters": 10**9, "optimizer": 2 * 10**9, "frozen": 3 * 10**8, "batch": 10**7}
    read = 10**9 + 2 * 10**9 + 24 + 10**8 + 10**7  # 200 MB of the codec are not read
    memory = facts()["memory"] | {"arguments": read}
    text = table([plan({"facts": facts(bytes=held, memory=memory)})])
    block = text[text.index("memory of a chip") : text.index("peak of the step")].splitlines()[1:-1]
    assert sum(float(line.split()[-1]) for line in block) == pytest.approx(8.0, abs=0.01)


def test_a_schedule_that_cannot_be_read_is_warned_of(plan):
    found = plan({"facts": facts(cycles=None, hbm_bytes=None, schedule_failure="body lies in a loop")})
    assert found["step_seconds_estimate"] is None
    assert "the bytes of its schedule are not known: body lies in a loop" in found["warnings"][-1]


def test_a_step_that_was_run_is_not_called_never_run():
    measured = {"planned_bytes": GB, "measured_bytes": 2 * GB, "step_seconds": 0.5}
    about = {"platform": "cpu", "device_kind": "cpu", "seconds_at_peak": None, "cycles": None, "hbm_bytes": None}
    answer = {"facts": facts(measured=measured, **about), "seconds": 1.0, "cached": False}
    found = rows.row_of("here", base(), None, question(base()), answer)
    assert found["status"] == "predicted, but for what was measured" and "never run" not in table([found])
    assert "measured on this machine (cpu): 500.00 ms" in table([found])


def test_many_collectives_are_told_in_a_line(plan):
    few = facts()["collectives"]
    found = plan({"facts": facts(collectives=few * 10)})
    assert len(found["collectives"]) == 20
    assert "and 8 others, which send 1,680.00 MB" in table([found])


@pytest.mark.parametrize(
    ("moved", "rest"), [(-3_584, " - 3,584 of equal gradients that are reduced once"), (0, ""), (20, " + 20 of others")]
)
def test_the_all_reduce_is_the_sum_of_its_parts(plan, moved, rest):
    reduced = facts()["collectives"][0] | {"bytes": 4 * 250_000_000 + 76 + moved}
    found = plan({"facts": facts(collectives=[reduced])})
    assert found["gradient_bytes/merged"] == moved
    line = f"all-reduce: {reduced['bytes']:,} bytes = 4 x 250,000,000 parameters + 76 of metrics{rest}\n"
    assert line in table([found]) + "\n"


def test_large_activations_between_chips_are_warned_of(plan):
    found = plan({"facts": facts()})
    (warning,) = found["warnings"]
    assert warning == "all-gather over fsdp carries 10.0 MB of activations a step: jit(step)/all-gather"
    assert f"warning: {warning}" in table([found])


def test_speed_days_and_costs_at_best_by_estimate_and_at_an_efficiency(plan):
    config = base()
    config.total_steps = 86_400
    found = plan({"facts": facts()}, config, price=2.0, efficiency=0.5)
    assert found["days/lower_bound"] == pytest.approx(0.125)
    assert found["samples_per_second/lower_bound"] == pytest.approx(32 / 0.125)
    assert found["days/efficiency"] == pytest.approx(0.25)
    assert found["cost/efficiency"] == pytest.approx(0.25 * 24 * 16 * 2.0)
    assert found["days/estimate"] == pytest.approx(found["step_seconds_estimate"])


@pytest.mark.parametrize(
    ("failure", "fits", "said"),
    [
        (
            {"kind": "memory", "message": "Used 18G of 15.75G hbm", "peak_bytes": 18 * GB, "facts": facts()},
            False,
            "does not fit",
        ),
        ({"kind": "config", "message": "config.batch_size=36 does not divide"}, None, "refused"),
        ({"kind": "process", "message": "ended with status -9"}, None, "failed"),
    ],
)
def test_failures_are_rows(plan, failure, fits, said):
    found = plan({"failure": failure})
    assert found["fits"] is fits and found["failure"] == failure["message"]
    assert found["peak_hbm_bytes"] == failure.get("peak_bytes")
    assert (found["flops_per_step"] is not None) == (fits is False)
    assert found["step_seconds_estimate"] is None
    assert f"{said}: {failure['message']}" in table([found])


def test_temporaries_that_do_not_fit_come_on_top_of_what_is_held(plan):
    failure = {"kind": "memory", "message": "no room", "temporary_bytes": 20 * GB, "facts": facts()}
    found = plan({"failure": failure})
    assert found["peak_hbm_bytes"] == 20 * GB + sum(facts()["bytes"].values()) and found["fits"] is False
    assert found["parameter_bytes"] == GB and found["mesh"] == {"data": 16, "fsdp": 1, "tensor": 1}


def test_members_of_a_sweep(plan):
    """Two members on each of four chips hold 3 GB of state and as many gradients as parameters, 1 GB."""
    mesh = {"sweep": 4, "data": 1, "fsdp": 1, "tensor": 1}
    found = plan({"facts": facts(members=8, chips=4, mesh=mesh, collectives=[])}, name="v5e-4", members=8)
    assert found["members_per_chip"] == 2 and "gradient_bytes/parameters" not in found
    shared = found["peak_hbm_bytes"] + found["extra_hbm_bytes"] - 4 * GB - 24
    assert found["members_per_chip_at_most"] == int((int(15.75 * 2**30) - shared) // (2 * GB + 12)) == 6
    assert found["member_steps_per_second/estimate"] == pytest.approx(8 / found["step_seconds_estimate"])
    assert found["member_steps_per_second/lower_bound"] == pytest.approx(8 / found["step_seconds_lower_bound"])
    assert "8 members in one program" in table([found])
    assert "2 on a chip, where 6 fit by arithmetic" in table([found])


@pytest.mark.parametrize(
    ("size", "most", "told"),
    [
        ({"peak_bytes": 19 * GB}, 0, "2 on a chip, where 0 fit by arithmetic"),  # 16.9 GB, of which others take 15
        ({"peak_bytes": 17 * GB}, 1, "2 on a chip, where 1 fit by arithmetic"),
        ({"temporary_bytes": 40 * GB}, 0, "2 on a chip, where 0 fit by arithmetic"),
        ({}, None, "2 on a chip, how many fit is not known"),
    ],
)
def test_members_of_a_sweep_that_does_not_fit(plan, size, most, told):
    mesh = {"sweep": 4, "data": 1, "fsdp": 1, "tensor": 1}
    failure = {"kind": "memory", "message": "no room", **size, "facts": facts(members=8, chips=4, mesh=mesh)}
    config = base()
    config.sweep.members_at_once = 0
    found = plan({"failure": failure}, config, name="v5e-4", members=8, names=("seed=0", "seed=1"))
    assert (found["members_per_chip"], found["members_per_chip_at_most"]) == (2, most)
    text = table([found])
    assert told in text and "8 members in one program: seed=0  seed=1" in text
    assert "to try: config.model.remat=dots or full, config.accumulation_steps=2, " in text
    assert "config.sweep.members_at_once=1, fewer members, more chips" in text


def test_a_sweep_of_several_programs_is_told_as_a_whole(plan):
    answer = {"facts": facts(members=2, mesh={"sweep": 2, "data": 8, "fsdp": 1, "tensor": 1})}
    made = [plan(answer, members=2, program=n, programs=2, price=1.0) for n in (1, 2)]
    first, second = rows.whole_sweep(made)
    assert first["sweep_fits"] is second["sweep_fits"] is True
    for key in ("days", "cost"):
        assert first[f"sweep_{key}/estimate"] == pytest.approx(2 * first[f"{key}/estimate"])
    text = table([first, second])
    assert "v5e-16 (1 of 2)" in text and "v5e-16 (2 of 2)" in text
    assert text.count("all 2 programs of the sweep on v5e-16, one after another: fit: yes, days ") == 1
    failed = plan({"failure": {"kind": "config", "message": "no"}}, members=2, program=2, programs=2)
    assert rows.whole_sweep([made[0], failed])[0]["sweep_fits"] is None
    assert rows.whole_sweep([made[0] | {"fits": False}, failed])[0]["sweep_fits"] is False
    assert rows.whole_sweep([made[0], failed])[1]["sweep_days/estimate"] is None


@pytest.mark.parametrize(
    ("changed", "ways"),
    [
        ({}, "config.model.remat=dots or full, config.accumulation_steps=2, a larger config.mesh.fsdp, --search, "),
        ({"model.remat": "full", "accumulation_steps": 2}, "a larger config.mesh.fsdp, --search, "),
    ],
)
def test_what_does_not_fit_gets_advice(plan, changed, ways):
    config = base()
    config.update_from_flattened_dict(changed)
    failure = {"kind": "memory", "message": "no room", "peak_bytes": 18 * GB, "facts": facts()}
    assert f"to try: {ways}which tries these, more chips" in table([plan({"failure": failure}, config)])
    too_large = facts(memory=facts()["memory"] | {"peak": 20 * GB})
    assert "to try: " in table([plan({"facts": too_large}, config)]) and "to_try" not in plan({"facts": facts()})


def test_the_cache_knows_the_contents_of_the_mesh_rules(tmp_path):
    config, prints = base(), set()
    config.mesh.rules = str(tmp_path / "rules.py")
    for text in (None, "PARAMS = ()", "PARAMS = ((r'.*', ()),)"):
        if text:
            (tmp_path / "rules.py").write_text(text)
        prints.add(children.fingerprint(rows.request(config, topology.find("v5e-16"), question(config))))
    assert len(prints) == 3


def test_slices_of_the_topology_are_those_of_the_mesh(plan):
    config = base()
    config.mesh.slices = 2
    assert rows.with_slices(config, topology.find("2xv5e-16")) is config
    with pytest.raises(UserError, match="config.mesh.slices=2 does not fit --topology=v5e-16 of 1 slice"):
        rows.with_slices(config, topology.find("v5e-16"))
    assert plan({"facts": facts()}, config)["failure_kind"] == "config"
    config.mesh.slices = 1
    assert rows.with_slices(config, topology.find("2xv5e-16")).mesh.slices == 2 and config.mesh.slices == 1
