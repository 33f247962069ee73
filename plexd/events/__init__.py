"""The stream of signed events: receive, verify, and act on each event."""
