"""config.example.yaml and the models say the same."""

import itertools
from pathlib import Path
from typing import Any

import yaml

from plexd.config.keys import KEYS
from plexd.config.load import load
from plexd.config.models import Config

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"


def leaves(section: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in section.items():
        key = prefix + name
        found |= leaves(value, f"{key}.") if isinstance(value, dict) and key not in KEYS else {key}
    return found


def test_example_shows_every_key_and_no_other() -> None:
    assert leaves(yaml.safe_load(EXAMPLE.read_text())) == set(KEYS)


def test_example_is_the_default_configuration() -> None:
    loaded = load({"config": str(EXAMPLE)}, {})
    assert loaded.config == Config()
    unset = {key for key, origin in loaded.origins.items() if origin == "default"}
    assert unset == {
        "api",
        "tls.ca_file",
        "hostname",
        "token.value",
        "node_api.http.token_file",
    }  # the keys without a default


def test_every_key_of_the_example_is_explained() -> None:
    """A comment stands above each key, or above the section for a section."""
    lines = EXAMPLE.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        name, colon, value = line.partition(":")
        if colon and not line.lstrip().startswith("#") and value:
            assert above.lstrip().startswith("#"), f"{name} has no comment"
