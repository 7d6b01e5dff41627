"""Sound before any network: files, arrays and an encoder's input features, within limits."""
