"""What the node API answers: routes, who may use them, and their documents; `services.door` is where it is asked."""
