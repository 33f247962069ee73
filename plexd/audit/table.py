"""Tables of names by number, written as text: a number, then the names from there on."""

from __future__ import annotations


def read_table(text: str) -> dict[int, str]:
    table = {}
    number = 0
    for word in text.split():
        if word.isdecimal():
            number = int(word)
        else:
            table[number] = word
            number += 1
    return table
