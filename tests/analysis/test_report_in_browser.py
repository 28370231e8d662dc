"""The page of a report in a browser: no error, nothing fetched, tables that sort and search, no sideways scrolling."""

import html
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest

import jmp_lite as jmp
from jmp_lite.analysis import Finding, collect, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

LONG = "a_scope_with_a_name_that_no_line_holds_" * 4 + "<script>document.title = 'broken into'</script>"
#: Clicks, types, and writes down what came of it where --dump-dom shows it.
PROBE = """
const table = [...document.querySelectorAll("table")].find((one) => one.tHead.textContent.includes("largest"));
const heads = [...table.tHead.rows[0].cells];
const column = (name) => heads.findIndex((head) => head.textContent === name);
const rows = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
const shown = (name) => rows().map((row) => row.cells[column(name)].textContent);
const click = (name) => heads[column(name)].firstElementChild.click();
const found = {title: document.title, width: innerWidth, page: document.documentElement.scrollWidth};
const parts = [...document.querySelectorAll("section > :not(.scroll):not(.wide)")];
found.wide = parts.filter((one) => one.scrollWidth > innerWidth).length;
click("largest"); found.down = shown("largest");
click("largest"); found.up = shown("largest");
click("what"); found.names = shown("what");
const search = table.closest("section").querySelector("input");
search.value = "backward OUT"; search.dispatchEvent(new Event("input")); found.searched = shown("what");
document.body.dataset.found = JSON.stringify(found);
"""


def step(w, x):
    for index in range(3):
        with jax.named_scope(f"layer_{index}" if index else LONG):
            x = jnp.tanh(x @ w) * 3.0
    return jnp.mean(jnp.square(x))


@pytest.fixture
def page(tmp_path):
    found = [jax.jit(collect(jax.grad(step)))(jnp.eye(4) * s, jnp.ones((2, 4)))[1] for s in (1.0, 2.0, 300.0)]
    metrics = {n: {"loss_scale": 2.0**-n, "last_finite": n != 1, "culprits": LONG if n == 1 else ""} for n in range(3)}
    audited = jmp.analysis.audit(step, "mixed_float16")(jnp.eye(4), jnp.ones((2, 4)))
    path = tmp_path / "report.html"
    report(found, metrics, audited, Finding("x64", LONG, LONG, LONG), title=LONG).save_html(path)
    return path


def browse(path, *arguments):
    """What the page is once its scripts have run, and what Chromium said meanwhile."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    process = subprocess.run(
        [*command, *arguments, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return process.stdout, [line for line in process.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [1300, 900, 500])
def test_page_works_at_every_width(page, width):
    text = page.read_text()
    page.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    dom, errors = browse(page, f"--window-size={width},900")
    assert errors == []
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert found["title"] == LONG
    assert found["page"] <= found["width"]
    assert found["wide"] == 0
    numbers = [float(text.replace(",", "")) for text in found["down"]]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 3
    assert [float(text.replace(",", "")) for text in found["up"]] == sorted(numbers)
    assert found["names"][-1] == max(found["names"], key=str.lower)
    assert found["searched"]
    assert all("backward out" in name for name in found["searched"])


def test_errors_would_be_noticed(page):
    page.write_text(
        page.read_text().replace("</body>", "<script>nothing()</script><img src='https://x.invalid'></body>")
    )
    _, errors = browse(page)
    assert len(errors) == 2
