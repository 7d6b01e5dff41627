"""The audio token in a tokenizer and in embeddings, and what else a conversation needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.audio_llm import tone
from support.checkpoints import CHAT_TEMPLATE, END, language_model, llm_checkpoint, text_tokenizer

from palkernels.model import AUDIO_TOKEN, PalProcessor, build
from palkernels.model.building.vocabulary import add_audio_token

ENTRY = {"type": "sslam", "config": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}}


def grown(seed: int = 0, tokenizer: Any = None, **settings: Any) -> tuple[Any, Any, Any]:
    """A language model before and after, and the tokenizer."""
    before, after, tokenizer = language_model(**settings), language_model(**settings), tokenizer or text_tokenizer()
    token_id = add_audio_token(after, tokenizer, AUDIO_TOKEN, torch.Generator().manual_seed(seed))
    assert token_id == tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
    return before, after, tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_rows_lie_around_the_mean(tied: bool, dtype: torch.dtype) -> None:
    """In embeddings and in the head; the model goes on to say what it said, and no new token stands out."""
    before, after, tokenizer = grown(tied=tied, dtype=dtype)
    rows = len(before.get_input_embeddings().weight)
    assert after.config.vocab_size == len(after.get_input_embeddings().weight) == len(tokenizer) == rows + 1
    assert after.get_output_embeddings().out_features == rows + 1
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == tied
    for module in (type(before).get_input_embeddings, type(before).get_output_embeddings):
        old, new = module(before).weight.double(), module(after).weight.double()
        assert torch.equal(new[:rows], old)
        assert (new[rows:] - old.mean(dim=0)).abs().max() < 1e-3 * old.std() + (dtype != torch.float32) * 1e-3
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        said, now = before(ids).logits, after(ids).logits
    assert torch.equal(now[..., :rows], said)
    assert torch.allclose(
        now[..., rows].float(), said.float().mean(dim=-1), atol=1e-3 if dtype == torch.float32 else 0.05
    )


def test_several_new_rows_differ() -> None:
    """They are drawn from the generator, so that nothing keeps them alike in training."""
    new = grown(rows=256)[1].get_input_embeddings().weight[256:]
    assert len({tuple(row) for row in new.tolist()}) == len(new)
    assert torch.equal(new, grown(rows=256)[1].get_input_embeddings().weight[256:])
    assert not torch.equal(new, grown(1, rows=256)[1].get_input_embeddings().weight[256:])


@pytest.mark.parametrize(("rows", "expected"), [(259, 260), (258, 260), (256, 320), (208, 272), (260, 260), (320, 320)])
def test_how_far_a_vocabulary_grows(rows: int, expected: int) -> None:
    """Not at all where it has a row to spare, else to a multiple of the power of two that it was one of, 64 at most."""
    before, after, _ = grown(rows=rows)
    weight = after.get_input_embeddings().weight
    assert after.config.vocab_size == len(weight) == expected
    assert torch.equal(weight[:rows], before.get_input_embeddings().weight)


def test_a_head_with_a_bias() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = PhiForCausalLM(PhiConfig(**sizes, vocab_size=259, pad_token_id=None, bos_token_id=None, eos_token_id=0))
    torch.nn.init.normal_(model.lm_head.bias, 2.0)
    before = model.lm_head.bias.detach().clone()
    add_audio_token(model, text_tokenizer(), AUDIO_TOKEN, torch.Generator())
    assert torch.equal(model.lm_head.bias[:259], before)
    assert torch.allclose(model.lm_head.bias[259:], before.mean())


def test_the_audio_token_is_one(tmp_path: Path) -> None:
    """Special, and never split, whatever stands beside it; another name will do."""
    llm_checkpoint(tmp_path)
    for name in (AUDIO_TOKEN, "[SOUND]"):
        _, processor = build(tmp_path, [ENTRY], audio_token=name)
        tokenizer = processor.tokenizer
        ids = tokenizer(f"he{name}he {name}").input_ids
        assert ids.count(processor.audio_token_id) == 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == "hehe "
        assert processor(f"{name} what?", tone(), 16_000)["insert_at"].tolist() == [[0]]


def test_a_token_that_is_there_already(tmp_path: Path) -> None:
    """It keeps its id, and needs no row."""
    tokenizer = text_tokenizer()
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    llm_checkpoint(tmp_path, tokenizer, rows=len(tokenizer))
    model, processor = build(tmp_path, [ENTRY])
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert processor.audio_token_id == model.config.audio_token_id == len(tokenizer) - 1
    ordinary = grown(tokenizer=text_tokenizer())[2]
    assert add_audio_token(language_model(), ordinary, "the", torch.Generator()) == len(ordinary) - 1
    assert add_audio_token(language_model(), ordinary, "he", torch.Generator()) == ordinary.get_vocab()["he"]
    assert ordinary.tokenize("thehe") == ["the", "he"]


def conversation(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "the what?"}, {"role": "assistant", "content": answer}]


def learnt(processor: PalProcessor) -> str:
    """What labels teach of a conversation."""
    batch = processor.apply_chat_template(conversation("a hen"), tokenize=True, output_labels=True)
    labels = batch["labels"][0]
    return str(processor.tokenizer.decode(labels[labels >= 0]))


def test_a_tokenizer_without_a_template_gets_a_plain_one(tmp_path: Path) -> None:
    llm_checkpoint(tmp_path)
    processor = build(tmp_path, [ENTRY])[1]
    text = processor.apply_chat_template(conversation("a hen"))
    assert text == f"user: the what?\nassistant: a hen{END}\n"
    assert (
        processor.apply_chat_template(conversation("")[:1], add_generation_prompt=True) == text[: text.index("a hen")]
    )
    assert learnt(processor) == f"a hen{END}"


def test_a_template_stays(tmp_path: Path) -> None:
    tokenizer = text_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    llm_checkpoint(tmp_path, tokenizer)
    processor = build(tmp_path, [ENTRY])[1]
    assert processor.tokenizer.chat_template == CHAT_TEMPLATE
    assert processor.apply_chat_template(conversation("a")) == f"<user>the what?{END}<assistant>a{END}"


def test_padding(tmp_path: Path) -> None:
    """With the end of text where there was none, in the configs too; labels still teach the end of an answer."""
    llm_checkpoint(tmp_path / "without")
    model, processor = build(tmp_path / "without", [ENTRY])
    assert processor.tokenizer.pad_token == END
    assert [model.config.pad_token_id, model.generation_config.pad_token_id] == [0, 0]
    assert processor(["the", "hen he"])["attention_mask"].tolist()[0][0] == 0
    assert learnt(processor).endswith(END)
    llm_checkpoint(tmp_path / "with", text_tokenizer(pad_token="!"), pad_token_id=1)
    model, processor = build(tmp_path / "with", [ENTRY])
    assert processor.tokenizer.pad_token == "!"
    assert [model.config.pad_token_id, model.generation_config.pad_token_id] == [1, 1]


def test_refused() -> None:
    tokenizer = text_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"^the tokenizer must have an eos_token"):
        add_audio_token(language_model(), tokenizer, AUDIO_TOKEN, torch.Generator())
    with pytest.raises(ValueError, match=r"^audio_token must be one token to the tokenizer, got ''"):
        add_audio_token(language_model(), text_tokenizer(), "", torch.Generator())
