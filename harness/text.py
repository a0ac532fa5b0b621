"""How names, numbers and times are written on a terminal."""


def clean(text) -> str:
    """Text that a terminal shows as it is: escape sequences and the like are written out.

    Names come from files and command lines of anybody; a terminal obeys the control characters in
    them. What has no place on a line of text is shown as in Python's literals: \\x1b, \\n, \\u202e.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def shorten(text, width: int) -> str:
    """The clean text with at most `width` characters; "..." stands for what is cut off."""
    text = clean(str(text)[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."


def listing(names, most: int = 20, width: int = 200) -> str:
    """Names in one line: the first `most`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shorten(name, width) for name in names[:most]) + more


def fitted(value: float, form: str, width: int) -> str:
    """A number with the digits that have room: in its format, whole, or with an exponent."""
    texts = [form.format(value), f"{value:.0f}", f"{value:.1e}", f"{value:.0e}"]
    return next((text for text in texts if len(text) <= width), texts[-1])


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; from 100 hours on in days. At most 8 characters."""
    if seconds >= 360_000:
        return f"{seconds / 86_400:.0f} days" if seconds < 86_400_000 else "years"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}"
