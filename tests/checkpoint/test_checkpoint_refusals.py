"""What a checkpoint cannot be: arguments that lose states, directories of others, and a second writer."""

import errno
import fcntl
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from support.checkpoints import manage

import jmp_lite as jmp
from jmp_lite import checkpoint
from jmp_lite.checkpoint import _lock
from jmp_lite.checkpoint._lock import WriterLock

STATE = {"w": jnp.ones(2)}
NO_COUNTS = [0, -1, 1.5, True, False, "3", float("nan"), np.float32(2), np.bool_(True), 2**63]


# --- Arguments ------------------------------------------------------------------------------------


def restorers(tmp_path):
    """Every way to restore ``STATE`` into a template."""
    checkpoint.save(tmp_path / "one", STATE, policy="full")
    with manage(tmp_path / "run") as manager:
        manager.save(1, STATE)
    data = checkpoint.to_bytes(STATE, policy="full")

    def of_manager(template):
        with manage(tmp_path / "run") as manager:
            return manager.restore(template)

    return (
        lambda template: checkpoint.restore(tmp_path / "one", template, policy="full"),
        of_manager,
        lambda template: checkpoint.from_bytes(template, data, policy="full"),
    )


def sharded(size):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, jax.P("d")))


def test_a_bad_template_is_no_damaged_checkpoint(tmp_path):
    """Or one would throw good checkpoints away."""
    for restore in restorers(tmp_path):
        with pytest.raises(jmp.errors.CheckpointMismatchError, match=r"'w' of the template cannot be sharded so: .*8"):
            restore({"w": sharded(2)})
        with pytest.raises(jmp.errors.InvalidCheckpointError, match=r"'w' of the template is traced.*outside of jit"):
            jax.jit(restore)(STATE)
        with pytest.raises(jmp.errors.InvalidCheckpointError, match="'w' of the template is 'x'"):
            restore({"w": "x"})


@pytest.mark.parametrize("data", [None, STATE, "path"], ids=["nothing", "a state", "a path"])
def test_what_is_no_bytes_is_no_damaged_checkpoint(data):
    with pytest.raises(jmp.errors.InvalidCheckpointError, match=r"takes the bytes that to_bytes returned, got "):
        checkpoint.from_bytes(STATE, data, policy="full")


UNWRITTEN = {
    "no elements": ({"w": jnp.ones(2), "e": jnp.zeros((0, 4))}, "Leaf 'e' has no elements"),
    "nothing": ({}, "The state is empty"),
    "bare": (jnp.ones(3), "The state is a bare leaf"),
    "complex number": ({"c": 1j}, "Leaf 'c' is of a dtype"),
    "four bits": ({"w": jnp.ones(4, "uint4")}, "Leaf 'w' is of a dtype"),
}


@pytest.mark.parametrize("case", UNWRITTEN)
def test_what_orbax_does_not_write_is_refused_at_once(case, tmp_path):
    """Some of it Orbax would refuse in the background, after ``save`` has said True. Bytes take all of it."""
    state, message = UNWRITTEN[case]
    restored = checkpoint.from_bytes(state, checkpoint.to_bytes(state, policy="full"), policy="full")
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    with pytest.raises(jmp.errors.InvalidCheckpointError, match=f"^{message}.* use to_bytes"):
        checkpoint.save(tmp_path / "one", state, policy="full")
    with manage(tmp_path / "run") as manager:
        with pytest.raises(jmp.errors.InvalidCheckpointError, match=message):
            manager.save(1, state)
        assert manager.save(2, STATE)


@pytest.mark.parametrize("where", ["array", "NumPy array", "number"])
def test_no_number_becomes_infinite_on_the_way_back(where):
    """What was infinite may be."""
    large = {"array": jnp.array([1.0, 7e4]), "NumPy array": np.float32([1, 7e4]), "number": 7e4}[where]
    small = np.zeros(np.shape(large), np.float16)
    small = jnp.asarray(small) if where == "array" else small
    data = checkpoint.to_bytes({"w": large}, policy="full")
    with pytest.raises(jmp.errors.CheckpointMismatchError, match="too large for float16"):
        checkpoint.from_bytes({"w": small}, data, policy="half", migrate=True)
    infinite = checkpoint.to_bytes({"w": np.inf * np.ones_like(large)}, policy="full")
    assert np.isinf(checkpoint.from_bytes({"w": small}, infinite, policy="half", migrate=True)["w"]).all()


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("name", ["max_to_keep", "save_interval_steps"])
def test_counts_are_checked_at_construction(name, value, tmp_path):
    """With ``max_to_keep=0`` every state would be deleted."""
    with pytest.raises(jmp.errors.InvalidCheckpointError, match=rf"{name} must be an int >= 1.*; got ") as error:
        manage(tmp_path / "run", **{name: value})
    assert repr(value) in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [*NO_COUNTS[1:], None, jnp.ones(()), jnp.bool_(True)], ids=repr)
def test_steps_are_checked(step, tmp_path):
    """What ``restore`` would not find is not saved."""
    with manage(tmp_path) as manager:
        with pytest.raises(jmp.errors.InvalidCheckpointError, match=r"step must be an int >= 0; got "):
            manager.save(step, STATE)
        if step is not None:
            with pytest.raises(jmp.errors.InvalidCheckpointError, match=r"step must be an int >= 0; got "):
                manager.restore(STATE, step=step)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [0, np.int64(3), np.uint8(200), jnp.int32(4), 2**40])
def test_steps_may_be_integers_of_any_kind(step, tmp_path):
    """They name the directory as a Python int does."""
    with manage(tmp_path, max_to_keep=None, save_interval_steps=1) as manager:
        assert manager.save(step, STATE)
        assert manager.restore(STATE)[0] == int(step)
        assert manager.restore(STATE, step=step)[0] == int(step)


def test_all_are_kept_without_a_limit(tmp_path):
    """``max_to_keep=None``."""
    with manage(tmp_path, max_to_keep=None) as manager:
        assert all(manager.save(step, STATE) for step in range(6))
    assert {path.name for path in tmp_path.iterdir()} == set("012345")


# --- Directories of others ------------------------------------------------------------------------


def save_standard(path):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(STATE))


def save_pytree(path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(STATE))


def save_composite(path):
    items = ocp.args.Composite(state=ocp.args.StandardSave(STATE), meta=ocp.args.JsonSave({"a": 1}))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=items)


def save_managed(path):
    with ocp.CheckpointManager(path.parent) as manager:
        manager.save(int(path.name), args=ocp.args.StandardSave(STATE))


def save_without_metadata(path):
    save_standard(path)
    (path / "_CHECKPOINT_METADATA").unlink()


def save_managed_without_metadata(path):
    save_managed(path)
    (path / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.parametrize(
    "save",
    [save_standard, save_pytree, save_composite, save_managed, save_without_metadata, save_managed_without_metadata],
    ids=lambda f: f.__name__,
)
def test_plain_orbax_checkpoint_is_called_that(save, tmp_path):
    """It is not damaged, so no step is passed over for it."""
    with manage(tmp_path) as manager:
        manager.save(1, STATE)
    save(tmp_path / "7")
    with pytest.raises(jmp.errors.ForeignCheckpointError, match=r"/7 is a plain Orbax checkpoint"):
        checkpoint.restore(tmp_path / "7", STATE, policy="mixed_float16")
    with manage(tmp_path) as manager:
        with pytest.raises(jmp.errors.ForeignCheckpointError, match=r"/7 is a plain Orbax checkpoint"):
            manager.restore(STATE)
        assert manager.restore(STATE, step=1)[0] == 1


FOLDERS = {
    "nothing": ([], r"no checkpoint in .*here\. Check the path"),
    "other files": (["notes.txt", "logs/events"], r"no checkpoint in .*here\. Check the path"),
    "the steps of a manager": (["9/header/x", "10/header/x", "best/header/x"], r"restore .*here/10, or use"),
}


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_not_called_damaged(files, message, tmp_path):
    for name in ["", *files]:
        (tmp_path / "here" / name).mkdir(parents=True)
    with pytest.raises(jmp.errors.CheckpointNotFoundError, match=message):
        checkpoint.restore(tmp_path / "here", STATE, policy="full")


@pytest.mark.parametrize("data", [checkpoint.to_bytes(STATE, policy="full"), serialization.to_bytes(STATE), b"?"])
def test_a_file_is_no_directory(data, tmp_path):
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(jmp.errors.ForeignCheckpointError, match=r"is a file, .* from_bytes"):
        checkpoint.restore(tmp_path / "state", STATE, policy="full")


OBSTACLES = {
    "memory": MemoryError(),
    "device memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "open files": OSError(errno.EMFILE, "Too many open files"),
    "network": ValueError("UNAVAILABLE: connection reset"),
}


@pytest.mark.parametrize("error", OBSTACLES.values(), ids=OBSTACLES)
def test_what_hinders_reading_is_no_damage(error, tmp_path, monkeypatch):
    """The error is that of the obstacle, and the checkpoint stays the newest."""
    with manage(tmp_path) as manager:
        manager.save(1, STATE)

    def fail(leaves):
        raise error

    with monkeypatch.context() as patch, manage(tmp_path) as manager:
        patch.setattr("jmp_lite.checkpoint._directory.local_sums", fail)
        with pytest.raises(type(error)) as caught:
            manager.restore(STATE)
        assert caught.value is error
    with manage(tmp_path) as manager:
        assert manager.save(2, STATE)
        assert manager.restore(STATE, step=1)[0] == 1


# --- A second writer ------------------------------------------------------------------------------


def test_second_writer_is_refused_until_the_first_closes(tmp_path):
    """Readers are not: an evaluation may follow a training run."""
    with manage(tmp_path) as first, manage(tmp_path) as second:
        first.save(1, STATE)
        first.wait()
        with pytest.raises(
            jmp.errors.CheckpointLockedError, match=rf"Process {os.getpid()} on .* writes checkpoints to"
        ):
            second.save(2, STATE)
        assert second.restore(STATE)[0] == 1
        first.save(2, STATE)
        first.close()
        assert second.save(3, STATE)


def test_a_closed_manager_is_closed(tmp_path):
    """It would take the lock again, and nobody would give it back."""
    manager = manage(tmp_path)
    manager.save(1, STATE)
    manager.close()
    for act in (lambda: manager.save(2, STATE), lambda: manager.restore(STATE)):
        with pytest.raises(jmp.errors.InvalidCheckpointError, match="is closed"):
            act()
    with manage(tmp_path) as other:
        assert other.save(2, STATE)


HOLDER = """
    import os, sys, time
    from jmp_lite.checkpoint._lock import WriterLock

    lock = WriterLock(sys.argv[1])
    if not os.fork():
        print(os.getpid(), flush=True)  # by now it has let go of the lock
    time.sleep(600)
"""


@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
def test_dead_job_holds_no_lock(tmp_path):
    """Killed without warning, and though a process that it forked lives on."""
    script = tmp_path / "holder.py"
    script.write_text(textwrap.dedent(HOLDER))
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(jmp.errors.CheckpointLockedError, match=rf"Process {holder.pid} on "):
                WriterLock(str(tmp_path))
            holder.kill()
            holder.wait()
            assert pathlib.Path(f"/proc/{child}").exists() or not pathlib.Path("/proc").exists()
            WriterLock(str(tmp_path)).release()
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_lock_of_a_file_that_was_removed_is_none(tmp_path):
    """The last holder removes the file; whoever opened it before must not think that it has the lock."""
    first = WriterLock(str(tmp_path))
    (tmp_path / ".writer").unlink()
    second = WriterLock(str(tmp_path))
    with pytest.raises(jmp.errors.CheckpointLockedError):
        WriterLock(str(tmp_path))
    first.release()
    with pytest.raises(jmp.errors.CheckpointLockedError):
        WriterLock(str(tmp_path))
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("answer", [BlockingIOError(errno.EAGAIN, "try again"), PermissionError(errno.EACCES, "no")])
def test_a_lock_that_another_has(answer, tmp_path, monkeypatch):
    """Linux says so in one way, SMB in another."""

    def refuse(*args):
        raise answer

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(jmp.errors.CheckpointLockedError):
        WriterLock(str(tmp_path))


def test_a_lock_that_fails_is_no_lock(tmp_path, monkeypatch):
    """Neither has this writer it, nor is there none."""

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        WriterLock(str(tmp_path))


def test_the_file_of_another_user_is_a_lock(tmp_path, monkeypatch):
    """Who may not write to the file may see that it is locked, and lock it afterwards."""
    mine = WriterLock(str(tmp_path))
    real = pathlib.Path.open

    def open_of_another_user(path, mode="r", **settings):
        if path.name == ".writer" and mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, mode, **settings)

    monkeypatch.setattr(pathlib.Path, "open", open_of_another_user)
    with pytest.raises(jmp.errors.CheckpointLockedError, match=f"Process {os.getpid()} "):
        WriterLock(str(tmp_path))
    mine.let_go()  # as if it had died
    theirs = WriterLock(str(tmp_path))
    with pytest.raises(jmp.errors.CheckpointLockedError):
        WriterLock(str(tmp_path))
    theirs.release()


@pytest.mark.parametrize("held", ["", "  \n", "Process 7 on node"])
def test_the_holder_of_a_lock_is_named_if_it_is_known(held, tmp_path, monkeypatch):
    """Between taking the lock and writing its name a job is not."""
    (tmp_path / ".writer").write_text(held)

    def refuse(*args):
        raise BlockingIOError(errno.EAGAIN, "try again")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(jmp.errors.CheckpointLockedError, match=f"^{held.strip() or 'Another process'} writes"):
        WriterLock(str(tmp_path))


def test_the_name_of_a_dead_holder_is_replaced(tmp_path):
    (tmp_path / ".writer").write_text("x" * 500)
    lock = WriterLock(str(tmp_path))
    assert (tmp_path / ".writer").read_text() == f"Process {os.getpid()} on {socket.gethostname()}"
    lock.release()
    lock.release()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Between opening the file and locking it."""
    real, removed = fcntl.flock, []

    def remove_first(file, how):
        if not removed:
            removed.append((tmp_path / ".writer").unlink())
        real(file, how)

    monkeypatch.setattr("fcntl.flock", remove_first)
    lock = WriterLock(str(tmp_path))
    assert removed
    with pytest.raises(jmp.errors.CheckpointLockedError):
        WriterLock(str(tmp_path))
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EACCES, errno.EIO])
def test_a_file_that_is_gone_is_not_that_of_the_lock(number, tmp_path, monkeypatch):
    """Network file systems say so in their own way; what says something else is an error."""
    lock = WriterLock(str(tmp_path))
    file = lock._file

    def fail(*args):
        raise OSError(number, "of the file system")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "stat", fail)
        if number in (errno.ENOENT, errno.ESTALE):
            lock.release()
        else:
            with pytest.raises(OSError, match="of the file system"):
                lock.release()
    assert file.closed == (number in (errno.ENOENT, errno.ESTALE))
    lock.let_go()


def test_a_lock_is_given_back_where_files_may_not_be_removed(tmp_path, monkeypatch):
    """As those of another user in a directory such as /tmp."""
    lock = WriterLock(str(tmp_path))

    def refuse(*args, **settings):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", refuse)
        lock.release()
    WriterLock(str(tmp_path)).release()


def test_a_place_that_cannot_be_written_to_is_no_lock(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(PermissionError):
        WriterLock(str(tmp_path))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK])
def test_what_file_systems_without_locks_answer(number, tmp_path, monkeypatch):
    """Every writer gets one."""

    def refuse(*args):
        raise OSError(number, "not here")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert WriterLock(str(tmp_path))._file is None


def test_a_forked_process_lets_go(tmp_path):
    """Of all locks of its parent, whose file it has open."""
    locks = [WriterLock(str(tmp_path / name)) for name in ("a", "b") if not (tmp_path / name).mkdir()]
    _lock._let_go()
    assert [lock._file for lock in locks] == [None, None]


def test_places_without_locks_are_written_to(tmp_path, monkeypatch):
    """Object stores, and file systems that do not know ``flock``."""
    WriterLock("gs://bucket/run").release()

    def refuse(*args):
        raise OSError(errno.ENOSYS, "function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with manage(tmp_path) as first, manage(tmp_path) as second:
        assert first.save(1, STATE)
        first.wait()
        assert second.save(2, STATE)
