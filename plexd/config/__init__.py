"""The configuration: what can be set (`models`), how a file is read (`document`), where values come from (`load`)."""

from plexd.config.load import Loaded, load
from plexd.config.models import Config, effective_hostname

__all__ = ["Config", "Loaded", "effective_hostname", "load"]
