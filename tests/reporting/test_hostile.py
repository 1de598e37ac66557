"""A page shows any text of a run's files as text."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from uwm_jax.errors import UserError
from uwm_jax.reporting import comparison, run_page
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.results import Run
from uwm_jax.reporting.sheets import Labels, Mark, write_labels

EVIL = "\"'><b class=evil onclick=x>&amp;</td></style><script>alert(1)</script>{0}$\\frac$\x00\u202e\udcff`"
NAME = EVIL.replace("/", "_").replace("\x00", "")  # as a file may be called
SHOWN_NAME = NAME.replace("\u202e", "\\u202e").replace("\udcff", "\\udcff")


def poison(value: object) -> object:
    """JSON with every string, and every key that is not of the format, followed by the hostile text."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, list):
        return [poison(v) for v in value]
    return {k: poison(v) for k, v in value.items()} if isinstance(value, dict) else value


def poison_files(workdir: Path) -> None:
    for file in ("run.json", "eval/20/about.json", "eval/20/few_steps.json", "rollout/20/episodes.json"):
        found = poison(json.loads((workdir / file).read_text()))
        for record in [found, *found.get("starts", [])]:
            if "changed" in record:
                record["changed"] = {**record["changed"], f"field{EVIL}": f"value{EVIL}"}
        (workdir / file).write_text(json.dumps(found))
    few = workdir / "eval/20/few_steps.json"
    found = json.loads(few.read_text())
    found["rows"][0] |= {"steps": f"steps{EVIL}", "first_timestep": f"first{EVIL}", "hidden_timestep": f"hidden{EVIL}"}
    found["rows"][0]["metrics"][f"closed_loop/{EVIL}"] = {"mean": 1, "lo": 1, "hi": 1, "n": 9, "episodes": 9}
    few.write_text(json.dumps(found))
    for file in ("eval/20/metrics.json", "rollout/20/metrics.json"):
        found = json.loads((workdir / file).read_text())
        found |= {f"{start}{EVIL}": next(iter(found.values())) for start in ("policy/", "paired/a_vs_", "policy/max_")}
        (workdir / file).write_text(json.dumps(found))
    other = workdir / "eval" / "20" / f"other{NAME}"
    other.mkdir()
    for file in ("metrics.json", "about.json", "few_steps.json"):
        (other / file).write_text((workdir / "eval/20" / file).read_text())
    about = json.loads((other / "about.json").read_text())
    (other / "about.json").write_text(json.dumps(about | {"settings": {f"setting{EVIL}": f"set{EVIL}"}}))
    labels = Labels([(f"title{EVIL}", f"below{EVIL}")], [f"row{EVIL}"], [[f"caption{EVIL}"]])
    key = [Mark(kind, f"#000{EVIL}", f"mark{EVIL}") for kind in ("-", "frame", f"kind{EVIL}")]
    write_labels(workdir / "eval/20", dict.fromkeys(("idea.png", "modes.png"), labels._replace(key=key)))


@pytest.fixture
def poisoned(make_run, tmp_path, monkeypatch):
    """Directories of two runs whose files hold nothing but hostile text, and their names too."""
    runs = [make_run(tmp_path / f"{NAME}{i}", seed=i) for i in range(2)]
    for i, workdir in enumerate(runs):
        config = json.loads((workdir / "config.json").read_text())
        config["data"]["path"] = f"path{i}{EVIL}"
        config["model"]["codec"]["vae"] = f"vae{i}{EVIL}"
        (workdir / "config.json").write_text(json.dumps(config))
        poison_files(workdir)
    split = {"episodes": f"e{EVIL}", "steps": f"s{EVIL}", "shards": [{"sha256": EVIL}]}
    manifest = {
        "name": f"name{EVIL}",
        "version": f"version{EVIL}",
        "splits": {f"split{EVIL}": split},
        "cameras": {f"camera{EVIL}": {"height": f"h{EVIL}", "width": 3}},
    }
    read = Run.read

    def with_manifest(*args, **kwargs) -> Run:
        run = read(*args, **kwargs)
        used, code = {f"source{EVIL}": f"used{EVIL}"}, f"code{EVIL}"
        return dataclasses.replace(run, manifests={f"source{EVIL}": manifest}, used=used, code_version=code)

    monkeypatch.setattr(Run, "read", with_manifest)
    return runs


def assert_harmless(page, source: str, words: tuple[str, ...]) -> None:
    assert not [tag for tag, attributes in page.tags if attributes.get("class") == "evil"]
    assert not {"\x00", "\u202e"} & set(source) and "<script" not in source.lower()
    for word in words:  # of JSON values, " is \\"
        shown = re.escape(word) + r"""\\?"'><b class=evil onclick=x>&amp;</td></style><script>"""
        assert re.search(shown, page.text), word


def test_a_page_of_hostile_files_is_text(poisoned, parse):
    source = run_page.write(poisoned[0]).read_text()
    words = ("path0", "vae0", "field", "value", "source", "name", "version", "camera", "split", "code", "used", "pusht")
    words += ("steps", "first", "hidden", "trailing", "title", "below", "row", "caption", "mark", "setting", "set")
    page = parse(source)
    assert_harmless(page, source, words)
    assert page.text.count(f"other{SHOWN_NAME}, step 20") == 2  # the evaluation, the comparison of samplers


def test_a_comparison_of_hostile_files_is_text(poisoned, parse, tmp_path):
    source = comparison.compare(poisoned, tmp_path / "both.html").read_text()
    assert_harmless(parse(source), source, ("path0", "path1", "vae1", "name"))
    assert f"{SHOWN_NAME}1" in parse(source).text


def test_a_name_that_is_no_text_is_shown(make_run, parse, tmp_path):
    workdir = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    assert "caf\\udce9" in parse(run_page.write(workdir).read_text()).text


@pytest.mark.parametrize("file", ["eval/20/about.json", "eval/20/few_steps.json", "rollout/20/episodes.json"])
def test_fields_of_another_type_are_named_or_shown(make_run, tmp_path, monkeypatch, file):
    monkeypatch.setattr("uwm_jax.reporting.page.curves_svg", lambda panel: "")  # which reads none of these files
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    record, refused = json.loads((runs[0] / file).read_text()), set()
    about = record.get("about", record)
    about |= {"settings": {}, "leak": None, "workdir": "w", "datasets": {"a": "1"}, "command": []} | about
    about |= {"changed": {}, "time": "", "code_version": ""} | about
    for name, value in list(about.items()):
        for other in (3, "x", [1], [{}], {"a": 1}, {"policy": [{"seed": "x"}]}, None, 10**400):
            about[name] = other
            (runs[0] / file).write_text(json.dumps(record))
            try:
                run_page.write(runs[0])
                comparison.compare(runs, tmp_path / "both.html")
            except UserError as e:
                refused.add(name)
                assert str(runs[0] / file) in str(e) and "Delete it, and make it again" in str(e)
        about[name] = value
    assert {"command", "changed", "time", "settings", "datasets", "workdir", "leak"} <= refused


def test_a_damaged_record_of_starts_is_told(make_run, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text('{"starts": [{"changed": 3}]}')
    assert "Trained</dt>" not in run_page.write(run).read_text()
    assert "run.json is damaged, so how the run was started is not shown" in capsys.readouterr().err


def test_values_are_escaped_and_html_is_not():
    assert fill("<b>{}{x}</b>", "<&>", x=Html("<i>")) == "<b>&lt;&amp;&gt;<i></b>"
    assert fill("{}", [fill("<u>{}</u>", s) for s in ("<", "{}")]) == "<u>&lt;</u><u>{}</u>"
    assert fill('<a title="{}">', "\"'") == '<a title="&quot;&#x27;">'
    assert fill("{}{}", None, 3) == "3" and isinstance(fill("x"), Html)
    assert fill("{}", "a\u2066b\x1b\ud800") == "a\\u2066b\\u001b\\ud800"
