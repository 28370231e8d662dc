"""Changes the library a little, one change at a time, and asks its tests whether they notice.

python .ci/mutate.py                                  10 changes in each chapter, drawn at random
python .ci/mutate.py --mutants 60 scaling/_verdict.py  60 changes in one module, by the tests of its chapter

A chapter's tests are its folder in tests/ and its doctests. Those that are about the changed module run first, and the
first that fails ends the run. Changes that none of them notices are printed: each is either a law that the tests lack
or a change without a meaning, which a reader must tell apart. All happens in a copy of the files that Git tracks. Needs
the extra `mutation`; settings are in pyproject.toml under `tool.cosmic-ray`.
"""

import argparse
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib

from cosmic_ray.config import serialize_config
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cosmic-ray"]
CHAPTERS = SETTINGS.pop("chapters")


def copy_tracked_files(folder: pathlib.Path) -> None:
    """Copies what Git tracks, as it stands in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: name and (ROOT / name).exists(), listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def run(copy: pathlib.Path, *command: str) -> None:
    """Runs a command of Cosmic Ray; tests import the copy, wherever the library is installed."""
    subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, check=True)


def tests_of(copy: pathlib.Path, chapter: str, module: pathlib.Path) -> list[str]:
    """Command that runs the tests of a chapter: first those with the name of a module, then those that import it."""
    files = sorted(copy.glob(f"tests/{chapter}/test_*.py")) + sorted(copy.glob(f"jmp_lite/{chapter}/*.py"))

    def distance(file: pathlib.Path) -> tuple[bool, bool]:
        return module.stem.strip("_") not in file.stem, not re.search(rf"\b{module.stem}\b", file.read_text())

    ordered = [str(file.relative_to(copy)) for file in sorted(files, key=distance)]
    return [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:randomly", *ordered]


def draw(sessions: list[str], mutants: int, rng: random.Random) -> None:
    """Leaves so many changes, of all those in some sessions, to be tried."""
    pending = []
    for session in sessions:
        with use_db(session, WorkDB.Mode.open) as db:
            pending += [(session, item.mutations[0], item.job_id) for item in db.pending_work_items]
    pending.sort(key=lambda entry: (entry[0], entry[1].operator_name, str(entry[1].operator_args), entry[1].occurrence))
    left_out = rng.sample(pending, max(0, len(pending) - mutants))
    for session in sessions:
        with use_db(session, WorkDB.Mode.open) as db:
            jobs = [job for of, _, job in left_out if of == session]
            db.set_multiple_results(jobs, WorkResult(WorkerOutcome.SKIPPED))


def outcomes(session: str) -> list[tuple[bool, str]]:
    """For each change that was tried, whether it was noticed and the change as a diff."""
    with use_db(session, WorkDB.Mode.open) as db:
        results = [result for _, result in db.results if result.worker_outcome is WorkerOutcome.NORMAL]
    return [(result.test_outcome is TestOutcome.KILLED, result.diff) for result in results]


def mutate(chapter: str, modules: list[str], mutants: int, rng: random.Random) -> dict[str, list[tuple[bool, str]]]:
    """Tries changes in modules of one chapter."""
    with tempfile.TemporaryDirectory() as folder:
        copy, configs = pathlib.Path(folder) / "copy", {}
        copy_tracked_files(copy)
        for module in modules:
            config, session = (f"{folder}/{pathlib.Path(module).stem}.{kind}" for kind in ("toml", "sqlite"))
            tests = tests_of(copy, chapter, pathlib.Path(module))
            if not configs:
                run(copy, *tests)  # without a change they pass
            settings = {**SETTINGS, "module-path": [module], "test-command": shlex.join(tests)}
            pathlib.Path(config).write_text(serialize_config(settings))
            run(copy, "cosmic-ray", "init", config, session)
            run(copy, "cr-filter-operators", session, config)
            configs[module] = session, config
        draw([session for session, _ in configs.values()], mutants, rng)
        for session, config in configs.values():
            run(copy, "cosmic-ray", "exec", config, session)
        return {module: outcomes(session) for module, (session, _) in configs.items()}


def main() -> None:
    """Reads the command line and prints how many changes were noticed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("modules", nargs="*", help="such as scaling, scaling/_verdict.py; all by default")
    parser.add_argument("--mutants", type=int, default=10, help="how many changes to try in each chapter")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    arguments = parser.parse_args()
    strangers = [module for module in arguments.modules if module.split("/")[0] not in CHAPTERS]
    if strangers:
        parser.error(f"{strangers[0]} is in none of the chapters {', '.join(CHAPTERS)}")
    modules = [
        module
        for name in arguments.modules or CHAPTERS
        for module in (
            [f"{name}/{f.name}" for f in (ROOT / "jmp_lite" / name).glob("_*.py")] if name in CHAPTERS else [name]
        )
    ]
    rng = random.Random(arguments.seed)
    print(f"--seed {arguments.seed} repeats this draw")
    for chapter in dict.fromkeys(module.split("/")[0] for module in modules):
        of_chapter = sorted(f"jmp_lite/{module}" for module in modules if module.startswith(f"{chapter}/"))
        for module, results in mutate(chapter, of_chapter, arguments.mutants, rng).items():
            print("\n".join(diff for noticed, diff in results if not noticed))
            print(f"{module}: {sum(noticed for noticed, _ in results)} of {len(results)} noticed\n", flush=True)


if __name__ == "__main__":
    main()
