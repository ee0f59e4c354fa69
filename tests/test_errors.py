"""What error messages need."""

import pytest

from fastlock.errors import is_unicode


@pytest.mark.parametrize("text", ["", "plain", "é \U0001f512", "\ud7ff\ue000\uffff"])
def test_text(text: str) -> None:
    assert is_unicode(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\ud83d\udd12"])
def test_halves_of_characters(text: str) -> None:
    """The two halves, side by side, are none the better for it."""
    assert not is_unicode(text)
