"""What holds for every test: property tests are judged by what they find, never by how long an example took."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("plexd", deadline=None, print_blob=True)
settings.load_profile("plexd")
