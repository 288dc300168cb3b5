"""The README's claims that a program can check."""

from __future__ import annotations

import re
from pathlib import Path

import fastdl
from fastdl.information import support_table

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_support_table_is_the_registrys():
    table = README.partition("<!-- support table -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == support_table()


def test_python_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_version_is_in_the_changelog():
    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"## [{fastdl.__version__}]" in changelog or "## [Unreleased]" in changelog
