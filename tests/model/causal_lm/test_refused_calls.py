"""Misuse of an attached model that would otherwise be ignored, each with its own message."""

import pytest
import torch
from support.attached import (
    TOKENS,
    WIDTH,
    batch,
    texts,
)
from support.oracles import build

from palkernels.model import AudioState, attach


class TestRefusedCalls:
    """Misuse that would otherwise be ignored, each with its own message."""

    @pytest.fixture
    def model(self):
        model = build("llama")
        attach(model)
        return model

    def state(self, **changes):
        return AudioState(**({"states": torch.zeros(3, TOKENS, WIDTH)} | changes))

    @pytest.mark.parametrize(
        ("states", "error", "message"),
        [
            (torch.zeros(3, TOKENS, WIDTH + 1), ValueError, "model's hidden size 64, got 65"),
            (
                torch.zeros(3, TOKENS, WIDTH).half(),
                TypeError,
                "model's dtype torch.float32, got torch.float16",
            ),
            (torch.zeros(2, TOKENS, WIDTH), ValueError, "audio must describe the batch's 3 text rows, got 2"),
            (torch.zeros(3, TOKENS, WIDTH, device="meta"), ValueError, "model's device cpu, got meta"),
            ([torch.zeros(3, TOKENS, WIDTH), None, None], ValueError, "a tensor exactly at layers"),
        ],
        ids=["width", "dtype", "batch", "device", "layers"],
    )
    def test_states(self, model, states, error, message):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(error, match=message):
            model(padded, audio=AudioState(states))

    def test_not_a_state(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(TypeError, match="audio must be an AudioState, got Tensor"):
            model(padded, audio=torch.zeros(3, TOKENS, WIDTH))
        with pytest.raises(TypeError, match="audio must be an AudioState, got Tensor"):
            model.generate(padded, audio=torch.zeros(3, TOKENS, WIDTH))

    def test_masks(self, model):
        _, padded, _ = batch(texts(), "left")
        with pytest.raises(ValueError, match=r"attention_mask must be 2-D with audio.*got \(3, 1, 9, 9\)"):
            model(padded, attention_mask=torch.ones(3, 1, 9, 9), audio=self.state())

    @pytest.mark.parametrize("chunk", [None, 1, 2])
    def test_right_padded_generate(self, model, chunk):
        """Also where the first chunk of the prompt has no padding yet."""
        _, padded, mask = batch(texts(), "right")
        options = {"audio": self.state(), "max_new_tokens": 2, "prefill_chunk_size": chunk}
        with pytest.raises(ValueError, match="without right padding"):
            model.generate(padded, attention_mask=mask, **options)
        mask[:, -1] = 1
        if chunk is not None:  # the prompt at once may have holes
            with pytest.raises(ValueError, match=r"a mask with holes|without right padding"):
                model.generate(padded, attention_mask=mask, **options)

    def test_rows_of_generate(self, model):
        _, padded, mask = batch(texts(), "left")
        with pytest.raises(ValueError, match="audio must describe the prompt's 3 rows, got 1"):
            model.generate(padded, attention_mask=mask, audio=AudioState(torch.zeros(1, TOKENS, WIDTH)))

    def test_insert_beyond_the_text(self, model):
        _, padded, mask = batch(texts(), "left")
        state = self.state(insert_at=torch.tensor([0, 5, 0]))  # the second text has 4 tokens
        with pytest.raises(ValueError, match="insert_at must be at most each text's length"):
            model.train()(padded, attention_mask=mask, audio=state)
        with pytest.raises(ValueError, match="insert_at must be at most each text's length"):
            model.eval().generate(padded, attention_mask=mask, audio=state, max_new_tokens=2)

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_insert_beyond_a_text_whose_mask_is_inferred(self, model, chunk):
        """Without a mask, generate takes padding tokens for padding."""
        _, padded, mask = batch(texts(), "left")
        options = {"max_new_tokens": 2, "do_sample": False, "prefill_chunk_size": chunk}
        for place in (4, 5):  # the second text has 4 tokens
            state = self.state(insert_at=torch.tensor([7, place, 9]))
            if place == 4:
                want = model.generate(padded, attention_mask=mask, audio=state, **options)
                assert torch.equal(model.generate(padded, audio=state, **options), want)
                assert model.generate(padded, audio=state, num_beams=2, **options).shape == want.shape
                continue
            with pytest.raises(ValueError, match="insert_at must be at most each text's length"):
                model.generate(padded, audio=state, **options)

    @pytest.mark.parametrize("bypass", ["prepares nothing", "drops the audio", "is put back", "is replaced"])
    def test_generate_that_does_not_prepare_with_audio(self, model, bypass):
        """Whoever takes attach's place in generate must not lose the audio silently."""
        _, padded, _ = batch(texts(), "none")
        options = {"max_new_tokens": 2, "do_sample": False}
        stock = model._palkernels_handle.stock("prepare_inputs_for_generation")
        ours = model.prepare_inputs_for_generation
        message = "generate must call the model with all that its prepare_inputs_for_generation returns"
        if bypass == "prepares nothing":
            options["custom_generate"] = lambda model, input_ids, **kwargs: model(input_ids).logits.argmax(-1)
        elif bypass == "drops the audio":

            def drop(*args, **kwargs):
                return {name: x for name, x in ours(*args, **kwargs).items() if name != "audio"}

            model.prepare_inputs_for_generation = drop
        elif bypass == "is put back":
            model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
            message = "prepare_inputs_for_generation must be the one that attach made, got the stock one"
        else:
            model.prepare_inputs_for_generation = lambda *args, **kwargs: stock(*args, **kwargs)
        with pytest.raises(RuntimeError, match=message):
            model.generate(padded, audio=self.state(), **options)
        model.prepare_inputs_for_generation = lambda *args, **kwargs: ours(*args, **kwargs)  # passes it on
        model.generate(padded, audio=self.state(), max_new_tokens=2, do_sample=False)

    def test_output_attentions(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="output_attentions must be off"):
            model(padded, audio=self.state(), output_attentions=True)
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions must be off"):
            model(padded, audio=self.state())

    def test_attention_dropout(self):
        model = build("llama")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        attach(model)
        _, padded, _ = batch(texts(), "none")
        model(padded, audio=self.state())
        with pytest.raises(ValueError, match="attention_dropout must be 0 in training"):
            model.train()(padded, audio=self.state())

    def test_dropout_that_only_the_layers_apply(self, model):
        _, padded, _ = batch(texts(), "none")
        model.model.layers[0].self_attn.attention_dropout = 0.5
        model.model.layers[0].train()
        with pytest.raises(ValueError, match=r"attention dropout must be 0 with audio.*got 0.5"):
            model(padded, audio=self.state())

    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_audio_under_another_name(self, model, call):
        """A stock forward passes over keywords that it does not know."""
        _, padded, _ = batch(texts(), "none")
        run = model if call == "forward" else model.generate
        for name in ("audios", "audio_state", "sound"):
            with pytest.raises(TypeError, match=rf"{call} must be given audio as audio=AudioState\(...\), got {name}="):
                run(padded, **{name: self.state()})
        for name in ("audio_features", "input_features", "audio_lengths", "audio_index", "insert_at", "input_values"):
            with pytest.raises(TypeError, match=rf"{call} must be given audio as .* got {name}="):
                run(padded, **{name: torch.zeros(1)})
        assert torch.equal(model(padded, input_features=None).logits, model(padded).logits)

    def test_audio_to_the_inner_model(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="audio must be given to the attached causal LM itself"):
            model.model(padded, audio=self.state())

    def test_bidirectional_attention(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="is_causal must not be given with audio"):
            model(padded, audio=self.state(), is_causal=False)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            with pytest.raises(ValueError, match=f"{name} must not be given with audio"):
                model(padded, audio=self.state(), **{name: torch.tensor([0, 1])})

    def test_arguments_that_do_not_fit(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(TypeError, match="got input_ids twice"):
            model(padded, input_ids=padded, audio=self.state())
        with pytest.raises(TypeError, match="positional arguments, got 20"):
            model(padded, *[None] * 19, audio=self.state())
        with pytest.raises(ValueError, match="input_ids or inputs_embeds, got neither"):
            model(audio=self.state())
        with pytest.raises(ValueError, match=r"texts \(B, T\), B and T >= 1, got shape \(9,\)"):
            model(padded[0], audio=self.state())
        with pytest.raises(ValueError, match=r"texts \(B, T\), B and T >= 1, got shape \(0, 9\)"):
            model(padded[:0], audio=AudioState(torch.zeros(0, TOKENS, WIDTH)))
        with pytest.raises(ValueError, match=r"position_ids must count.*got list"):
            model(padded, position_ids=[0], audio=self.state())

    def test_early_exit(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="assistant_early_exit must be None with audio"):
            model.generate(padded[:1], audio=self.state(states=torch.zeros(1, 1, WIDTH)), assistant_early_exit=1)

    def test_a_prompt_of_padding(self, model):
        _, padded, mask = batch(texts(), "left")
        mask[1] = 0
        with pytest.raises(ValueError, match="every row of a prompt with audio must hold a token"):
            model.generate(padded, attention_mask=mask, audio=self.state(), max_new_tokens=2)

    def test_a_layer_that_does_not_take_the_audio(self, model):
        """Somebody swaps a layer's attention function after attach: counted, not ignored."""
        attention = model.model.layers[1].self_attn
        attention.config = attention.config._palkernels_stock_config
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(RuntimeError, match=r"layers \[1\] did not"):
            model(padded, audio=self.state())

    def test_reentrant_checkpointing(self, model):
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="gradient checkpointing must be non-reentrant with audio"):
            model(padded, audio=self.state())
