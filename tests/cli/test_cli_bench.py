"""The benchmark that users run: its variants, its figures, its reports."""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmp_lite import cli
from jmp_lite.cli import _bench_measure, _bench_models, _bench_plot, _bench_report, _bench_sizes
from jmp_lite.cli._bench_measure import Run
from jmp_lite.cli._bench_variants import BASELINE, VARIANTS, Variant

pytestmark = pytest.mark.usefixtures("standard_promotion")

SETTING = _bench_report.Setting("a device", "1.2.3", "tiny", 6, 3)
NAMES = ["GPT", "ResNet"]


def dot_model(name="a model"):
    """A model of one matmul: a parameter for each of 4 inputs, and its sum is the loss."""

    def loss_in(dtype):
        return lambda p, batch: jnp.sum(batch["x"].astype(dtype) @ p["w"].astype(dtype)).astype(jnp.float32)

    def batch(_):
        return {"x": np.ones((8, 4), np.float32)}

    return _bench_models.Model(name, "one product", "rows", 8, {"w": (4, 2)}, batch, loss_in)


def runs_of(**changes):
    """Three runs of a model, the last with changes."""
    model = dot_model()
    runs = [
        Run(model, BASELINE, 1.0, 4_000_000, False, [100.0, 50.0, 80.0], 2.0),
        Run(model, "autocast bf16", 1.5, 2_000_000, False, [300.0, 100.0, 160.0], 2.002),
        Run(model, "bf16 by hand", 1.25, 3_000_000, False, [200.0, 110.0, 170.0], 1.998),
    ]
    for name, value in changes.items():
        setattr(runs[-1], name, value)
    return runs


# --- Variants and models --------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_a_step_of_every_kind_of_parameter(name):
    """Shapes, dtypes and structure of what is kept do not change, and the loss is float32."""
    variant = VARIANTS[name]
    for model in _bench_sizes.TINY.models():
        rng = np.random.default_rng(0)
        before = jax.eval_shape(variant.begin, model.init(rng))
        *after, loss = jax.eval_shape(variant.step(model.loss_in), *before, model.batch(rng))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tuple(after)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), before
        )
        assert (loss.shape, loss.dtype) == ((), jnp.float32)


KEPT = {
    BASELINE: ({"float32"}, 12),
    "autocast fp16, loss scale": ({"float32"}, 12),
    "autocast bf16, master weights": ({"bfloat16"}, 12),
    "autocast bf16, split8 + 8bit": ({"bfloat16"}, 5),
}


@pytest.mark.parametrize(("name", "expected"), KEPT.items(), ids=KEPT)
def test_variants_keep_what_they_say(name, expected):
    """Dtypes of parameters, and bytes of each with all state, but for counts."""
    model = _bench_sizes.TINY.models()[0]
    params, state = jax.eval_shape(VARIANTS[name].begin, model.init(np.random.default_rng(0)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    assert (dtypes, round(size / model.parameter_count(), 2)) == expected


PRODUCTS = {
    BASELINE: {"f32"},
    "bf16 by hand": {"f32", "bf16"},
    "autocast bf16": {"f32", "bf16"},
    "autocast fp16, loss scale": {"f32", "f16"},
    "autocast bf16, FP8 products": {"f32", "bf16", "f8_e4m3fn"},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("index", [0, 1], ids=NAMES)
def test_variants_compute_in_what_they_say(name, index):
    """The program of a loss holds these floating dtypes and no others."""
    model = _bench_sizes.TINY.models()[index]
    rng = np.random.default_rng(0)
    params = model.init(rng)
    jaxpr = str(jax.make_jaxpr(VARIANTS[name].loss(model.loss_in))(params, model.batch(rng)))
    assert set(re.findall(r"\b(b?f\d+\w*)\[", jaxpr)) == PRODUCTS[name]


@pytest.mark.parametrize("index", [0, 1], ids=NAMES)
def test_by_hand_is_close_to_float32(index):
    """A model computes the same in both, to the precision of bfloat16; and begins at the loss of chance."""
    model = _bench_sizes.TINY.models()[index]
    rng = np.random.default_rng(0)
    params, batch = model.init(rng), model.batch(rng)
    exact, rough = (float(model.loss_in(dtype)(params, batch)) for dtype in (jnp.float32, jnp.bfloat16))
    assert rough == pytest.approx(exact, rel=0.02)
    assert exact == pytest.approx(math.log([256, 10][index]), rel=0.3)


SIZES = {"cpu": ("cpu", None, "cpu"), "of 16 GB": ("gpu", {"bytes_limit": 12 * 10**9}, "small accelerator")}
SIZES |= {"of 80 GB": ("gpu", {"bytes_limit": 64 * 10**9}, "accelerator"), "silent": ("tpu", None, "small accelerator")}


@pytest.mark.parametrize(("platform", "stats", "name"), SIZES.values(), ids=SIZES)
def test_the_device_decides_the_size(platform, stats, name):
    """A device that does not say how much memory it has gets the smaller one."""
    device = type("Device", (), {"platform": platform, "memory_stats": lambda _: stats})()
    assert _bench_sizes.size_for(device).name == name


def test_sizes_are_those_of_the_models_they_are_named_after():
    """GPT-2 has 124 M parameters, ResNet-18 has 11.7."""
    counts = [round(model.parameter_count() / 1e6, 1) for model in _bench_sizes.LARGE.models()]
    assert counts == [pytest.approx(124, rel=0.01), pytest.approx(11.7, rel=0.01)]


# --- Measuring ------------------------------------------------------------------------------------


def measured(variants, models=None, rounds=2):
    """What is found with few steps, and what was reported."""
    reported = []
    models = models or [dot_model()]
    runs = _bench_measure.measure(models, variants, steps=3, rounds=rounds, report=reported.append)
    return runs, reported


def test_variants_take_turns_and_report_each():
    """Every round holds every variant once, and the announced number of parts comes."""
    variants = {name: VARIANTS[name] for name in (BASELINE, "autocast bf16")}
    models = [dot_model("A"), dot_model("B")]
    runs, reported = measured(variants, models, rounds=3)
    assert len(reported) == _bench_measure.parts(models, variants, 3) == len(set(reported))
    assert [len(run.rates) for run in runs] == [3] * 4
    of_round = [{r.rpartition(":")[0] for r in reported if f"round {n} of 3" in r} for n in (1, 2, 3)]
    assert of_round == [{f"{m}, {v}" for m in "AB" for v in variants}] * 3
    assert all(run.peak_bytes and not run.counted_by_device and not run.error for run in runs)


def broken(_):
    def loss(p, batch):
        raise ValueError("no such loss")

    return loss


FAILURES = {
    "in the program": (broken, "ValueError: no such loss.", 0),
    "in the number": (lambda _: lambda p, _: jnp.sum(p["w"]) * jnp.nan, "The loss is nan.", 1),
}


@pytest.mark.parametrize(("loss", "said", "rounds"), FAILURES.values(), ids=FAILURES)
def test_what_fails_says_why_and_the_others_go_on(loss, said, rounds):
    """A run that fails is not tried again."""
    runs, _ = measured({BASELINE: VARIANTS[BASELINE], "broken": Variant(loss)})
    assert [run.error for run in runs] == ["", said]
    assert [len(run.rates) for run in runs] == [2, rounds]


COUNTED = {
    "no counter": (None, None, None),
    "a higher peak": ({"peak_bytes_in_use": 100, "bytes_in_use": 30}, 530, 500),
    "no higher peak": ({"peak_bytes_in_use": 530, "bytes_in_use": 30}, 530, None),
}


@pytest.mark.parametrize(("before", "peak", "expected"), COUNTED.values(), ids=COUNTED)
def test_peak_of_a_device_counts_where_it_rose(monkeypatch, before, peak, expected):
    """Less what was there before; a peak of the past says nothing about this run."""
    after = before and {**before, "peak_bytes_in_use": peak}
    stats = iter([before, after])
    device = type("Device", (), {"memory_stats": lambda _: next(stats)})()
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    runs, _ = measured({BASELINE: VARIANTS[BASELINE]}, rounds=1)
    assert runs[0].counted_by_device == (expected is not None)
    assert expected in (None, runs[0].peak_bytes)


def test_rates_are_medians_and_ratios_are_within_rounds():
    """The slow second round of both leaves the ratio of the others alone."""
    base, run, _ = runs_of()
    assert (base.rate, run.rate, run.spread) == (80.0, 160.0, 1.25)
    assert run.ratio_to(base) == 2.0
    assert math.isnan(Run(base.model, "nothing").ratio_to(base))


def test_order_rotates():
    """So that nobody is always the first."""
    assert [_bench_measure.rotated([1, 2, 3], by) for by in range(4)] == [[1, 2, 3], [2, 3, 1], [3, 1, 2], [1, 2, 3]]
    assert _bench_measure.rotated([], 1) == []


# --- Reports --------------------------------------------------------------------------------------


def test_table_has_a_row_per_run_and_says_what_its_columns_mean():
    """Numbers stand beside those of float32."""
    lines = _bench_report.as_text(SETTING, runs_of()).splitlines()
    assert lines[0].startswith("jmp_lite 1.2.3 on a device, jax ")
    assert " ".join(lines[4].split()) == "a model autocast bf16 160 rows 125.0% 2.00 2.00 MB 2.0020 1.0010 1.5"
    assert "peak memory: what the compiler reserves for a step (memory_analysis)." in lines


def test_table_stars_what_the_device_did_not_count():
    """The legend says what a star means."""
    runs = runs_of()
    runs[0].counted_by_device = True
    text = _bench_report.as_text(SETTING, runs)
    assert "4.00 MB " in text
    assert "2.00 MB* " in text
    assert "peak memory: counted by the device (memory_stats); with *, what the compiler" in text


def test_table_and_json_keep_what_failed():
    """No figure is made up: a dash, a null, and the reason."""
    runs = runs_of(rates=[], loss=math.nan, error="OSError: no.", peak_bytes=0)
    lines = _bench_report.as_text(SETTING, runs).splitlines()
    assert lines[5].split()[5:] == ["-", "-", "-", "-", "-", "-", "1.2"]
    assert lines[-1] == "a model, bf16 by hand: OSError: no."
    found = json.loads(_bench_report.as_json(SETTING, runs))["runs"][-1]
    unknown = ("per_second", "spread", "ratio_to_float32", "loss", "loss_ratio_to_float32", "peak_bytes", "peak_source")
    assert [found[name] for name in unknown] == [None] * 7
    assert found["error"] == "OSError: no."


def test_table_without_optimization_says_so():
    """Its speeds must not be quoted."""
    text = _bench_report.as_text(SETTING._replace(is_optimized=False), runs_of())
    assert "Compiled without optimization" in text


def test_figure_is_drawn_of_failures_too(tmp_path):
    """Even where float32 itself failed."""
    runs = runs_of(error="no")
    runs[0].error, runs[0].rates = "no", []
    _bench_plot.draw(str(tmp_path / "a.png"), SETTING, runs)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- The command ----------------------------------------------------------------------------------


def complaint(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *arguments])
    assert exit_.value.code == 2
    return capsys.readouterr()


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_runs(capsys, tmp_path, option):
    """In one line that quotes it."""
    for path, why in ((tmp_path, "Is a directory."), (tmp_path / "no" / "a", "No such file or directory.")):
        printed = complaint(capsys, option, str(path))
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert f"jmp-lite: Cannot write '{path}': {why}" in printed.err


def test_missing_matplotlib_names_the_extra(capsys, monkeypatch, tmp_path):
    """Before anything runs."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = complaint(capsys, "--png", str(tmp_path / "a.png")).err
    assert "bench --png needs matplotlib, which is not installed. Run pip install 'jmp-lite[analysis]'." in said


@pytest.fixture
def two_variants(monkeypatch):
    """A benchmark of one small model, of which one variant fails."""
    size = _bench_sizes.Size("tiny", lambda: (dot_model(),), 2, 2)
    monkeypatch.setattr(_bench_sizes, "TINY", size)
    variants = {BASELINE: VARIANTS[BASELINE], "broken": Variant(broken)}
    monkeypatch.setattr("jmp_lite.cli._bench_variants.VARIANTS", variants)
    return variants


def test_failed_runs_end_with_2_after_the_table(capsys, two_variants):
    """What was found is printed all the same."""
    printed = complaint(capsys, "--tiny")
    assert printed.err == "jmp-lite: 1 of 2 runs failed: a model, broken.\n"
    assert "ValueError: no such loss." in printed.out


def test_runs_that_are_fine_end_with_0(capsys, two_variants):
    """And standard error stays empty where it is not a terminal."""
    two_variants.pop("broken")
    assert cli.main(["bench", "--tiny"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"a model  {BASELINE}" in printed.out


FIELDS = {
    "model": str,
    "size": str,
    "parameters": int,
    "variant": str,
    "unit": str,
    "per_second": float,
    "spread": float,
    "ratio_to_float32": float,
    "loss": float,
    "loss_ratio_to_float32": float,
    "compile_seconds": float,
    "rounds": list,
    "peak_bytes": int,
    "peak_source": str,
    "error": type(None),
}


@pytest.mark.slow
def test_tiny_benchmark_runs_in_all_variants(capsys, tmp_path):
    """Table, JSON and figure are complete, losses are finite and near that of float32."""
    of_json, of_png = tmp_path / "a.json", tmp_path / "a.png"
    assert cli.main(["bench", "--tiny", "--json", str(of_json), "--png", str(of_png)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(of_json.read_text())
    assert [found[name] for name in ("schema", "size", "steps", "rounds", "is_optimized")] == [1, "tiny", 6, 3, False]
    assert [(run["model"], run["variant"]) for run in found["runs"]] == [(m, v) for m in NAMES for v in VARIANTS]
    for run in found["runs"]:
        assert {name: type(value) for name, value in run.items()} == FIELDS
        assert len(run["rounds"]) == 3
        assert run["loss_ratio_to_float32"] == pytest.approx(1, abs=0.02)
        assert run["peak_source"] == "memory_analysis"
        assert f"{run['variant']}  " in printed
    assert of_png.stat().st_size > 20_000
