"""What is compared: one class for each way of putting audio into a language model."""
