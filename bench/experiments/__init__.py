"""What is run: Figure 1 measured, and simulated."""
