"""The node's live state, and what the node says about itself."""
