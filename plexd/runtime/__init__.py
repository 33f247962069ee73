"""The loops of the daemon. Each says what it needs as Protocols; daemon/composition.py hands it in."""
