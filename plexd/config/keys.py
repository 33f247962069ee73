"""Every key there is, and how it is written: read off the models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from plexd.config.document import Auto, Kind, Size
from plexd.config.models import SIZE, AutoOrBool, Config


def _kind(annotation: Any) -> Kind:
    """How a key of this type is written down. Names, paths, URLs and secrets are texts."""
    origin = get_origin(annotation)
    if annotation == AutoOrBool:
        return Auto
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin in {Union, UnionType}:
        return _kind(next(arg for arg in get_args(annotation) if arg is not type(None)))
    if origin in {dict, tuple}:
        return dict if origin is dict else tuple
    return annotation if annotation in {int, bool, timedelta} else str


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Kind]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _walk(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, Size if SIZE in info.metadata else _kind(info.annotation)


KEYS: Mapping[str, Kind] = dict(_walk(Config))
