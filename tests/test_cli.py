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
