"""How audio LLMs are served under load: servers of vLLM's in turn, a client, its figures."""
