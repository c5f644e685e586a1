"""Hydra reads the paths in printed and started commands without changes."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_qat.overrides import quoted


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1))
@example("a\\b")
@example('a\\"b\\')
@example("/tmp/a run, of=1")
@example("NULL")
def test_a_quoted_path_is_that_path(path: str) -> None:
    value = OverridesParser.create().parse_override(f"x={quoted(path)}").value()
    assert (value.text if isinstance(value, QuotedString) else str(value)) == path
