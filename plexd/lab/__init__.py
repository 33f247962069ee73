"""An embedded control plane and nodes in network namespaces, to try plexd and to test it. No part of the daemon."""
