"""How long something took or has been, for people: two units at most, the rest is dropped."""


def format_age(seconds: float) -> str:
    """`12s`, `4m10s`, `2h16m`, `3d4h`; nothing is negative, a clock that was set back makes it `0s`."""
    whole = max(0, int(seconds))
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size}{unit}{rest}{smaller_unit}" if rest else f"{whole // size}{unit}"
    return f"{whole}s"
