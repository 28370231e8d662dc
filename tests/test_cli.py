"""The command line prints what the library knows."""

import runpy
import sys

import pytest

from jmp_lite import cli


def test_formats_lists_every_format_with_its_limits(capsys):
    """The largest float16 and the largest float8 are printed in full."""
    assert cli.main(["formats"]) == 0
    printed = capsys.readouterr().out
    assert "65504" in printed
    assert "448" in printed


def test_devices_lists_every_local_device(capsys):
    """Eight simulated devices are eight lines below the two of the header."""
    assert cli.main(["devices"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 8


def test_devices_names_the_better_format(capsys, monkeypatch):
    """A GPU without bfloat16 units is pointed at float16."""
    turing = type("Device", (), {"id": 0, "platform": "gpu", "device_kind": "T4", "compute_capability": "7.5"})()
    monkeypatch.setattr("jax.local_devices", lambda: [turing])
    cli.main(["devices"])
    assert "bf16 is slow (use float16)" in capsys.readouterr().out


def test_policy_spells_out_an_alias(capsys):
    """Keras' name becomes three dtypes."""
    assert cli.main(["policy", "mixed_bfloat16"]) == 0
    assert capsys.readouterr().out.split()[4:8] == ["param_dtype", "float32", "compute_dtype", "bfloat16"]


def test_unknown_policy_exits_with_2_and_quotes_it(capsys):
    """Shells see a failure, people see what they typed."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["policy", "f17"])
    assert exit_.value.code == 2
    assert "Unknown dtype 'f17' in policy 'f17'" in capsys.readouterr().err


def test_module_runs_as_a_program(capsys, monkeypatch):
    """``python -m jmp_lite`` is the same command."""
    monkeypatch.setattr(sys, "argv", ["jmp-lite", "formats"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("jmp_lite", run_name="__main__")
    assert exit_.value.code == 0
    assert "bf16" in capsys.readouterr().out


MODULE = """
import jax.numpy as jnp

def call():
    return lambda w, x: jnp.sum(jnp.exp(x @ w)), jnp.ones((16, 32)), jnp.ones((8, 16))

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module of the user's, in the working directory."""
    (tmp_path / "explained_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "explained_module"
    sys.modules.pop("explained_module", None)


@pytest.mark.parametrize(("arguments", "products"), [((), 1), (("--grad",), 2)])
def test_explain_prints_a_line_per_equation(capsys, module, arguments, products):
    """A summary, then forward one product, with the gradient two."""
    path = list(sys.path)
    assert cli.main(["explain", f"{module}:call", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Matrix products and convolutions: {products} in 16 bits (100.0% of FLOPs).")
    assert sum("dot_general" in line and "bf16, bf16" in line for line in lines) == products
    assert sys.path == path


@pytest.mark.parametrize(
    "target", ["explained_module:cal", "explained_module:number", "no_such_module:call", "call", ""]
)
def test_explain_says_what_it_could_not_find(capsys, module, target):
    """The message quotes the target and shows the form."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["explain", target])
    assert exit_.value.code == 2
    assert f"Cannot explain {target!r}" in capsys.readouterr().err
