"""What the node API answers: routes, who may use them, and their documents; `services.local_api` serves it."""
