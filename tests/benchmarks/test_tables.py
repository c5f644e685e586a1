"""The tables in README.md and docs/."""

import re

import pytest
import readme

PAGES = {page.name: page.read_text() for page in readme.PAGES}


@pytest.mark.parametrize("name", readme.blocks())
def test_a_table_stands_in_one_page_as_it_is_written_from_the_results(name: str) -> None:
    block = f"<!-- {name} -->\n{readme.blocks()[name]}\n<!-- /{name} -->"
    assert [text.count(block) for text in PAGES.values()] in ([1, 0], [0, 1])


def test_no_page_has_a_table_that_nothing_writes() -> None:
    marks = [mark for text in PAGES.values() for mark in re.findall(r"<!-- (\w+) -->", text)]
    assert sorted(marks) == sorted(readme.blocks())
