"""The command line prints what the library knows."""

import re
import runpy
import subprocess
import sys

import jax
import pytest

import jmp_lite
from jmp_lite import cli


def test_formats_lists_every_format_with_its_limits(capsys):
    """The largest float16 and the largest float8 are printed in full."""
    assert cli.main(["formats"]) == 0
    printed = capsys.readouterr().out
    assert "65504" in printed
    assert "448" in printed


def test_devices_lists_every_local_device(capsys):
    """Eight simulated devices are eight lines below the header."""
    assert cli.main(["devices"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8


def test_devices_names_the_better_format(capsys, monkeypatch):
    """A GPU without bfloat16 units is pointed at float16."""
    turing = type("Device", (), {"id": 0, "platform": "gpu", "device_kind": "T4", "compute_capability": "7.5"})()
    monkeypatch.setattr("jax.local_devices", lambda: [turing])
    cli.main(["devices"])
    assert "bf16 is slow (use float16)" in capsys.readouterr().out


def test_policy_spells_out_an_alias(capsys):
    """Keras' name becomes three dtypes."""
    assert cli.main(["policy", "mixed_bfloat16"]) == 0
    assert capsys.readouterr().out.split()[2:6] == ["param_dtype", "float32", "compute_dtype", "bfloat16"]


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

class Odd(Exception):
    def __str__(self):
        return "first line\\n  second line\\n" + "x" * 9999

def call():
    return lambda w, x: jnp.sum(jnp.exp(x @ w)), jnp.ones((16, 32)), jnp.ones((8, 16))

def raises_at_once():
    raise Odd

def raises_inside():
    def fun(x):
        raise KeyError("no such key")
    return fun, jnp.ones(3)

def leaves():
    raise SystemExit

def for_ever():
    return for_ever()

def shapes():
    return jnp.dot, jnp.ones((2, 3)), jnp.ones((2, 3))

def too_many():
    return jnp.sin, jnp.ones(3), jnp.ones(3), jnp.ones(3)

def no_scalar():
    return jnp.sin, jnp.ones(3)

def takes_one(x):
    return jnp.sin, x

def no_function():
    return "sin", jnp.ones(3)

def nothing():
    return ()

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a user's module, in the working directory."""
    (tmp_path / "explained_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_module.py").write_text("def (")
    (tmp_path / "leaving_module.py").write_text("import sys\nsys.exit('bye')")
    (tmp_path / "importing_module.py").write_text("import no_such_module")
    yield "explained_module"
    for name in ("explained_module", "broken_module", "leaving_module"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("arguments", "products"), [((), 1), (("--grad",), 2)])
def test_explain_prints_a_line_per_equation(capsys, module, arguments, products):
    """A summary, then forward one matmul, with the gradient two."""
    path = list(sys.path)
    assert cli.main(["explain", f"{module}:call", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Matmuls and convolutions: {products} in 16 bits (100.0% of FLOPs).")
    assert sum("dot_general" in line and "bf16, bf16" in line for line in lines) == products
    assert sys.path == path


def complaint(capsys, *arguments):
    """What the command says where it ends with status 2: one line, and nothing on standard output."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert (exit_.value.code, printed.out) == (2, "")
    assert printed.err.startswith("jmp-lite: ")
    assert printed.err.count("\n") == 1
    return printed.err


TARGETS = {
    "explained_module:cal": "AttributeError: module 'explained_module' has no attribute 'cal'.",
    "explained_module:number": "TypeError: 'int' object is not callable.",
    "explained_module:raises_at_once": "Odd: first line second line xxx",
    "explained_module:raises_inside": "KeyError: 'no such key'.",
    "explained_module:leaves": "SystemExit.",
    "explained_module:for_ever": "RecursionError: maximum recursion depth exceeded",
    "explained_module:shapes": "TypeError: dot_general requires contracting dimensions to have the same shape",
    "explained_module:too_many": "TypeError: ",
    "explained_module:takes_one": "TypeError: takes_one() missing 1 required positional argument: 'x'.",
    "explained_module:no_function": "explain takes a function, got 'sin'.",
    "explained_module:nothing": "ValueError: not enough values to unpack",
    "broken_module:call": "SyntaxError: invalid syntax",
    "leaving_module:call": "SystemExit: bye.",
    "no_such_module:call": "ModuleNotFoundError: No module named 'no_such_module'.",
    "..explained_module:call": "TypeError: ",
    "explained_module.py:call": "it names a file, not a module. Write 'explained_module:call'.",
    "./tools/train.py:call": "it names a file, not a module. Write 'tools.train:call'.",
    "/tools/train:call": "it names a file, not a module. Write 'tools.train:call'.",
    "importing_module:call": "ModuleNotFoundError: No module named 'no_such_module'.",
    "os:getcwd": "explain takes a function, got ",
    "call": "it names no function.",
    "explained_module:": "it names no function.",
    ":call": "it names no module.",
    "": "it names no module.",
}
ADVICE = {
    "raises_at_once": r"explained_module\.py:12, in raises_at_once",
    "raises_inside": r"explained_module\.py:16, in fun",
    "leaves": r"explained_module\.py:20, in leaves",
    "for_ever": r"explained_module\.py:23, in for_ever",
    "leaving_module": r"leaving_module\.py:2, in <module>",
    "importing_module": r"Raised at .*importing_module\.py:1, in <module>",
    "no_such_module": r"Modules are looked for in .* installed",
    r"\.py|/": r"Write '.*:call'",
}


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_goes_wrong_in_explain_is_one_line(capsys, module, target):
    """The line quotes the target, says what was raised, and where in the user's code, or shows the form."""
    path = list(sys.path)
    said = complaint(capsys, "explain", target)
    assert f"Cannot explain {target!r}: {TARGETS[target]}" in said
    form = r" Write 'module:function', a function without parameters that returns \(fun, \*args\)"
    advice = next((advice for key, advice in ADVICE.items() if re.search(key, target)), form)
    assert re.search(f"{advice}\\.\n$", said)
    assert len(said) < 600
    assert sys.path == path


ARGUMENTS = {
    "a gradient of no scalar": (["explain", "explained_module:no_scalar", "--grad"], "Gradient only defined for"),
    "a policy": (
        ["explain", "explained_module:call", "--policy", "mixed_bflaot16"],
        "Did you mean the policy 'mixed_b",
    ),
    "8 bits": (["explain", "explained_module:call", "--policy", "fp8"], "dot=jmp_lite.quant.FP8"),
    "no target": (["explain"], "the following arguments are required: target. Run jmp-lite explain --help."),
    "an option": (["explain", "a:b", "--gard"], "unrecognized arguments: --gard. Run jmp-lite --help."),
    "a command": (["explian"], "invalid choice: 'explian'"),
    "nothing": ([], "the following arguments are required: command."),
}


@pytest.mark.parametrize(("arguments", "said"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_one_line(capsys, module, arguments, said):
    """What was wrong is quoted, and where help is."""
    assert said in complaint(capsys, *arguments)


def test_missing_devices_are_one_line(capsys, monkeypatch):
    """A backend that does not start ends the command like a mistyped policy."""

    def unavailable():
        raise RuntimeError("Unable to initialize backend\n'nowhere'.")

    monkeypatch.setattr("jax.local_devices", unavailable)
    assert complaint(capsys, "devices") == "jmp-lite: RuntimeError: Unable to initialize backend 'nowhere'.\n"


@pytest.mark.parametrize(
    ("goes_to", "status", "said"),
    [("| head -c 1; exit ${PIPESTATUS[0]}", 0, ""), ("> /dev/full", 2, "No space left")],
)
def test_readers_that_stop_and_full_disks(goes_to, status, said):
    """No traceback: a reader may have seen enough, and a disk may be full."""
    command = f"{sys.executable} -m jmp_lite formats {goes_to}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (status, bool(said))
    assert said in done.stderr


def test_version(capsys):
    """What a bug report should name."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"jmp-lite {jmp_lite.__version__} with jax {jax.__version__}\n"
