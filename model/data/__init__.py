"""What a model learns from: readers of files, mixtures, batches of like length, and states of frozen encoders."""
