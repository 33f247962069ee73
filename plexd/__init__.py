"""plexd, a node agent: keeps a WireGuard mesh equal to what the control plane wants."""

__version__ = "0.1.0"
