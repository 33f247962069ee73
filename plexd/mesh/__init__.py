"""What the node should look like and how to get there. Pure: no waiting, no clock, no socket, no log."""
