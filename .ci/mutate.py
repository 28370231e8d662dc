"""Changes the library a little, one change at a time, and asks its tests whether they notice.

python .ci/mutate.py                                  10 changes in each chapter, drawn at random
python .ci/mutate.py --mutants 60 scaling/_verdict.py  60 changes in one module, by the tests of its chapter

A chapter's tests are its folder in tests/ and its doctests. Changes that none of them notices are printed: each is
either a law that the tests lack or a change without a meaning, which a reader must tell apart. All happens in a copy of
the files that Git tracks. Needs the extra `mutation`; settings are in pyproject.toml under `tool.cosmic-ray`.
"""

import argparse
import collections
import os
import pathlib
import random
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


def draw(session: str, mutants: int, rng: random.Random) -> None:
    """Leaves so many changes of a session to be tried."""
    with use_db(session, WorkDB.Mode.open) as db:
        pending = [item.job_id for item in db.pending_work_items]
        left_out = rng.sample(pending, max(0, len(pending) - mutants))
        db.set_multiple_results(left_out, WorkResult(WorkerOutcome.SKIPPED))


def outcomes(session: str) -> dict[str, list[tuple[bool, str]]]:
    """For each module, whether a change was noticed and the change as a diff."""
    found = collections.defaultdict(list)
    with use_db(session, WorkDB.Mode.open) as db:
        modules = {item.job_id: str(item.mutations[0].module_path) for item in db.work_items}
        for job, result in db.results:
            if result.worker_outcome is WorkerOutcome.NORMAL:
                found[modules[job]].append((result.test_outcome is TestOutcome.KILLED, result.diff))
    return found


def mutate(chapter: str, modules: list[str], mutants: int, rng: random.Random) -> dict[str, list[tuple[bool, str]]]:
    """Tries changes in modules of one chapter."""
    with tempfile.TemporaryDirectory() as folder:
        copy, config, session = pathlib.Path(folder) / "copy", f"{folder}/config.toml", f"{folder}/session.sqlite"
        copy_tracked_files(copy)
        tests = f"{sys.executable} -m pytest -x -q tests/{chapter} jmp_lite/{chapter}"
        settings = {**SETTINGS, "module-path": modules, "test-command": tests}
        pathlib.Path(config).write_text(serialize_config(settings))
        run(copy, "cosmic-ray", "baseline", config)  # without a change they pass
        run(copy, "cosmic-ray", "init", config, session)
        run(copy, "cr-filter-operators", session, config)
        draw(session, mutants, rng)
        run(copy, "cosmic-ray", "exec", config, session)
        return outcomes(session)


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
