"""What vLLM asks before it starts an audio LLM. Light, as every process of vLLM loads it, whatever it serves."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

__all__ = ["PalHooks"]


class PalHooks(VerifyAndUpdateConfig):  # type: ignore[misc]
    """What depends on the model alone, and what on all settings."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Let vLLM find a processor whose chat template takes content in parts."""
        from palkernels.model.vllm.templates import register_processor

        register_processor()

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Choose what is not chosen, and refuse what cannot be served.

        Raises:
            ValueError: something cannot be served; the message lists everything, and what to set instead.
        """
        from palkernels.model.vllm.settings import check_settings, choose_defaults

        choose_defaults(vllm_config)
        check_settings(vllm_config)
