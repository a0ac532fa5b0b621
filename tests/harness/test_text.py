"""What is written on terminals is text, and as long as it may be."""

import pytest

from harness.text import clean, duration, fitted, listing, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a[gru]b [/foo] é 中", "a[gru]b [/foo] é 中"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m\r\n\t\x00", "\\x9b31m\\r\\n\\t\\x00"),
        ("\u202edlrow \ud800", "\\u202edlrow \\ud800"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert clean(text) == shown
    assert clean(text).isprintable()


def test_long_texts_are_cut():
    assert shorten("abcdef", 6) == "abcdef" and shorten("abcdefg", 6) == "abc..."
    assert shorten("\x1b" * 10, 8) == "\\x1b\\..."
    assert listing("abcd", most=3) == "a, b, c and 1 more" and listing("abc", most=3) == "a, b, c"


@pytest.mark.parametrize(
    ("value", "form", "width", "text"),
    [
        (-6172.84, "{:.2f}", 8, "-6172.84"),
        (123456.78, "{:.2f}", 8, "123457"),
        (-1.234e9, "{:.2f}", 8, "-1.2e+09"),
        (-1.234e9, "{:.0f}", 6, "-1e+09"),
        (98765432.1, "{:,.0f}", 9, "98765432"),
    ],
)
def test_numbers_fit(value, form, width, text):
    assert fitted(value, form, width) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (3723.9, "1:02:03"),
        (359_999, "99:59:59"),
        (864_000, "10 days"),
        (1e12, "years"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
