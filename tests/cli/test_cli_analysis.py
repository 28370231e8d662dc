"""``audit``, ``analyze`` and ``estimate`` print what the analysis says, with a status that a script can read."""

import json
import sys

import pytest

from jmp_lite import cli

MODULE = """
import jax, jax.numpy as jnp

def loss(w, x):
    with jax.named_scope("layer"):
        return jnp.mean(jax.nn.log_softmax(x @ w)[:, 0])

def clean():
    return loss, jnp.linspace(-1, 1, 32).reshape(8, 4), jnp.ones((2, 8))

def shapes():
    return loss, jax.ShapeDtypeStruct((512, 512), jnp.float32), jax.ShapeDtypeStruct((64, 512), jnp.float32)

def bug():
    def statistics(x):
        return jnp.mean(x * x, -1) - jnp.mean(x, -1) ** 2  # cancels, in 16 bits
    return statistics, jnp.ones((4, 64), jnp.bfloat16)

def infinite():
    return lambda w, x: jnp.sum(jnp.log(w * 0) * x), jnp.ones(3), jnp.ones(3)

def stopped():
    raise KeyboardInterrupt
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A user's module, in the working directory."""
    (tmp_path / "analyzed_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("analyzed_module", None)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["analyzed_module:clean", "--policy", "mixed_bfloat16"], 0, "2 matmuls"),
        (["analyzed_module:shapes"], 0, "Found: nothing"),
        (["analyzed_module:bug"], 1, "error: cancellation"),
    ],
)
def test_status_of_audit_says_whether_something_is_wrong(capsys, arguments, status, said):
    """0 where nothing is found, 1 where something is: for CI."""
    assert cli.main(["audit", *arguments]) == status
    assert said in capsys.readouterr().out


def test_audit_writes_what_it_prints(capsys, tmp_path):
    """The file holds the findings, with advice."""
    assert cli.main(["audit", "analyzed_module:bug", "--json", "found.json"]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["kind"] for finding in found["findings"]] == ["cancellation"]
    assert found["findings"][0]["advice"] in capsys.readouterr().out


@pytest.mark.slow
def test_analyze_writes_a_page_a_file_and_pictures(capsys, tmp_path):
    """Findings of a program, ranges of its run and errors of the policy are one report."""
    paths = ["--html", "page.html", "--json", "all.json", "--png", "pictures/of it"]
    assert cli.main(["analyze", "analyzed_module:clean", *paths]) == 0
    said = capsys.readouterr().out
    assert "analyzed_module:clean under mixed_bfloat16" in said
    parts = json.loads((tmp_path / "all.json").read_text())["parts"]
    assert [part["part"] for part in parts] == ["Audit", "Ranges", "Comparison"]
    assert "<html" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "pictures/of it/histograms.png").stat().st_size > 10_000


def test_analyze_names_the_equation_that_made_an_infinity(capsys):
    """Where something is not finite, there is nothing to compare."""
    assert cli.main(["analyze", "analyzed_module:infinite"]) == 1
    said = capsys.readouterr().out
    assert "log" in said
    assert "first" in said


def test_estimate_knows_devices_that_are_not_there(capsys):
    """Arrays may be shapes; the table has a row for each precision."""
    assert cli.main(["estimate", "analyzed_module:shapes", "--device", "tpu_v5e"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("On TPU v5e, by the model: ")
    assert all(f"\n{name}" in said for name in ("float32", "mixed_bfloat16", "fp8"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["audit", "analyzed_module:nothing"], "Cannot audit 'analyzed_module:nothing': AttributeError"),
        (["audit", "analyzed_module:clean", "--policy", "mixed_bflaot16"], "Did you mean"),
        (["audit", "analyzed_module:clean", "--json", "no/such/folder"], "Cannot write 'no/such/folder': No such file"),
        (["analyze", "analyzed_module:shapes"], "Cannot analyze 'analyzed_module:shapes': "),
        (["analyze", "analyzed_module:clean", "--png", "analyzed_module.py"], "Cannot write 'analyzed_module.py': "),
        (["estimate", "analyzed_module:shapes", "--device", "h10"], "Did you mean 'h100'?"),
    ],
)
def test_whatever_goes_wrong_is_one_line(capsys, arguments, said):
    """Status 2, nothing on standard output, what was wrong is quoted."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert (exit_.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert said in printed.err


def test_interruption_is_one_line_and_130(capsys):
    """As shells have it."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["audit", "analyzed_module:stopped"])
    assert (exit_.value.code, capsys.readouterr().err) == (130, "\njmp-lite: interrupted.\n")


@pytest.mark.parametrize("command", ["audit", "analyze"])
def test_help_says_what_the_status_means(capsys, command):
    """Scripts depend on it."""
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "The status is 1 if an error or a warning is found" in " ".join(capsys.readouterr().out.split())
