"""How peers reach this node through NATs, and which endpoint of a peer this node uses."""
