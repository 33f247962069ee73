"""The node's identity: how a node gets, keeps, renews and gives up its identity."""
