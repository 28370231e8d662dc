"""The benchmark for accelerators, as far as a CPU can show it."""

import pathlib
import sys

import jax
import pytest

from jmp_lite.cli._bench_measure import Run
from jmp_lite.cli._bench_variants import BASELINE, VARIANTS

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # benchmarks are not installed

from benchmarks import _training_sizes, _training_turns, accelerator

pytestmark = pytest.mark.usefixtures("standard_promotion")

FEW = (BASELINE, "autocast fp16, loss scale")


@pytest.fixture
def variants(monkeypatch):
    """Two variants in place of all."""
    few = {name: VARIANTS[name] for name in FEW}
    monkeypatch.setattr(accelerator, "VARIANTS", few)
    return few


def row_of(text, variant):
    return next(line for line in text.splitlines() if line.startswith(f"| {variant} |"))


def run_of(variant, **figures):
    work = _training_turns.workload("ResNet", _training_sizes.TINY["ResNet"])
    return Run(work, variant, **figures)


LEAST = _training_sizes.Images(stages=((4, 1),), classes=3, pixels=8, batch=2)


@pytest.fixture
def resnet_only(monkeypatch):
    monkeypatch.setattr(accelerator, "sizes_for", lambda *_, **__: {"ResNet": LEAST})


@pytest.mark.usefixtures("variants", "resnet_only")
def test_tiny_run_writes_its_section_where_asked(tmp_path, capsys):
    accelerator.main(["--tiny", "--skip-peers", "--out", str(tmp_path / "results.md")])
    printed, written = capsys.readouterr().out, (tmp_path / "results.md").read_text()
    assert "torch left out: left out by --skip-peers" in printed
    assert "<!-- section: accelerator -->" in written
    assert "float32 matmuls: default" in written
    for name in FEW:
        assert not {"-", "nan", "failed"} & set(row_of(written, name).split())
        assert row_of(written, name) in printed


@pytest.mark.slow
def test_every_variant_of_every_model_runs_tiny(capsys):
    accelerator.main(["--tiny", "--skip-peers"])
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {name} |") == len(_training_sizes.TINY) for name in VARIANTS)
    assert "failed" not in printed


def test_a_cpu_is_refused_without_tiny():
    with pytest.raises(SystemExit, match=r"needs a GPU, and JAX finds none; --tiny"):
        accelerator.main([])


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 1), (1e6, 3)])
def test_the_clock_drops_rounds_and_no_variants(seconds, expected, monkeypatch):
    work = _training_turns.workload("ResNet", LEAST)
    clock = _training_turns.Clock(seconds)
    monkeypatch.setattr(_training_turns.Training, "compile", lambda *_: None)
    monkeypatch.setattr(_training_turns.Training, "advance", lambda self, *_: self.run.rates.append(1.0))
    runs, done = _training_turns.train([work], VARIANTS, clock, steps=2, rounds=3)
    assert done == expected
    assert [len(run.rates) for run in runs] == [expected] * len(VARIANTS)


@pytest.mark.parametrize(
    ("error", "said"), [("JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory.", "does not fit"), ("A bug.", "failed")]
)
def test_a_variant_that_did_not_run_keeps_its_row(error, said):
    base = run_of(BASELINE, rates=[2.0], loss=1.0, compile_seconds=1.0, peak_bytes=1)
    text = accelerator.table(base.model, [base, Run(base.model, "autocast bf16", error=error)])
    assert row_of(text, "autocast bf16").split("|")[2].strip() == said
    assert f"- autocast bf16: {error}" in text


def test_a_training_that_runs_out_of_memory_ends_and_lets_go():
    """As XLA says it on a GPU: the others continue."""

    class Full:
        params = ()

        def begin(self, params):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")

    training = _training_turns.Training(run_of(BASELINE), Full())
    training.advance([], 2)
    assert accelerator.is_out_of_memory(training.run)
    assert training.held is None


@pytest.mark.parametrize("sizes", _training_sizes.TINY.values(), ids=_training_sizes.TINY)
def test_batches_depend_on_the_step_and_come_again(sizes):
    first, other, again = (sizes.draw(step) for step in (0, 1, sizes.distinct))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_labels_of_a_text_are_its_next_characters():
    inputs, labels = _training_sizes.TINY["GPT"].draw(0)
    assert (inputs[:, 1:] == labels[:, :-1]).all()
