"""A connector given to ``attach`` is the model's: trained, moved, saved and loaded with it, and taken out by detach."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.oracles import build
from support.processes import run_in_two
from support.sharded import WAYS, run_with_connector, with_connector
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from palkernels.model import AudioState, EncodedAudio, MlpConnector, attach

KEYS = [f"palkernels_audio.connector.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")]
LORA = {"target_modules": ["q_proj", "k_proj"]}


def connector(seed=1):
    torch.manual_seed(seed)
    return MlpConnector(10, 64)


def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 101, (4, 8), generator=generator)
    return ids, EncodedAudio(torch.randn(4, 5, 10, generator=generator), insert_at=torch.tensor([2, 0, 3, 1]))


def logits(model):
    ids, audio = inputs()
    with torch.no_grad():
        return model.eval()(ids, audio=audio).logits


def audio_keys(model):
    return [name for name in model.state_dict() if "palkernels_audio" in name]


def trainer(model, folder, steps, **settings):
    ids, audio = inputs()
    rows = [{"ids": ids[i], "encoded": audio.encoded[i], "place": audio.insert_at[i]} for i in range(4)]

    def collate(rows):
        ids, encoded, places = (torch.stack([row[name] for row in rows]) for name in rows[0])
        return {"input_ids": ids, "labels": ids, "audio": EncodedAudio(encoded, insert_at=places)}

    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 1, "max_steps": steps}
    return Trainer(model, TrainingArguments(folder, **options | settings), train_dataset=rows, data_collator=collate)


def test_trainer_trains_saves_and_resumes(tmp_path):
    """Two steps, and one step, a checkpoint and another step by a new model: the same weights."""
    model = build("llama")
    handle = attach(model, connector=connector())
    trainer(model, tmp_path, 2).train()
    for name, weight in connector().named_parameters():
        assert (handle.connector.get_parameter(name) - weight).abs().max() > 1e-3, name

    resumed = build("llama")
    attach(resumed, connector=connector(seed=2))
    trainer(resumed, tmp_path, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    attach(loaded, tmp_path / "checkpoint-2")
    assert torch.equal(logits(loaded), logits(model))


def test_encoded_audio_is_what_the_handle_makes_a_state_of():
    model, projectors = build("llama"), {i: torch.nn.Linear(64, 64) for i in range(3)}
    handle = attach(model, connector=connector(), projectors=projectors)
    ids, audio = inputs()
    state = handle.state(audio.encoded, insert_at=audio.insert_at)
    with torch.no_grad():
        assert torch.equal(model(ids, audio=audio).logits, model(ids, audio=state).logits)
        options = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(ids, audio=audio, **options), model.generate(ids, audio=state, **options))
    half = audio.to(dtype=torch.float16)
    assert (half.encoded.dtype, half.insert_at.dtype) == (torch.float16, torch.int64)
    assert audio.to("cpu") is audio
    several = EncodedAudio((audio.encoded, audio.encoded))
    assert several.to("cpu") is several
    assert several.to(dtype=torch.float64).encoded[1].dtype == torch.float64
    handle.detach()
    attach(model)
    with pytest.raises(TypeError, match="audio must be an AudioState where attach was given no connector"):
        model(ids, audio=audio)


def test_it_is_a_submodule_until_detach():
    model, given = build("llama"), connector()
    stock = dict(model.state_dict())
    handle = attach(model, connector=given, projectors={i: torch.nn.Linear(64, 64) for i in range(3)})
    assert handle.connector is given
    assert sorted(handle.projectors) == [0, 1, 2]
    assert audio_keys(model)[:4] == KEYS
    assert list(model.state_dict())[: len(stock)] == list(stock)
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in given.parameters())
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in given.parameters()} == {torch.bfloat16}
    twin = copy.deepcopy(model)
    twin._palkernels_handle.connector.linear_1.weight.zero_()
    assert given.linear_1.weight.any()
    twin._palkernels_handle.detach()
    assert list(twin.state_dict()) == list(stock)
    assert not twin._forward_pre_hooks
    assert model._forward_pre_hooks
    with pytest.raises(ValueError, match="must be detached before a connector"):
        attach(model, connector=connector())
    handle.detach()
    assert list(model.state_dict()) == list(stock)
    assert handle.connector is given
    with pytest.raises(ValueError, match="connector and projectors must not be parts of the model already"):
        attach(model, connector=model.model.layers[0].mlp)


def test_a_stock_state_dict_leaves_it_as_it_is():
    model = build("llama")
    attach(model, connector=connector())
    before = logits(model)
    with pytest.warns(UserWarning, match="holds no palkernels_audio: connector and projectors keep the weights"):
        model.load_state_dict(build("llama").state_dict())
    assert torch.equal(logits(model), before)
    half = {name: tensor for name, tensor in model.state_dict().items() if name != KEYS[0]}
    with pytest.raises(RuntimeError, match=r"Missing key.*linear_1\.weight"):
        model.load_state_dict(half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())


def test_saved_weights_do_not_drop_out_in_silence(tmp_path):
    """from_pretrained loads a stock model; a new connector then is named, as the file with the trained one is."""
    model = build("llama")
    attach(model, connector=connector())
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "given", state_dict={k: v + 1 for k, v in model.state_dict().items()})
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process" / "lal.safetensors").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "all")
    with pytest.warns(UserWarning, match=r"keeps the weights that it has, though .*all holds lal.safetensors"):
        attach(loaded, connector=connector()).detach()
    attach(loaded, tmp_path / "all")
    assert torch.equal(logits(loaded), logits(model))
    shifted = attach(build("llama"), tmp_path / "given").connector
    assert torch.equal(shifted.linear_1.weight, model.state_dict()[KEYS[0]] + 1)
    with pytest.raises(ValueError, match=r"state_dict must hold the weights of the connector, got none for .*\.bias"):
        model.save_pretrained(tmp_path / "half", state_dict={KEYS[0]: model.state_dict()[KEYS[0]]})


def test_peft_freezes_it_unless_told_and_says_so():
    ids, audio = inputs()
    for saved in (None, ["palkernels_audio"], ["connector"]):
        handle = attach(build("llama"), connector=connector())
        model = get_peft_model(handle.model, LoraConfig(**LORA, modules_to_save=saved)).train()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                model(input_ids=ids, labels=ids, audio=audio).loss.backward()
        told = [str(warning.message) for warning in said if "connector" in str(warning.message)]
        trained = [parameter.grad is not None for parameter in handle.connector.parameters()]
        assert trained == [saved is not None] * 4
        assert len(told) == (saved is None)
        assert all("is not trained" in message and "modules_to_save" in message for message in told)


def test_peft_saves_and_loads_it(tmp_path):
    handle = attach(build("llama"), connector=connector())
    model = get_peft_model(handle.model, LoraConfig(**LORA, modules_to_save=["palkernels_audio"]))
    for parameter in handle.connector.parameters():
        parameter.data.add_(0.1)
    want = logits(model)
    model.save_pretrained(tmp_path / "adapters")
    handle.save(tmp_path / "alone")

    base = build("llama")
    attach(base, connector=connector(seed=2))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapters")), want)
    assert torch.equal(
        attach(build("llama"), tmp_path / "alone").connector.linear_1.bias, handle.connector.linear_1.bias
    )
    late = PeftModel.from_pretrained(build("llama"), tmp_path / "adapters")
    with pytest.raises(ValueError, match="attach must come before peft's adapters, which hold palkernels_audio"):
        attach(late, connector=connector())

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=1e-5)
    merged._palkernels_handle.detach()
    assert audio_keys(merged) == []


def test_adapters_first(tmp_path):
    """peft then saves no connector, which the first step says; a connector with adapters of its own is not saved."""
    model = get_peft_model(build("llama"), LoraConfig(**LORA)).train()
    attach(model, connector=connector())
    ids, audio = inputs()
    with pytest.warns(UserWarning, match="peft does not save the connector: attach first"):
        model(input_ids=ids, labels=ids, audio=audio)
    handle = attach(build("llama"), connector=connector())
    get_peft_model(handle.model, LoraConfig(target_modules=["k_proj", "linear_1"]))
    with pytest.raises(ValueError, match="connector must hold no adapters to be saved"):
        handle.save(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_audio_gives_it_gradients_of_zero(checkpointing):
    """And nothing else: loss and all other gradients are bitwise the stock model's."""
    ids, _ = inputs()
    stock = build("llama").train()
    stock_loss = stock(ids, labels=ids).loss
    stock_loss.backward()
    model = build("llama").train()
    handle = attach(model, connector=connector())
    handle.connector.linear_1.weight.data.fill_(torch.inf)  # 0 times it would be NaN
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for arguments in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        model.zero_grad()
        loss = model(**arguments, labels=ids).loss
        assert torch.equal(loss, stock_loss)
        loss.backward()
        for name, parameter in model.named_parameters():
            want = 0 * parameter.detach().nan_to_num(posinf=0) if name in KEYS else stock.get_parameter(name).grad
            assert torch.equal(parameter.grad, want), name
    model.zero_grad()
    state = AudioState(torch.randn(4, 3, 64))  # passes no connector
    model(ids, labels=ids, audio=state).loss.backward()
    assert all(not parameter.grad.any() for parameter in handle.connector.parameters())
    model.eval()
    assert torch.equal(model(ids).logits, stock.eval()(ids).logits)


def test_refuses_functions():
    """The model would neither train nor save the weights that one uses."""
    inner, model = torch.nn.Linear(10, 64), build("llama")
    with pytest.raises(TypeError, match=r"connector must be an nn\.Module, got function"):
        attach(model, connector=lambda states: inner(states))
    with pytest.raises(TypeError, match=r"a projector must be an nn\.Module, got function"):
        attach(model, projectors=dict.fromkeys(range(model.config.num_hidden_layers), lambda states: states))


def test_refuses_widths_that_do_not_fit():
    model = build("llama")
    layers = range(model.config.num_hidden_layers)

    def linears(taken, made):
        return {layer: torch.nn.Linear(taken, made) for layer in layers}

    for narrow in (MlpConnector(10, 48), torch.nn.Linear(10, 48)):
        with pytest.raises(ValueError, match="the connector must give the model's hidden size 64, got 48"):
            attach(model, connector=narrow)
        with pytest.raises(ValueError, match="projector 0 must take the connector's width 48, got 64"):
            attach(model, connector=narrow, projectors=linears(64, 64))
        attach(model, connector=narrow, projectors=linears(48, 64)).detach()
    with pytest.raises(ValueError, match="projector 0 must give the model's hidden size 64, got 48"):
        attach(model, projectors=linears(64, 48))
    attach(model, connector=torch.nn.Sequential(torch.nn.Linear(10, 48)))  # which does not say how wide its output is


@pytest.mark.slow
def test_compiled_whole():
    """With the connector in the graph, and without audio."""
    model, _, batches = with_connector(layers=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in batches:
        results = []
        for run in (model, compiled):
            model.zero_grad()
            run(**batch, labels=batch["input_ids"]).loss.backward()
            results.append([parameter.grad for parameter in model.parameters()])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_in_two(run_with_connector, 2, str(folder))
    return folder


@pytest.mark.parametrize("how", WAYS)
def test_two_processes_one_without_audio(two_processes, how):
    """The gradients are those of the mean of both losses; the process without audio does not hang the other."""
    model, handle, batches = with_connector()
    sum(model(**batch, labels=batch["input_ids"]).loss / 2 for batch in batches).backward()
    found = torch.load(two_processes / f"{how}.pt")
    assert all(parameter.grad.any() for parameter in handle.connector.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
