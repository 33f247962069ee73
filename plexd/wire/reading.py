"""Reading JSON the way the control plane means it (docs/contract/wire.md §6.1).

`load` takes a document apart, `read` makes a model of it. A fault inside a list costs that element, any other fault
costs the document. What a field of arbitrary JSON holds stays JSON, as text: numbers keep their digits, members their
order. No message made here ever contains a value, because values may be secrets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from plexd.errors import WireError

# beyond this the document is not one with faults but another kind of document
MAX_FAULTS = 10_000
# Python refuses to take longer ones apart, and no member of the contract is one: only their text matters
MAX_INTEGER_DIGITS = 4000

# first members that tell elements apart; the first one present names the element in a log
_ID_MEMBERS = ("id", "peer_id", "key", "session_id", "rule_id", "tunnel_id", "public_key")

# an escaped surrogate, to see quickly that a document has none
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# every escape: a surrogate pair (12 characters), a lone surrogate (6), any other (2 suffice to get past it)
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD][89a-fA-F][0-9a-fA-F]{2}|.)", re.DOTALL
)

ModelT = TypeVar("ModelT", bound=BaseModel)

_quote = json.JSONEncoder(ensure_ascii=False).encode


class Skipped(NamedTuple):
    """Something that arrived and is not used: where, which (as far as it has an id), and why; never a value."""

    path: str
    id: str
    reason: str


class JSONText(str):
    """A JSON value as text. The repr leaves the text out, it may hold what nobody should see."""

    __slots__ = ()

    @classmethod
    def of(cls, value: object) -> Self:
        """From Python values, or from what `load` returned. ValueError for NaN and infinities."""
        return cls(_write(value))

    def __repr__(self) -> str:
        return f"JSONText({len(self)} characters)"

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: type[Any], _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, JSONText) else cls.of(value)
        )


NULL = JSONText("null")


class _Decimal:
    """A number with fraction or exponent, or very many digits. No member of the contract is one: its text matters."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class _MinusZero(int):
    """The integer 0 that was written `-0`."""


def _parse_int(text: str) -> int | _Decimal:
    if len(text) > MAX_INTEGER_DIGITS:
        return _Decimal(text)
    return _MinusZero() if text == "-0" else int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_decode = json.JSONDecoder(parse_float=_Decimal, parse_int=_parse_int, parse_constant=_refuse_constant).decode


def load(data: bytes | str) -> object:
    """The document as Python values. Raises WireError for everything that is not one JSON document in UTF-8.

    Integers are exact; other numbers are opaque and only `JSONText.of` can write them again, with their own text.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return _decode(replace_lone_surrogates(text))
    except UnicodeDecodeError as exc:
        raise WireError(f"document is not UTF-8 at byte {exc.start}") from None
    except json.JSONDecodeError as exc:
        raise WireError(f"document is not JSON: {exc.msg} at character {exc.pos}") from None
    except RecursionError:
        raise WireError("document is nested too deeply") from None
    except ValueError:
        raise WireError("document has a number that is not JSON or is too long") from None


def replace_lone_surrogates(text: str) -> str:
    r"""JSON text with every `\u` escape of an unpaired surrogate replaced by `\ufffd`."""
    if _SURROGATE_ESCAPE.search(text) is None:
        return text
    return _ESCAPE.sub(lambda match: r"\ufffd" if len(match[0]) == 6 else match[0], text)


def read(model: type[ModelT], data: bytes | str) -> tuple[ModelT, tuple[Skipped, ...]]:
    """A document as `model`, and the list elements that had to be left out. WireError when it is no such document."""
    return read_value(model, load(data))


def read_list(model: type[ModelT], data: bytes | str) -> tuple[tuple[ModelT, ...], tuple[Skipped, ...]]:
    """Like `read`, for a document that is an array of `model`."""
    adapter: TypeAdapter[list[ModelT]] = TypeAdapter(list[model])  # type: ignore[valid-type]
    elements, skipped = _validate(adapter.validate_python, load(data), f"list of {model.__name__}")
    return tuple(elements), skipped


def read_value(model: type[ModelT], value: object) -> tuple[ModelT, tuple[Skipped, ...]]:
    """Like `read`, from what `load` returned; lists inside `value` may be shortened by it."""
    return _validate(model.model_validate, value, model.__name__)


def _validate(validate: Any, value: object, what: str) -> tuple[Any, tuple[Skipped, ...]]:
    skipped: list[Skipped] = []
    while True:
        try:
            return validate(value), tuple(skipped)
        except ValidationError as exc:
            if exc.error_count() > MAX_FAULTS:
                raise WireError(f"{what} has more than {MAX_FAULTS} faults") from None
            faults: dict[tuple[str | int, ...], str] = {}
            for error in exc.errors(include_url=False, include_context=False, include_input=False):
                element = _innermost_element(error["loc"])
                reason = _reason(error["loc"][len(element) :], error["msg"])
                if not element:
                    raise WireError(f"{what}: {reason}") from None
                faults.setdefault(element, reason)
        except RecursionError:
            raise WireError(f"{what} is nested too deeply") from None
        skipped += [Skipped(_spell(path), _id_of(value, path), reason) for path, reason in faults.items()]
        _remove(value, faults)


def _innermost_element(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path of the innermost list element a fault lies in; empty when it lies in none."""
    end = next((i for i in range(len(loc), 0, -1) if isinstance(loc[i - 1], int)), 0)
    return loc[:end]


def _reason(loc: Iterable[str | int], message: str) -> str:
    place = _spell(loc)
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    return f"{place} {text}" if place else text


def _spell(path: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _id_of(value: Any, path: tuple[str | int, ...]) -> str:
    found = ""
    for part in path:
        value = value[part]
        if isinstance(value, Mapping):
            ids = (value[name] for name in _ID_MEMBERS if isinstance(value.get(name), str))
            found = next(ids, found)
    return found


def _remove(value: Any, paths: Iterable[tuple[str | int, ...]]) -> None:
    """Take the elements at `paths` out of their lists, the innermost first so that the other paths stay right."""
    doomed: dict[tuple[str | int, ...], set[str | int]] = {}
    for path in paths:
        doomed.setdefault(path[:-1], set()).add(path[-1])
    for parent in sorted(doomed, key=len, reverse=True):
        elements = value
        for part in parent:
            elements = elements[part]
        elements[:] = [element for index, element in enumerate(elements) if index not in doomed[parent]]


def _write(value: object) -> str:
    if isinstance(value, _Decimal):
        return value.text
    if isinstance(value, _MinusZero):
        return "-0"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quote(str(name))}:{_write(member)}" for name, member in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_write, value)) + "]"
    if isinstance(value, JSONText):
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
