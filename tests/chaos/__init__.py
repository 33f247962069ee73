"""Log lines through an agent that is killed and a control plane that misbehaves, with the dice of a seed."""
