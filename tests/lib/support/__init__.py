"""What several tests share: oracles, models, inputs, and programs that tests start."""
