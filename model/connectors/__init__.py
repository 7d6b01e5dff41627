"""From an encoder's states to the language model's width: MLP, Q-Former and LFST."""
