"""What the processes of a job agree on: threads stand for them, and exchange their rows as the processes would."""

import concurrent.futures
import errno
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

import jmp_lite as jmp
from jmp_lite.checkpoint import _digest, _directory, _processes, _state


@pytest.fixture
def job(monkeypatch):
    """Runs one function per process; returns what each returned or raised."""

    def run(*acts):
        here, rows, barrier = threading.local(), {}, threading.Barrier(len(acts), timeout=10)

        def gather(array):
            rows[here.number] = array
            barrier.wait()
            stacked = np.stack([rows[number] for number in range(len(acts))])
            barrier.wait()
            return stacked

        def process(number):
            here.number = number
            try:
                return acts[number]()
            except Exception as error:
                return error

        with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(len(acts)) as pool:
            patch.setattr(jax, "process_count", lambda: len(acts))
            patch.setattr(jax, "process_index", lambda: here.number)
            for module in (_processes, _digest):
                patch.setattr(module, "gather", gather)
            return list(pool.map(process, range(len(acts))))

    return run


def fail(error):
    def act():
        raise error

    return act


REASONS = {
    "none": ((None, None), None),
    "the first": (("It is cold.", None), "It is cold (seen by process 0)."),
    "the second": ((None, "It is cold..."), "It is cold (seen by process 1)."),
    "both": (("cold", "dark"), "cold (seen by process 0)."),
    "as long as travels": (("x" * 400, None), "x" * 400 + " (seen by process 0)."),
    "longer": (("x" * 399 + "yz", None), "x" * 399 + "y (seen by process 0)."),
    "cut within a letter": (
        ("x" + "é" * 200, None),
        "x" + "é" * 199 + "\N{REPLACEMENT CHARACTER} (seen by process 0).",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_all_hear_of_the_first_failure(case, job):
    """The first that has one is named, and a long reason is cut."""
    reasons, heard = REASONS[case]
    assert job(*(lambda reason=reason: _processes.first_failure(reason) for reason in reasons)) == [heard] * 2


@pytest.mark.parametrize("number", [-1, 0, 2**32 - 2, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1])
def test_all_take_the_number_of_the_first(number, job):
    """The others may have seen another."""
    assert job(*(lambda n=n: _processes.of_first_process(n) for n in (number, 5, -1))) == [number] * 3
    assert _processes.of_first_process(number) == number


def test_the_first_process_acts_for_all(job):
    """If it fails, it raises its own error and the others what they were told to."""
    acted, broken = [], RuntimeError("no space left")
    act = lambda: acted.append(jax.process_index())  # noqa: E731
    assert job(*[lambda: _processes.in_first_process(act, otherwise=OSError)] * 3) == [None] * 3
    assert acted == [0]
    first, second = job(*[lambda: _processes.in_first_process(fail(broken), otherwise=KeyError)] * 2)
    assert first is broken
    assert isinstance(second, KeyError)
    assert second.args == ("RuntimeError: no space left (seen by process 0).",)


def test_one_process_does_not_wait_for_others():
    """Nor does it compile anything to hear from itself."""
    array = np.arange(3, dtype=np.uint32)
    assert _processes.gather(array).tolist() == [[0, 1, 2]]
    assert _processes.first_failure("It is cold...") == "It is cold..."
    assert _processes.first_failure(None) is None


def test_several_exchange_rows_without_the_mesh_of_the_program(monkeypatch):
    """The collective runs on its own."""
    meshes = []

    def allgather(array):
        meshes.append(jax.sharding.get_mesh())
        return jnp.stack([array, array])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))):
        rows = _processes.gather(np.arange(3, dtype=np.uint32))
    assert isinstance(rows, np.ndarray)
    assert rows.tolist() == [[0, 1, 2]] * 2
    assert [mesh.empty for mesh in meshes] == [True]


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, lambda x: x.tolist()[0]], ids=["NumPy", "JAX", "number"])
def test_arrays_of_each_process_are_copies(make, job):
    """The digest is that of the first, and one that differs is noticed, whichever it is."""
    same, other = np.float32([1.0, 2.0]), np.float32([1.5, 2.0])
    alone = _digest.digests([make(same)])[0]
    for rows, alike in (((same,) * 3, True), ((same, other, same), False), ((same, same, other), False)):
        found = job(*(lambda row=row: _digest.digests([make(row)]) for row in rows))
        assert found == [(alone, [alike])] * 3
    assert _digest.digests([make(other)])[0] != alone


DAMAGE, OBSTACLE = ValueError("not JSON"), MemoryError("too large")
OUTCOMES = {
    "well": (["a", "b"], [str, str], ""),
    "damage": (["a", DAMAGE], [jmp.errors.CorruptCheckpointError] * 2, "is damaged. ValueError: not JSON (seen by p"),
    "obstacle": (["a", OBSTACLE], [OSError, MemoryError], "cannot be read now. MemoryError: too large (seen by pro"),
    "both": ([DAMAGE, OBSTACLE], [ValueError, MemoryError], ""),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_all_read_or_all_raise(case, job):
    """An obstacle, which says nothing about the checkpoint, comes before damage; each keeps its own cause."""
    results, kinds, message = OUTCOMES[case]
    acts = [(fail(r) if isinstance(r, Exception) else lambda r=r: r) for r in results]
    found = job(*(lambda act=act: _directory._together("/run/3", act) for act in acts))
    assert [type(outcome) for outcome in found] == kinds
    if case == "well":
        assert found == results
    assert f"{message}" in str(found[0])
    if case == "damage":
        assert str(found[0]) == str(found[1])
        assert [outcome.__cause__ for outcome in found] == [None, DAMAGE]


ORIGINS = {
    "missing": (lambda path: None, jmp.errors.CheckpointNotFoundError, "There is no checkpoint in "),
    "a file": (lambda path: path.write_text("x"), jmp.errors.ForeignCheckpointError, "is a file"),
    "of Orbax": (
        lambda path: [path.mkdir(), (path / "_METADATA").write_text("{}")],
        jmp.errors.ForeignCheckpointError,
        "is a plain Orbax checkpoint",
    ),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_what_one_process_sees_of_the_origin_stops_all(case, job, tmp_path):
    make, kind, message = ORIGINS[case]
    places = [_directory.absolute(tmp_path / name) for name in ("good", "bad")]
    (tmp_path / "good" / "header").mkdir(parents=True)
    make(tmp_path / "bad")
    found = job(*(lambda place=place: _directory._check_origin(place) for place in places))
    assert [type(outcome) for outcome in found] == [kind] * 2
    assert all(message in str(outcome) for outcome in found)


SIGNS = ("header", "state", "_CHECKPOINT_METADATA", "_METADATA", "checkpoint", "item/_METADATA", "item/checkpoint")
#: What stands in a folder, and what is said of it.
FOLDERS = {
    **{sign: ([sign], None) for sign in SIGNS},
    "nothing": ([], "Check the path, or start from the beginning."),
    "a part of a name": (["headers", "my_state", "a/b/_METADATA"], "Check the path, or start from the beginning."),
    "steps": (["9/header", "10/header", "2.corrupt/header", "11/state"], "It holds one for each step: restore 10, or "),
    "no number": (["\N{SUPERSCRIPT TWO}/header"], "Check the path, or start from the beginning."),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_sign_of_a_checkpoint_is_enough(case, tmp_path):
    """What is there may be damaged; without any sign nothing was."""
    names, said = FOLDERS[case]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    found = _directory._if_absent(_directory.absolute(tmp_path))
    assert found is None if said is None else found.replace(f"{tmp_path}/", "").startswith(said)


def test_copies_that_differ_after_reading_are_damage(monkeypatch):
    """Though the first of them is the saved one."""
    leaves = {"w": np.ones(2), "b": np.zeros(3)}
    digests, _ = _digest.digests(list(leaves.values()))
    header = {"leaves": {name: {"digest": digest} for name, digest in zip(leaves, digests, strict=True)}}
    _directory._check_values("/run/3", header, list(leaves), list(leaves.values()))
    monkeypatch.setattr(_directory, "combine", lambda leaves, sums: (digests, [True, False]))
    with pytest.raises(jmp.errors.CorruptCheckpointError, match="The values of 'b' are not those"):
        _directory._check_values("/run/3", header, list(leaves), list(leaves.values()))


def test_each_process_reads_by_itself(monkeypatch):
    """If one fails to read, no other waits for it."""
    given = {}
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(ocp, "Checkpointer", lambda handler, **options: given.update(options))
    _directory._reader()
    options = given["multiprocessing_options"]
    assert options.primary_host == 3
    assert options.active_processes == {3}
    assert options.barrier_sync_key_prefix == "read_3"


def test_a_job_of_several_processes_reads_into_memory_of_its_own(job):
    """An array that NumPy sees without a copy would be tied to a device that the others do not have."""
    leaf = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    entry = {"dtype": "float32", "number": False}
    assert isinstance(_state.target(entry, leaf), jax.ShapeDtypeStruct)
    assert [type(found) for found in job(*[lambda: _state.target(entry, leaf)] * 2)] == [np.ndarray] * 2


#: What the system says of files that are not what they should be, and of anything else.
ERRORS = {
    **dict.fromkeys((None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO), True),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENOSPC, errno.ENOMEM, errno.ESTALE), False),
}
SAID = {
    **dict.fromkeys(
        ("PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"), False
    ),
    "NOT_FOUND": True,
    "DATA_LOSS": True,
}


@pytest.mark.parametrize("number", ERRORS)
def test_which_errors_of_the_system_are_damage(number):
    assert _directory._is_damage(OSError(number, "of the system")) == ERRORS[number]


@pytest.mark.parametrize("said", SAID)
def test_which_errors_of_storage_are_damage(said):
    assert _directory._is_damage(ValueError(f"{said}: of storage")) == SAID[said]
    assert not _directory._is_damage(jax.errors.JaxRuntimeError(f"{said}: of a device"))
