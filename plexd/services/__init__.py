"""The loops of the daemon. Each says what it needs as Protocols; daemon.py hands it in."""
