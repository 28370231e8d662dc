"""The forms for issues ask for what exists."""

import pathlib
import re
import shlex

import pytest
import yaml

from jmp_lite.cli._main import _parser

FOLDER = pathlib.Path(__file__).parents[1] / ".github" / "ISSUE_TEMPLATE"
FORM = yaml.safe_load((FOLDER / "bug.yml").read_text())
COMMANDS = re.findall(r"`jmp-lite ([^`]+)`", (FOLDER / "bug.yml").read_text())


def test_the_form_asks_for_devices_and_a_benchmark():
    assert COMMANDS == ["devices", "bench --tiny"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_form_exist(command):
    assert _parser().parse_args(shlex.split(command)).command == command.split()[0]


def test_every_field_is_asked_for_once_and_is_required():
    names = [field["id"] for field in FORM["body"]]
    assert names == ["program", "expected", "actual", "devices", "bench"]
    assert all(field["validations"]["required"] for field in FORM["body"])


@pytest.mark.parametrize("link", yaml.safe_load((FOLDER / "config.yml").read_text())["contact_links"])
def test_links_are_complete(link):
    assert set(link) == {"name", "url", "about"}
    if "/blob/main/" in link["url"]:
        assert (FOLDER.parents[1] / link["url"].split("/blob/main/")[1]).exists()
