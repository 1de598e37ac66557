"""Every shipped config loads, says how to run it, and is planned and trains in a tiny form."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from uwm_jax import codecs, systems
from uwm_jax import config as config_lib
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.parallel.mesh import make_mesh
from uwm_jax.planning import compiling, rows, sizes, topology
from uwm_jax.planning.rows import Question
from uwm_jax.planning.table import table
from uwm_jax.sweeps.members import groups, make_members, read_members
from uwm_jax.sweeps.program import SweepProgram
from uwm_jax.synthetic import synthetic_arrays, synthetic_batch, synthetic_spec
from uwm_jax.training.build import build

FOLDER = Path(__file__).parents[2] / "configs"
SWEEPS = sorted(p for p in (FOLDER / "sweeps").glob("*.py") if p.stem != "__init__")
CONFIGS = sorted(p for p in FOLDER.glob("*.py") if p.stem != "__init__")
SIZES = {"uwm_b": (768, 12), "uwm_l": (1024, 24), "uwm_xl": (1152, 28), "uwm_7b": (2048, 32)}  # width, depth

# What makes any of them small; everything else, such as options and keys, stays as shipped.
TINY = [
    ("batch_size", "2"),
    ("model.embed_dim", "32"),
    ("model.depth", "2"),
    ("model.num_heads", "2"),
    ("model.timestep_embed_dim", "16"),
    ("model.encoder.stage_sizes", "(1,)"),
    ("model.encoder.width", "16"),
    ("data.resize", "(24,32)"),
    ("data.crop", "(16,16)"),
]


def tiny(name):
    return config_lib.flatten(config_lib.load(str(CONFIGS[0].with_name(f"{name}.py")), TINY))


def test_two_sizes_are_in_tiny_form_what_another_is():
    """Which saves two programs in the test below."""
    for name in ("uwm_l", "uwm_xl"):
        assert tiny(name) == tiny("uwm_b") | {"mesh.fsdp": tiny(name)["mesh.fsdp"]}


@pytest.mark.parametrize(
    "path",
    [
        p if p.stem == "quickstart" else pytest.param(p, marks=pytest.mark.slow)
        for p in CONFIGS
        if p.stem not in ("uwm_l", "uwm_xl")
    ],
    ids=lambda p: p.stem,
)
def test_a_step_in_tiny_form(path, tmp_path, monkeypatch):
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path))  # no data
    config = config_lib.load(str(path), TINY)
    if config.model.codec.name == "vae":  # no pretrained weights here
        config.model.codec.name = "pixels"
    assert_a_step_runs(config, path)


def assert_a_step_runs(config, path):
    """The step that `uwm_jax.plan` compiles, with the sizes that the config's file states, and its row."""
    config.mesh.fsdp = 1  # one device
    question = Question(sizes.of_data(config, str(path)))
    prepared = compiling.prepare(rows.request(config, None, question))
    program = prepared.program
    step = compiling.compiled(program.mesh, prepared.lowered)
    facts = {**compiling.facts_of(prepared, step), **compiling.NO_EVALUATION}
    row = rows.row_of("here", config, None, question, {"facts": facts, "seconds": 0.0, "cached": False})
    state, system = program.system.held(program.compile_init()()), program.system
    frozen = synthetic_arrays(config, system.codec)
    assert row["parameters"] == sum(x.size for x in jax.tree.leaves(state.params)) and row["flops_per_step"]
    assert row["peak_hbm_bytes"] > sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    assert row["failure"] is None and not row["collectives"] and "predicted, never run" in table([row])
    batch = synthetic_batch(system, config.batch_size)
    state, metrics = step(state, frozen, batch)
    assert state.step == 1 and np.isfinite(metrics["loss"].value)
    return system, state, frozen, batch


@pytest.mark.slow
def test_the_program_of_a_sweep_in_tiny_form(tmp_path, monkeypatch):
    """What `uwm_jax.plan` compiles is what `launch.sweep` compiles, and its row has the memory of that program."""
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path))  # no data
    path = FOLDER / "sweeps" / "loss_weights.py"
    small = dict(TINY) | {"accumulation_steps": "1", "sweep.members_at_once": "0", "model.depth": "1"}
    small |= {"model.codec.name": "pixels", "data.augment.random_crop": "False", "data.augment.hue": "0"}
    members = make_members(config_lib.load(str(path), list(small.items())), read_members(str(path)))[:2]
    config, place = members[0].config, topology.find("v5e-1")
    question = Question(sizes.of_data(config, str(path)), members=2, names=tuple(m.name for m in members))
    prepared = compiling.prepare(rows.request(config, None, question))

    mesh = make_mesh(config, members=2)
    program = build(config, question.data.spec, codecs.from_config(config), mesh)
    sweep, frozen = SweepProgram(program, 2), synthetic_arrays(config, program.system.codec)
    assert prepared.lowered.as_text() == sweep.lower_step(frozen, program.batch_like).as_text()
    # The same text for both, so that either can be compiled.
    step = prepared.lowered.compile()
    facts = {**compiling.facts_of(prepared, step), **compiling.NO_EVALUATION}
    row = rows.row_of("v5e-1", config, place, question, {"facts": facts, "seconds": 0.0, "cached": False})
    plan = step.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.shapes))
    assert row["parameter_bytes"] + row["optimizer_bytes"] <= 2 * held <= plan.argument_size_in_bytes
    assert row["peak_hbm_bytes"] == plan.argument_size_in_bytes + plan.temp_size_in_bytes + (
        plan.output_size_in_bytes - plan.alias_size_in_bytes
    )
    single = config.batch_size * program.system.flops().training
    assert single < row["flops_per_step"] <= 2 * single
    assert row["members_per_chip"] == 2 < row["members_per_chip_at_most"] and row["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.py", "pusht.py:latents", "pusht.py:pixels"])
def test_pusht_at_its_own_sizes(name, tmp_path, monkeypatch):
    """Frames, codec, patches and encoder are as shipped, since they have to fit each other; the VAE's weights are
    random."""
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path))  # no data
    small = [(field, value) for field, value in TINY if not field.startswith(("data.", "model.encoder."))]
    config = config_lib.load(str(CONFIGS[0].parent / name), small)
    system, state, frozen, batch = assert_a_step_runs(config, CONFIGS[0].parent / name)
    noise = system.noise(jax.random.key(0), batch["row"], "policy")
    sample = jax.jit(lambda params, batch: system.sample(params, system.encode(frozen, batch), "joint", noise))
    made = sample(state.eval_params, batch)
    assert made["action"].shape == (2, 16, 2) and made["next_obs_latent"].shape == (2, *system.latent_shape)
    frames = jax.jit(system.frames)(frozen, made)
    assert frames.shape == (2, 1, 2, *config.data.crop, 3)
    assert all(np.isfinite(x).all() for x in (made["action"], frames))


def test_arguments_of_the_pusht_configs():
    for name, good in (("pusht", ("latents", "pixels")), ("pusht_cpu", ("full", "short"))):
        path = str(CONFIGS[0].with_name(f"{name}.py"))
        whole, other = (config_lib.load(f"{path}:{argument}") for argument in good)
        assert config_lib.flatten(config_lib.load(path)) == config_lib.flatten(whole) != config_lib.flatten(other)
        assert whole.eval.action_plane[0] in whole.data.cameras and not whole.data.augment.random_crop
        with pytest.raises(UserError, match="'other', expected one of "):
            config_lib.load(f"{path}:other")


def test_systems_of_the_comparison_differ_in_nothing_but_themselves():
    path = str(CONFIGS[0].with_name("pusht_cpu.py"))
    reference = config_lib.load(f"{path}:uwm,short")
    assert config_lib.load(f"{path}:short") == reference
    own = ("system", "model.", "diffusion.", "loss.", "data.low_dim", "data.window.next_obs", "data.window.reserve")
    kinds = {"uwm": "uwm", "dp": "dp", "dp_unet": "dp", "dp_flow": "dp", "pad": "pad", "gr1": "gr1"}
    for name, kind in kinds.items():
        config = config_lib.load(f"{path}:{name},short")
        assert (config.system, config_lib.load(f"{path}:{name}").total_steps) == (kind, 10_000)
        now, before = config_lib.flatten(config), config_lib.flatten(reference)
        differ = {n for n in now if not n.startswith(own) and now[n] != before.get(n)}
        assert differ == ({"optimizer.learning_rate"} if name == "gr1" else set())
        assert WindowSpec.from_config(config.data.window).places == WindowSpec.from_config(reference.data.window).places
        assert bool(config.data.low_dim) == (kind in ("uwm", "dp"))
        if "diffusion" in config:
            assert config.diffusion.num_inference_steps == reference.diffusion.num_inference_steps


@pytest.mark.parametrize("path", [*CONFIGS, *SWEEPS], ids=lambda p: p.stem)
def test_the_docstring_keeps_its_promise(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    place = path.relative_to(FOLDER.parent).as_posix()
    for part in ("Command:", f"--config={place}", "Hardware:", "Expect:"):
        assert part in docstring, f"{path.name} lacks {part!r}"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_the_members_of_a_sweep_share_a_program(path):
    base = config_lib.load(str(path))
    members = make_members(base, read_members(str(path)))
    shared = {"pusht_rates": 3}.get(path.stem, 1)  # a program for each width
    assert len(groups(members)) == shared and len(members) > shared
    assert {member.config.data.seed for member in members} == {config_lib.data_seed(base)}
    assert config_lib.data_sizes(str(path)), "for uwm_jax.plan"
    assert all(member.config.eval.every == member.config.total_steps for member in members)


def test_the_weightings_of_the_sweeps():
    droid, pusht = (FOLDER / "sweeps" / f"{name}.py" for name in ("loss_weights", "pusht_loss_weights"))
    weights = [m.config.loss.weights for m in make_members(config_lib.load(str(droid)), read_members(str(droid)))]
    assert sorted(w.action / w.next_obs for w in weights) == [2.0**n for n in range(-2, 6)]
    assert any((w.action, w.next_obs) == (1, 1) for w in weights)
    assert config_lib.load(f"{droid}:official").data.last_action == "keep" and read_members(f"{droid}:official")
    short = config_lib.flatten(config_lib.load(str(FOLDER / "pusht_cpu.py") + ":short"))
    members = make_members(config_lib.load(str(pusht)), read_members(str(pusht)))
    assert len(members) == 18 and sorted({m.config.seed for m in members}) == [0, 1, 2]
    fixed = {"data.seed", "eval.every", "eval.closed_loop.env", "checkpoint.every", "checkpoint.keep"}
    for member in members:
        flat = config_lib.flatten(member.config)
        differ = {n for n in flat if flat[n] != short[n]}
        assert fixed <= differ <= {*fixed, "seed", "loss.weights.action", "loss.weights.next_obs"}
        assert (flat["eval.num_windows"], flat["eval.closed_loop.episodes"]) == (256, 50)


def test_the_papers_pretraining():
    """The numbers of the paper's table of hyper-parameters and of the official configuration."""
    config = config_lib.load(str(CONFIGS[0].with_name("droid.py")))
    m, w, o = config.model, config.data.window, config.optimizer
    assert (m.embed_dim, m.depth, m.num_heads, m.num_registers, m.patch) == (768, 12, 12, 8, (2, 4, 4))
    assert (m.timestep_embed_dim, m.mlp_ratio, m.encoder.stage_sizes) == (512, 4, (2, 2, 2, 2))
    assert (w.obs, w.action, w.next_obs, w.pad) == ((0, 1), tuple(range(1, 17)), (17, 18), "none")
    assert (config.data.resize, config.data.crop) == ((240, 320), (224, 224))
    assert (config.diffusion.num_train_steps, config.diffusion.num_inference_steps) == (100, 10)
    assert (o.learning_rate, o.b1, o.b2, o.weight_decay, o.schedule) == (1e-4, 0.9, 0.999, 1e-6, "constant")
    assert (config.total_steps, config.batch_size) == (100_000, 144)


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_are_what_their_docstrings_say(name):
    """Parameters counted in the shapes of the network itself, at its own width and depth."""
    path = CONFIGS[0].with_name(f"{name}.py")
    config = config_lib.load(str(path))
    width, depth = SIZES[name]
    assert (config.model.embed_dim, config.model.depth, width // config.model.num_heads) == (width, depth, 64)
    system = systems.make(config, synthetic_spec(config, action_dim=10), codecs.from_config(config))
    shapes = jax.eval_shape(system.init, jax.random.key(0))

    def millions(tree):
        return sum(x.size for x in jax.tree.leaves(tree)) / 1e6

    network = shapes["noise_pred_net"]
    told = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    for part in (
        f"{millions(network):,.2f} M parameters in the network",
        f"{millions(network['blocks']['adaln']):,.2f} M of them in the AdaLN layers",
        f"{millions(shapes['obs_encoder']):,.2f} M in the image encoder",
        f"take {12 * millions(shapes) / 1e3:.1f} GB",
    ):
        assert part in told, part


def test_the_sizes_share_droids_data_and_one_schedule():
    droid = config_lib.flatten(config_lib.load(str(CONFIGS[0].with_name("droid.py"))))
    reference = config_lib.flatten(config_lib.load(str(CONFIGS[0].with_name("uwm_b.py"))))
    assert {n for n in droid if droid[n] != reference[n]} == {
        *("batch_size", "model.remat", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.decay_steps"),
        "optimizer.clip_norm",
    }
    for name in SIZES:
        config = config_lib.flatten(config_lib.load(str(CONFIGS[0].with_name(f"{name}.py"))))
        differ = {n for n in config if config[n] != reference[n]}
        assert differ <= {"model.embed_dim", "model.depth", "model.num_heads", "model.remat", "mesh.fsdp"}
        assert config["batch_size"] % config["mesh.fsdp"] == 0
        assert config_lib.load(str(CONFIGS[0].with_name(f"{name}.py:official"))).data.last_action == "keep"


def test_the_papers_runs_on_libero():
    """The official configurations for LIBERO-90 and for one of its tasks."""
    folder = CONFIGS[0].parent
    before = config_lib.load(str(folder / "libero90.py"))
    after = config_lib.load(str(folder / "libero_finetune.py"))
    for c in (before, after):
        assert (c.model.num_registers, c.data.resize, c.data.crop, c.data.normalize) == (
            24,
            (240, 240),
            (224, 224),
            "none",
        )
        assert len(c.data.cameras) == 2 and c.model.codec.name == "vae"
        assert c.optimizer.learning_rate == 1e-4
    assert (before.total_steps, before.batch_size, before.optimizer.schedule) == (100_000, 144, "constant")
    assert (before.optimizer.warmup_steps, before.optimizer.clip_norm, before.init_from) == (0, 0.0, "")
    assert (after.total_steps, after.batch_size, after.optimizer.schedule) == (20_000, 72, "cosine")
    assert (after.optimizer.warmup_steps, after.optimizer.clip_norm, after.init_from) == (1000, 1.0, "runs/libero90")
    a, b = config_lib.flatten(before), config_lib.flatten(after)
    differing = {name for name in a if a[name] != b[name]}
    assert {n for n in differing if n.startswith(("model.", "diffusion."))} == {"model.encoder.imagenet_weights"}


def test_each_task_of_libero_is_an_argument():
    path = str(CONFIGS[0].with_name("libero_finetune.py"))
    docstring = ast.get_docstring(ast.parse(Path(path).read_text()))
    includes = set()
    for task in ("book_caddy", "soup_cheese", "bowl_drawer", "moka_moka", "mug_mug"):
        assert task in docstring
        includes |= set(config_lib.load(f"{path}:{task}").data.sources.task.include)
    assert len(includes) == 5
    with pytest.raises(UserError, match="unknown task 'cups', expected one of book_caddy"):
        config_lib.load(f"{path}:cups")


def test_droids_episodes_are_an_argument():
    for name in ("droid.py", "droid_cotrain.py"):
        path = str(CONFIGS[0].with_name(name))
        assert f"--config=configs/{name}:official" in ast.get_docstring(ast.parse(Path(path).read_text()))
        with pytest.raises(UserError, match="unknown episodes 'all', expected one of successes, official"):
            config_lib.load(f"{path}:all")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_clip_of_latents_is_that_of_the_codec_that_a_flag_chooses(path):
    for codec, clip in (("pca", 20.0), ("pixels", 1.0), ("vae", 1.0)):
        assert config_lib.load(str(path), [("model.codec.name", codec)]).diffusion.clip.next_obs == clip
