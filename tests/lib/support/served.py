"""Small audio LLMs that vLLM serves, what they are asked, and what Hugging Face with ``attach`` answers."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from palkernels.model import AUDIO_TOKEN, AudioFeatures, PalForConditionalGeneration, PalProcessor, byte_tokenizer
from palkernels.model.pal.clips import Clips

RATE, NEW, WIDTH = 16_000, 12, 128
AUDIO_ID = byte_tokenizer().convert_tokens_to_ids(AUDIO_TOKEN)
WHISPER = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "window_seconds": 2}
LAL = {"type": "whisper", "config": WHISPER, "integration": "lal", "connector": {"type": "mlp"}}
STACKED = {**LAL, "connector": {"type": "mlp", "config": {"stack": 4}}}
PLITS = {**STACKED, "integration": "plits"}
QUERIES = {"num_queries": 5, "num_layers": 1, "width": 16, "num_heads": 2, "dropout": 0.0}
QUERIED = {
    **LAL,
    "config": {**WHISPER, "window_seconds": 3},  # cut elsewhere than the others' windows
    "connector": {"type": "qformer", "config": QUERIES},
}
LFST = {
    "type": ["sslam", "clap"],
    "config": [
        {"hidden_size": 16, "num_layers": 1, "num_heads": 1},
        {"patch_embeds_hidden_size": 8, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 2, 4]},
    ],
    "integration": "lal",
    "connector": {"type": "lfst", "config": {"width": 16, "num_heads": 2, "depth": 1}},
}
FAMILIES: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# By name: entries of a config, and its other settings.
MODELS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "lal": ([STACKED], {}),
    "plits": ([PLITS], {}),
    "unified": ([STACKED], {"summary_tokens": 5}),
    "encoders": ([PLITS, LAL, QUERIED], {"projection": "per_layer"}),
    "delayed": ([STACKED], {"layers": [2, 3]}),
    "lfst": ([PLITS, LFST], {}),
    "unrotated": ([STACKED], {"rope": "none", "projection": "per_layer", "layers": [1, 2]}),
}
NOT_SERVED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "flamingo": ([{**STACKED, "integration": "flamingo"}], {"flamingo": {"every": 2}}),
}


def make(directory: Path, name: str, family: str = "llama") -> Path:
    """Write a model with random weights in float32, which answers differently for every clip."""
    entries, settings = {**MODELS, **NOT_SERVED}[name]
    tokenizer = byte_tokenizer()
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": len(tokenizer), "max_position_embeddings": 65_536,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = FAMILIES[family](**sizes)
    language_model = AutoModelForCausalLM.from_config(config).float()
    for weight in language_model.parameters():
        torch.nn.init.normal_(weight, std=0.15) if weight.ndim == 2 else torch.nn.init.uniform_(weight, 0.5, 1.5)
    model = PalForConditionalGeneration.from_parts(language_model, entries, audio_token_id=AUDIO_ID, **settings)
    for weight in [*model.multi_modal_projector.parameters(), *model.layer_projector.parameters()]:
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(directory)
    PalProcessor.from_config(tokenizer, model.config).save_pretrained(directory)
    return directory


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """(samples,) of a tone in noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.4 * np.sin(time * (900 + 500 * seed)) + 0.1 * noise).astype(np.float32)


class Question(NamedTuple):
    """A text with an audio token for each clip, and the clips."""

    text: str
    clips: tuple[np.ndarray, ...] = ()


A = AUDIO_TOKEN
QUESTIONS = {
    "first": Question(f"{A}What is it?", (sound(0.7),)),
    "inside": Question(f"Listen: {A} What did you hear?", (sound(1.6, 1),)),
    "windows": Question(f"user: {A}how long is this?\nassistant: ", (sound(4.6, 2),)),
    "two": Question(f"a {A} and {A}?", (sound(1.6, 1), sound(0.02, 3))),
    "text": Question("Hello! And now for something completely different."),
    "adjacent": Question(f"{A}{A} b", (sound(0.3, 4), sound(0.9, 5))),
}


class Answer(NamedTuple):
    """Tokens, and the log-probabilities (tokens, vocabulary) of all tokens in their places."""

    tokens: list[int]
    logprobs: torch.Tensor


class Reference:
    """A saved model as Hugging Face runs it."""

    def __init__(self, directory: Path) -> None:
        self.model = PalForConditionalGeneration.from_pretrained(directory).eval()
        self.processor = PalProcessor.from_pretrained(directory)

    def answer(self, question: Question, new: int = NEW) -> Answer:
        return self.answer_inputs(self.processor(question.text, list(question.clips) or None, RATE), new)

    def answer_inputs(self, inputs: Any, new: int = NEW) -> Answer:
        """Answer what the processor has made."""
        return self._generate(self.model, inputs, new)

    def answer_states(self, parts: list[list[int] | torch.Tensor], new: int = NEW) -> Answer:
        """Answer tokens and a connector's states (tokens, d) of clips that stand among them, which LAL hears."""
        return self._generate(self.model, self._inputs_of_states(parts), new)

    def foretell_states(self, parts: list[list[int] | torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (text tokens, vocabulary) of what follows each text token of such a prompt."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(**self._inputs_of_states(parts)).logits
        return logits[0].log_softmax(-1)

    def _inputs_of_states(self, parts: list[list[int] | torch.Tensor]) -> dict[str, Any]:
        ids, states, places = [], [], []
        for part in parts:
            if isinstance(part, torch.Tensor):
                states.append(part)
                places.append(len(ids))
            else:
                ids += part
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if states:
            lengths = torch.tensor([len(clip) for clip in states])
            clips = Clips(torch.nn.utils.rnn.pad_sequence(states, batch_first=True), lengths)
            inputs |= {"audio_features": AudioFeatures(lal=clips), "audio_index": torch.arange(len(states))[None]}
            inputs["insert_at"] = torch.tensor([places])
        return inputs

    def _generate(self, model: Any, inputs: Any, new: int) -> Answer:
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
        out = model.generate(**inputs, **settings, min_new_tokens=new, return_dict_in_generate=True, output_logits=True)
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return Answer(tokens, torch.stack(out.logits).squeeze(1).log_softmax(-1))


def quiet_environment() -> None:
    """Let vLLM run in this process, on one thread, without asking anybody."""
    os.environ.update(
        OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_HOST_IP="127.0.0.1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip


@contextmanager
def engine(directory: Path, **settings: Any) -> Iterator[Any]:
    """A small engine of vLLM's for a saved model. A process has one at a time: the end of one ends what all share."""
    from vllm import LLM

    defaults = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8, "block_size": 32,
        "seed": 0, "max_num_batched_tokens": 4096, "limit_mm_per_prompt": {"audio": 4}, "max_logprobs": 20,
        "disable_log_stats": False,
    }  # fmt: skip
    llm = LLM(str(directory), **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompt_of(question: Question, rate: int = RATE) -> dict[str, Any]:
    clips = [(clip, rate) for clip in question.clips]
    return {"prompt": question.text, **({"multi_modal_data": {"audio": clips}} if clips else {})}


def prompt_of_states(parts: list[list[int] | torch.Tensor]) -> dict[str, Any]:
    ids = [token for part in parts for token in ([AUDIO_ID] if isinstance(part, torch.Tensor) else part)]
    clips = [part for part in parts if isinstance(part, torch.Tensor)]
    return {"prompt_token_ids": ids, **({"multi_modal_data": {"audio": clips}} if clips else {})}


def ask(llm: Any, prompts: list[dict[str, Any]], new: int = NEW) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, logprobs=20, ignore_eos=True)
    return llm.generate(prompts, params, use_tqdm=False)  # type: ignore[no-any-return]


def assert_same(output: Any, expected: Answer, closeness: float = 1e-4) -> None:
    """The answer has the same tokens, each of its log-probabilities within ``closeness``."""
    (got,) = output.outputs
    assert list(got.token_ids) == expected.tokens
    for step, logprobs in enumerate(got.logprobs):
        for token, entry in logprobs.items():
            assert abs(entry.logprob - float(expected.logprobs[step, token])) < closeness, (step, token)
