"""The examples run as their users run them: as programs, on one device and on eight."""

import json
import os
import pathlib
import re
import signal
import statistics
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import processes

import jmp_lite as jmp

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
ONE_POLICY = ("--policy", "mixed_float16")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of the programs: they share what is compiled, which is most of their time."""
    return processes.environment(COLUMNS="100", **processes.caching(tmp_path_factory.mktemp("compiled")))


@pytest.fixture
def start(environment, tmp_path):
    """Starts an example in its own folder."""

    def start(script, *arguments):
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run(start):
    """Runs an example to its end; returns what it printed."""

    def run(script, *arguments):
        process = start(script, *arguments)
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, output + errors
        return output

    return run


@pytest.fixture
def example(monkeypatch):
    """Imports a file of the examples into this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # put back what parsing a command line sets

    def example(name):
        return __import__(name)

    return example


def rows(output):
    """The cells of the final table, by policy."""
    row = re.compile(r"^ (\S+) +([\d.]+)% +(\S+) +(\d+) +(\d+) +(\d+) +([\d.]+|-) +(\d+|-)", re.MULTILINE)
    columns = ("accuracy", "scale", "skipped", "params", "activations", "compile", "speed")
    return {policy: dict(zip(columns, cells, strict=True)) for policy, *cells in row.findall(output)}


def history(folder):
    return json.loads((folder / "history.json").read_text())


def final_accuracy(folder):
    return list(history(folder)["accuracy"].values())[-1]


def assert_is_a_picture(file):
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert width > 1000
    assert height > 400
    assert len(data) > 20_000  # what an empty canvas of this size does not reach


# --- digits.py: what it prints and writes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_all_policies_report_and_write_their_files(run, tmp_path):
    output = run("digits.py", "--steps", 3, "--output", "out", "--logdir", "events")

    table = rows(output)
    assert tuple(table) == POLICIES
    assert [row["scale"] for row in table.values()] == ["1", "1", "2^15"]
    assert {row["skipped"] for row in table.values()} == {"0"}
    assert {row["params"] for row in table.values()} == {"77"}  # all three store float32
    float32, *mixed = (int(row["activations"]) for row in table.values())
    assert max(mixed) < 0.85 * float32
    assert all(float(row["compile"]) > 0 and float(row["speed"]) > 0 for row in table.values())
    assert "out/digits.png" in output
    assert_is_a_picture(tmp_path / "out" / "digits.png")
    for policy in POLICIES:
        [events] = (tmp_path / "events" / policy).iterdir()
        written = events.read_bytes()
        assert all(tag in written for tag in (b"train/loss", b"train/loss_scale", b"test/accuracy"))


@pytest.mark.soak
@pytest.mark.parametrize("options", [("--framework", "nnx"), ("--devices", "8"), ("--state", "8bit")], ids=" ".join)
def test_resumed_run_is_bit_identical(run, tmp_path, options):
    """Stopped within an epoch, after which the loss scale grows."""
    run("digits.py", *ONE_POLICY, *options, "--steps", 30, "--output", "whole")
    first = run("digits.py", *ONE_POLICY, *options, "--steps", 23, "--output", "parts")
    second = run("digits.py", *ONE_POLICY, *options, "--steps", 30, "--output", "parts", "--resume")

    assert rows(first)["mixed_float16"]["scale"] == "2^15"
    assert rows(second)["mixed_float16"]["scale"] == "2^16"
    whole, parts = tmp_path / "whole/mixed_float16", tmp_path / "parts/mixed_float16"
    assert (whole / "state.msgpack").read_bytes() == (parts / "state.msgpack").read_bytes()
    assert history(whole)["steps"] == history(parts)["steps"]


@pytest.mark.slow
def test_killed_run_resumes_bit_identically(start, run, tmp_path):
    arguments = ("digits.py", *ONE_POLICY, "--epochs", 5, "--output")
    run(*arguments, "whole")
    process = start(*arguments, "killed")
    state = tmp_path / "killed/mixed_float16/state.msgpack"
    while process.poll() is None and not state.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert state.exists()
    run(*arguments, "killed", "--resume")

    assert (tmp_path / "whole/mixed_float16/state.msgpack").read_bytes() == state.read_bytes()


@pytest.mark.slow
def test_finished_run_resumes_to_its_report(run, tmp_path):
    arguments = ("digits.py", *ONE_POLICY, "--steps", 3)
    before = rows(run(*arguments))["mixed_float16"]
    state = (tmp_path / "runs/digits/mixed_float16/state.msgpack").read_bytes()
    after = rows(run(*arguments, "--resume"))["mixed_float16"]

    assert after == {**before, "compile": "-", "speed": "-"}
    assert (tmp_path / "runs/digits/mixed_float16/state.msgpack").read_bytes() == state


@pytest.mark.slow
def test_resume_with_other_settings_is_refused(run, start):
    run("digits.py", *ONE_POLICY, "--steps", 2)
    process = start("digits.py", *ONE_POLICY, "--steps", 4, "--seed", 1, "--resume")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "seed was 0 and is now 1" in errors
    assert "Traceback" not in errors


# --- digits.py: what it shows -----------------------------------------------------------------------------------------


@pytest.mark.soak
def test_half_precision_is_as_accurate_as_float32(run, tmp_path):
    """Mean of three seeds: all above 96 %, within one point of float32."""
    accuracy = {policy: [] for policy in POLICIES}
    for seed in range(3):
        run("digits.py", "--seed", seed, "--output", f"seed{seed}")
        for policy in POLICIES:
            accuracy[policy].append(final_accuracy(tmp_path / f"seed{seed}" / policy))
    means = {policy: statistics.mean(values) for policy, values in accuracy.items()}

    assert min(means.values()) > 0.96
    assert means["mixed_bfloat16"] == pytest.approx(means["float32"], abs=0.01)
    assert means["mixed_float16"] == pytest.approx(means["float32"], abs=0.01)


@pytest.mark.soak
def test_float16_needs_a_loss_scale_for_a_small_loss(run, tmp_path):
    """The loss times 2**-20: no scale, no gradient but for a bias; a static and a dynamic one train."""
    small_loss = (*ONE_POLICY, "--loss-multiplier", "2**-20", "--steps", 105)
    printed = {
        kind: run("digits.py", *small_loss, "--loss-scale", kind, "--output", kind)
        for kind in ("none", "static", "dynamic")
    }
    steps = {kind: history(tmp_path / kind / "mixed_float16")["steps"] for kind in printed}
    accuracy = {kind: final_accuracy(tmp_path / kind / "mixed_float16") for kind in printed}

    assert min(step["zero_gradients"] for step in steps["none"]) > 0.99
    assert accuracy["none"] < 0.3
    assert "of the gradients were zero" in printed["none"]
    for kind in ("static", "dynamic"):
        assert max(step["zero_gradients"] for step in steps[kind]) < 0.5
        assert accuracy[kind] > 0.95
        assert "were zero" not in printed[kind]
    assert {step["loss_scale"] for step in steps["static"]} == {2.0**15}
    assert steps["dynamic"][-1]["loss_scale"] > 2.0**15


# --- digits.py: its parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "mixed_flot16"], "Unknown dtype 'mixed_flot16'.*mixed_float16.*Or 'all': float32, mixed_bf"),
        (["--policy", "c=e4m3"], "policy 'c=e4m3' has a format of 8 bits"),
        (["--batch-size", "65", "--devices", "2"], "--batch-size 65 does not divide among --devices 2"),
        (["--batch-size", "2000"], "--batch-size 2000: there are 1347 training images"),
        (["--steps", "0"], "whole number of at least 1, got '0'"),
        (["--loss-multiplier", "2**x"], r"positive number or power, got '2\*\*x'"),
        (["--loss-multiplier", "-1"], "positive number or power, got '-1'"),
        (["--framework", "haiku"], "invalid choice: 'haiku' .*linen.*nnx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_explained(example, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        example("_digits_options").parse("", arguments)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_arguments_have_their_values(example):
    parse = example("_digits_options").parse
    assert tuple(parse("", []).policy) == POLICIES
    assert parse("", ["--policy", "bf16", "all", "bf16"]).policy == ["bf16", *POLICIES]
    assert parse("", ["--loss-multiplier", "2**-20"]).loss_multiplier == 2.0**-20


def test_split_and_batches(example):
    data = example("_digits_data")
    digits = data.load(seed=3)
    images, labels = digits.train_images, digits.train_labels
    assert images.shape == (1347, 8, 8, 1)
    assert digits.test_images.shape == (450, 8, 8, 1)
    assert images.dtype == np.float32
    assert images.mean() == pytest.approx(0, abs=1e-5)
    assert images.std() == pytest.approx(1, abs=1e-5)
    assert set(labels) == set(range(10))

    numbers = np.arange(1347)  # instead of the labels, to tell the images apart
    epoch = [data.batch(images, numbers, size=64, step=step, seed=0)[1] for step in range(21)]
    assert len(set(np.concatenate(epoch))) == 21 * 64
    again = data.batch(images, numbers, size=64, step=5, seed=0)[1]
    np.testing.assert_array_equal(again, epoch[5])
    assert set(data.batch(images, numbers, size=64, step=21, seed=0)[1]) != set(epoch[0])


@pytest.mark.covering(1)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_convolution_computes_in_the_dtype_of_the_policy(example, framework, policy):
    model = example("_digits_model")
    network = model.FRAMEWORKS[framework](jmp.get_policy(policy))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = jax.make_jaxpr(lambda *args: network.apply(*args, train=True))(*shapes, jnp.ones((2, 8, 8, 1)))

    convolutions = [eqn for eqn in program.eqns if eqn.primitive.name == "conv_general_dilated"]
    dtypes = {var.aval.dtype for eqn in convolutions for var in (*eqn.invars, *eqn.outvars)}
    assert len(convolutions) == 6
    assert dtypes == {jmp.get_policy(policy).compute_dtype}
    assert {aval.dtype for aval in program.out_avals} == {np.dtype(np.float32)}  # logits and statistics


def test_frameworks_have_the_same_parameters(example):
    model = example("_digits_model")
    sizes = [
        sorted(x.shape for x in jax.tree.leaves(jax.eval_shape(make(jmp.get_policy("full")).init, jax.random.key(0))))
        for make in model.FRAMEWORKS.values()
    ]
    assert sizes[0] == sizes[1]


def test_activation_bytes_are_those_of_the_residuals(example):
    model = example("_digits_model")

    def apply(params, statistics, images, *, train):
        return jnp.sin(images.astype(jnp.float16) * params.astype(jnp.float16)), statistics

    network = model.Network(None, apply)
    kept = model.activation_bytes(network, jnp.ones((3, 4)), None, jnp.ones((3, 4)))
    assert kept == 2 * 12 * 2  # the cosine and the cast images, not the parameters: nothing needs their cast


def test_epochs_are_ranges_of_steps(example):
    digits = example("digits")
    assert list(digits.epochs(0, 5, 2)) == [range(2), range(2, 4), range(4, 5)]
    assert list(digits.epochs(3, 5, 4)) == [range(3, 4), range(4, 5)]
    assert list(digits.epochs(5, 5, 4)) == []


def test_checkpoint_written_in_part_is_the_one_before(example, tmp_path):
    module = example("_history")
    settings = {"seed": 0}
    checkpoint = module.Checkpoint(tmp_path, "p=f32,c=bf16")
    run = module.History("p=f32,c=bf16", settings)
    run.extend([{"loss": np.float32(2)}], 0.5)
    checkpoint.save({"w": np.ones(2)}, run)
    [folder] = tmp_path.iterdir()
    state = (folder / "state.msgpack").read_bytes()
    run.extend([{"loss": np.float32(1)}], 0.75)
    checkpoint.save({"w": np.zeros(2)}, run)
    (folder / "state.msgpack").write_bytes(state)  # as if killed between the two files

    restored, history = checkpoint.load({"w": np.zeros(2)}, module.History(run.policy, settings))
    np.testing.assert_array_equal(restored["w"], np.ones(2))
    assert history.steps == [{"loss": 2.0}]
    assert history.accuracy == {1: 0.5}
    checkpoint.remove()
    assert checkpoint.load("initial", run) == ("initial", run)


# --- gpt.py -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_character_gpt_reports_samples_and_draws(run, tmp_path):
    """A few steps: all precisions start from the same weights, so their losses are as near as the roundings."""
    output = run("gpt.py", "--steps", 3, "--output", "out")
    row = re.compile(r"^ (\S+) +([\d.]+) +[+-][\d.]+% +\S+ +\d+ ", re.MULTILINE)
    losses = {policy: float(loss) for policy, loss in row.findall(output)}
    assert tuple(losses) == POLICIES
    np.testing.assert_allclose(list(losses.values()), losses["float32"], rtol=0.02)
    assert_is_a_picture(tmp_path / "out" / "gpt.png")
