"""The whole audio LLM, with Hugging Face's conventions."""
