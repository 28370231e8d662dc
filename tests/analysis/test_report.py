"""Reports: every part is in every form, the worst comes first, and what users wrote stays text."""

import csv
import functools
import json
import pathlib
import re
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_lite as jmp
from jmp_lite.analysis import Finding, audit, collect, diagnose, first_nonfinite, ranges, report
from jmp_lite.analysis._reports._rows import metrics_of, shortened
from jmp_lite.analysis._reports._series import heat_maps_of, timelines_of

SCOPE = "<script>alert(1)</script>$x_&\"'"


def model(w, x):
    for index in range(2):
        with jax.named_scope(f"{SCOPE}_{index}"):
            x = jnp.tanh(x @ w)
    return jnp.mean(jnp.square(x))


W, X = jnp.eye(4), jnp.ones((2, 4))


STEP = jax.jit(collect(jax.grad(model)))


@functools.cache
def steps_of_ranges(count=3):
    return [STEP(W, X * 10.0**step)[1] for step in range(count)]


@functools.cache
def small(count=2):
    """Of few rows, which are drawn in no time."""
    return [ranges({"w": X * 10.0**step, "b": -X}, "parameter") for step in range(count)]


@functools.cache
def training(steps=6, bad=(3,)):
    """Metrics of steps of which some are skipped, with the names of what was not finite."""
    return dict(readings(steps, bad))


def readings(steps, bad):
    tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(2.0**10, period=2))
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    for step in range(steps):
        grads = {"a": jnp.full(2, jnp.inf if step in bad else 1.0), "b": jnp.ones(3)}
        _, state = tx.update(grads, state, params)
        yield step, {**jmp.metrics(state), "culprits": jmp.distributed.nonfinite_leaves(grads)}


def broken():
    return first_nonfinite(jnp.log)(-X)


class Estimated(tuple):
    """A part that the report has never heard of; that it is a sequence too does not matter."""

    __slots__ = ()

    findings = (Finding("dead", "Nothing happens."),)

    def to_dict(self):
        rows = [{"layer": SCOPE, "seconds": np.float32(0.5), "share": 0.25}, {"layer": "b", "bytes": 2000}]
        return {"device": "H100", "peak": {"bytes": 10}, "rows": rows, "findings": [{"kind": "dead"}]}


PARTS = {
    "audit": (lambda: audit(model)(W, X), ["Audit", "Audit: matmuls"]),
    "ranges": (lambda: steps_of_ranges(1)[0], ["Ranges, as float16 would hold them"]),
    "ranges by steps": (lambda: small(3), ["Ranges of 3 steps, as float16 would hold them"]),
    "ranges at steps": (
        lambda: dict(enumerate(small(), 10)),
        ["Ranges of 2 steps, as float16 would hold them"],
    ),
    "nonfinite": (broken, ["NonFinite", "NonFinite: arrays"]),
    "nonfinite at a step": (lambda: {7: broken()}, ["NonFinite, step 7", "NonFinite, step 7: arrays"]),
    "finding": (lambda: Finding("dead", "Nothing happens."), []),
    "findings": (lambda: diagnose(ranges(jnp.zeros(3), "gradient")), []),
    "metrics": (training, ["Loss scaling"]),
    "metrics of one step": (lambda: training()[0], ["Loss scaling"]),
    "unheard of": (Estimated, ["Estimated", "Estimated: rows"]),
    "several": (lambda: [Estimated(), broken()], ["Estimated", "Estimated: rows", "NonFinite", "NonFinite: arrays"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_is_in_every_form(name, tmp_path):
    make, titles = PARTS[name]
    found = report(make(), title="T")
    assert [table.title for table in found.tables] == titles
    assert all(title in str(found) for title in ["T", *titles])
    data = json.loads(found.to_json(tmp_path / "r.json"), parse_constant=pytest.fail)
    assert json.loads((tmp_path / "r.json").read_text()) == data
    assert len(data["findings"]) == len(found.findings)
    found.to_csv(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["table"] == "findings" for row in rows) == len(found.findings)
    assert len(rows) > len(found.findings) or not titles
    found.save_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<script") == page.count("</script>") == 1
    figures = page.count('<div class="grid">') + page.count('<div class="wide">')
    assert page.count("<h2>") == 1 + len(titles) + figures


@pytest.mark.parametrize("part", [3.0, "text", None, jnp.ones(2), {1: 3.0}, [Estimated(), 3.0]])
def test_what_is_no_part_is_refused(part):
    with pytest.raises(jmp.errors.InvalidAnalysisError, match=r"can be no part of a report\. Give what"):
        report(part)


def test_findings_of_all_parts_are_in_one_list_the_worst_first():
    parts = [Estimated(), ranges(jnp.asarray([1.0, jnp.nan]), "gradient"), Finding("x64", "A word.")]
    assert [finding.kind for finding in report(*parts).findings] == ["nan", "x64", "dead"]


def test_format_decides():
    large = ranges({"w": jnp.full(3, 1e6)}, "parameter")
    assert [f.kind for f in report(large).findings] == ["overflow"]
    assert report(large, format="bf16").findings == ()
    with pytest.raises(jmp.errors.UnknownDtypeError, match="Unknown format"):
        report(large, format="float12")


def test_total_of_steps_is_their_sum():
    """Counts, extremes, and sums of squares of steps that differ by powers of ten."""
    steps = steps_of_ranges()
    [history] = report(steps).histories
    expected = sum(steps[1:], steps[0])
    for (_, a), (_, b) in zip(history.total.pairs, expected.pairs, strict=True):
        for field in ("count", "zero", "largest", "smallest", "exponents"):
            assert getattr(a, field) == getattr(b, field)
        assert (a.rms, a.mean) == (pytest.approx(b.rms), pytest.approx(b.mean))
        assert a.fates["int8"].rms_error == pytest.approx(b.fates["int8"].rms_error)


def test_ranges_of_other_programs_are_other_tables():
    found = report(ranges({"a": X}), ranges({"b": X}), [ranges({"a": X}), ranges({"b": X})])
    assert [len(history.steps) for history in found.histories] == [1, 1, 1, 1]


def test_heat_map_has_modules_by_steps():
    [found] = heat_maps_of(report(steps_of_ranges()).histories, "float16")
    assert found.steps == (0, 1, 2)
    assert [name.endswith("backward") for name in found.modules] == [False, False, True, True]
    assert found.largest[0].tolist() == pytest.approx(np.log2([1, 10, 100]), abs=1e-6)
    assert not found.broken.any()


def test_layers_of_trees_are_in_the_order_of_their_numbers():
    grads = {f"layer_{n}": {"w": X} for n in (10, 9, 1)}
    [found] = heat_maps_of(report([ranges(grads, "gradient")] * 2).histories, "float16")
    assert found.modules == ("layer_1/w", "layer_9/w", "layer_10/w")


@pytest.mark.parametrize(
    ("text", "short"), [("a/short", "a/short"), ("begin/of/a/path/layer_10/w", "beg…path/layer_10/w")]
)
def test_long_names_keep_their_ends(text, short):
    assert shortened(text, 19) == short


@pytest.mark.parametrize("every", [1, 3])
def test_timeline_has_skips_and_culprits(every):
    """Steps between those that were logged are counted too."""
    logged = {step: one for step, one in training(9, bad=(3, 4)).items() if step % every == every - 1}
    [line] = timelines_of(report(logged).entries)
    assert sum(count for _, count in line.skips) == 2
    assert line.culprits == (((3, "a"), (4, "a")) if every == 1 else ())
    assert line.scales[-1] == float(logged[8]["loss_scale"])


def test_culprits_are_names_flags_or_what_was_found():
    culprits = {1: "w", 2: ["a", "b"], 3: {"a": jnp.zeros(2, bool)}}
    metrics = {step: {"loss_scale": 2.0, "culprits": one} for step, one in culprits.items()}
    [line] = timelines_of(report(metrics, {5: broken()}).entries)
    assert line.culprits == ((1, "w"), (2, "a, b"), (5, "log"))


def test_several_loss_scales_have_lines_of_their_own():
    lines = timelines_of(report([{"a/loss_scale": 2.0, "b/loss_scale": 4.0}] * 2).entries)
    assert [(line.name, line.scales) for line in lines] == [("a", (2.0, 2.0)), ("b", (4.0, 4.0))]


def test_metrics_are_read_from_the_device_once():
    [(_, one)] = metrics_of(report({4: training()[3]}).entries)
    assert one["culprits"] == "a"
    assert {type(value) for value in one.values()} == {str, float, int, bool}


# --- Files ---


class Written:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


class Flax(Written):
    add_scalar = None

    def scalar(self, tag, value, step):
        self.scalars[tag, step] = value


@pytest.mark.parametrize("kind", [Written, Flax])
def test_scalars_have_the_steps_of_their_parts(kind):
    writer = kind()
    report(steps_of_ranges(2), ranges({"w": X}, "gradient"), training(2)).to_tensorboard(writer, 99)
    assert writer.scalars["ranges/argument_0/largest", 1] == 1.0
    assert writer.scalars["ranges/gradient_w/rms", 99] == 1.0
    assert writer.scalars["loss_scaling/loss_scale", 1] == 2.0**11
    assert writer.scalars["findings/error", 99] == 0


def test_what_takes_no_scalars_is_refused():
    with pytest.raises(jmp.errors.InvalidAnalysisError, match="str has neither"):
        report().to_tensorboard("run")


PICTURES = {
    "nothing": ([], []),
    "one step": ([lambda: small()[0]], ["histograms"]),
    "history": ([small], ["histograms", "modules"]),
    "two programs": ([small, lambda: [ranges(W)] * 2], ["histograms", "modules", "modules_1"]),
    "metrics": ([training], ["loss_scale"]),
    "one reading": ([lambda: training()[0]], ["loss_scale"]),
    "zeros": ([lambda: [ranges(jnp.zeros(3))] * 2], ["modules"]),
    "NaN and zeros": ([lambda: [ranges(jnp.asarray([jnp.nan, 0.0]))] * 2], ["modules"]),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("held", ["float16", pytest.param("int8", marks=pytest.mark.slow)])
def test_pictures_are_of_what_there_is(name, held, tmp_path):
    parts, stems = PICTURES[name]
    found = report(*(make() for make in parts), format=held)
    files = found.save_png(tmp_path / "new" / "folder")
    assert [file.stem for file in files] == stems
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert struct.unpack(">I", data[16:20]) == (1300,)
    found.save_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().count("<svg") >= len(stems)


def test_page_needs_nothing_else_and_users_words_are_text(tmp_path):
    audited = Finding("x64", SCOPE, SCOPE, SCOPE)
    parts = [steps_of_ranges(), training(), Estimated(), audited, {3: {"loss_scale": 2.0, "culprits": SCOPE}}]
    report(*parts, title=SCOPE).save_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:)[^\s"')]+""", page)
    assert fetched == []
    addresses = {a for a in re.findall(r"https?://[^\s\"'<]+", page) if not a.startswith("http://www.w3.org/")}
    assert addresses == set()


def test_pages_are_equal_if_reports_are(tmp_path):
    for name in "ab":
        report(small(), training()).save_html(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("how", ["save_png", "save_html"])
def test_missing_matplotlib_is_named(how, tmp_path, monkeypatch):
    found = report(small()[0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("Run pip install 'jmp-lite[analysis]'")):
        getattr(found, how)(tmp_path / "x")


def test_text_does_without_rich(monkeypatch):
    found = report(steps_of_ranges(), training(30))
    fancy = str(found)
    monkeypatch.setitem(sys.modules, "rich", None)
    plain = str(found)
    assert "─" in fancy
    assert "─" not in plain
    for text in (fancy, plain):
        assert "... and 18 more" in text
        assert "Loss scaling" in text


def test_assets_are_beside_the_code():
    folder = pathlib.Path(jmp.analysis.__file__).parent / "_reports"
    assert {"report.css", "report.js"} <= {file.name for file in folder.iterdir()}
