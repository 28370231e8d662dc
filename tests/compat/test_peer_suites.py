"""The tests that jmp and Haiku ship in their wheels pass with jmp_lite in place of jmp."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

SUITES = {
    "jmp": ["_src/policy_test.py", "_src/loss_scale_test.py"],
    "haiku": ["_src/mixed_precision_test.py"],
}


def run_suite(package, folder, plugins=("jmp_alias",)):
    """Runs a suite from the installed package in a fresh process: its counts, its output."""
    root = pathlib.Path(importlib.util.find_spec(package).origin).parent
    config = folder / "pytest.ini"  # nothing of this project's settings applies
    config.write_text("[pytest]\n")
    # JAX as those projects know it: its default promotion, one CPU device.
    ours = ("JAX_", "XLA_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
        "JAX_PLATFORMS": "cpu",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), str(folder)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"-p{name}" for name in plugins]
    command += ["--import-mode=importlib", f"--rootdir={folder}", f"--config-file={config}"]
    command += [f"--junitxml={folder / 'result.xml'}", *(root / name for name in SUITES[package])]
    process = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    output = process.stdout + process.stderr
    assert (folder / "result.xml").exists(), output
    suite = ET.parse(folder / "result.xml").getroot().find("testsuite")
    return {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}, output


@pytest.mark.parametrize(("package", "count"), [("jmp", 97), ("haiku", 13)])
def test_suite_of_peer_passes(package, count, tmp_path):
    result, output = run_suite(package, tmp_path)
    assert result == {"tests": count, "failures": 0, "errors": 0, "skipped": 0}, output


def test_suite_of_peer_fails_on_a_broken_name(tmp_path):
    (tmp_path / "breakage.py").write_text(
        "import sys, pytest\n"
        "@pytest.hookimpl(trylast=True)\n"
        "def pytest_configure():\n"
        "    sys.modules['jmp'].half_dtype = lambda: 'neither'\n"
    )
    result, output = run_suite("jmp", tmp_path, plugins=("jmp_alias", "breakage"))
    assert result["tests"] == 97, output
    assert result["failures"] > 0, output
