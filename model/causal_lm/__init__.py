"""LAL, and Flamingo for comparison, in a stock causal language model."""
