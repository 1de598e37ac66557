"""Variables of workers: plain ones are shown, secrets never."""

from __future__ import annotations

import pytest
from absl import flags
from absl.testing import flagsaver

from launch import variables
from launch.variables import Secret
from uwm_jax.errors import UserError


@pytest.fixture
def given():
    """A function that sets the flags --env and --secret."""
    before = set(flags.FLAGS)
    variables.define_flags()
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["test"])
    with flagsaver.flagsaver():

        def give(env=(), secret=()):
            flags.FLAGS.env, flags.FLAGS.secret = list(env), list(secret)

        yield give
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_plain_variables(given):
    given(env=["UWM_DATA_DIR=gs://b/data", "A=x=y"])
    assert variables.plain() == {"UWM_DATA_DIR": "gs://b/data", "A": "x=y"}


@pytest.mark.parametrize("env", ["WANDB_API_KEY=abc123", "HF_TOKEN=abc123", "PASSWORD=abc123", "my_secret=abc123"])
def test_what_looks_like_a_secret_is_not_shown(given, env):
    given(env=[env])
    with pytest.raises(UserError, match="looks like a secret.*--secret=") as e:
        variables.plain()
    assert "abc123" not in str(e.value)


@pytest.mark.parametrize("env", ["A", "1A=x", "=x"])
def test_plain_variables_have_names_and_values(given, env):
    given(env=[env])
    with pytest.raises(UserError, match="expected NAME=VALUE"):
        variables.plain()


def test_secrets(given):
    given(secret=["WANDB_API_KEY", "HF_TOKEN=hf", "OTHER=hf:3"])
    assert variables.secrets() == [Secret("WANDB_API_KEY"), Secret("HF_TOKEN", "hf"), Secret("OTHER", "hf", "3")]


@pytest.mark.parametrize("secret", ["A=with space", "A=", "A=name:newest", "1A", "A=projects/p"])
def test_secrets_are_named_and_not_given(given, secret):
    given(secret=[secret])
    with pytest.raises(UserError, match="the value itself is never given") as e:
        variables.secrets()
    assert "with space" not in str(e.value)


def test_a_variable_is_set_once(given):
    given(env=["A=1"], secret=["A"])
    with pytest.raises(UserError, match="A is given twice"):
        variables.secrets()


def test_the_value_is_that_of_this_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert Secret("WANDB_API_KEY").value() == "abc"
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="not set here. Set it, or name a secret"):
        Secret("WANDB_API_KEY").value()
