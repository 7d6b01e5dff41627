"""The names of palkernels.model: all there, loaded on first use, and known to transformers from the start."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from support.audio_llm import build_pal, entry, processor_of

import palkernels.model


def run(program: str, *arguments: object) -> str:
    """What a program prints in a fresh process."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", palkernels.model.__all__)
def test_every_name_is_there_and_is_no_module(name: str) -> None:
    assert getattr(palkernels.model, name) is getattr(palkernels.model, name)
    assert name in dir(palkernels.model)
    assert importlib.util.find_spec(f"palkernels.model.{name}") is None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match=r"^module 'palkernels\.model' has no attribute 'atach'$"):
        palkernels.model.atach  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'atach'"):
        exec("from palkernels.model import atach")


@pytest.mark.slow
def test_attach_loads_no_other_room() -> None:
    """Neither does a forward of an attached model."""
    rooms = run("""
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from palkernels.model import attach
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
handle = attach(LlamaForCausalLM(LlamaConfig(**sizes)))
handle.model(torch.tensor([[1]]))
print(*sorted({name.split(".")[2] for name in sys.modules if name.startswith("palkernels.model.")}))
""").split()
    assert rooms == ["auto", "causal_lm"]


@pytest.mark.slow
def test_auto_classes_load_a_saved_audio_llm(tmp_path: Path) -> None:
    """Each of them, as the first thing after `import palkernels.model`."""
    model = build_pal(entry("whisper", "plits"))
    model.save_pretrained(tmp_path)
    processor_of(model).save_pretrained(tmp_path)
    loaded = run(
        """
import json, multiprocessing, sys
import transformers
import palkernels.model
assert "palkernels.model.pal" not in sys.modules

def load(name, path):
    found = getattr(transformers, name).from_pretrained(path)
    print(name, type(found).__module__, type(found).__name__, flush=True)

def build(name, path):
    settings = json.loads(open(f"{path}/config.json").read())
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModel.from_config(config)
    print(name, type(model).__module__, type(model).__name__, flush=True)

fork = multiprocessing.get_context("fork")
for name in ("AutoConfig", "AutoModel", "AutoModelForMultimodalLM", "AutoProcessor", "for_model"):
    process = fork.Process(target=build if name == "for_model" else load, args=(name, sys.argv[1]))
    process.start()
    process.join()
    assert process.exitcode == 0, name
assert "palkernels.model.pal" not in sys.modules
""",
        tmp_path,
    ).splitlines()
    pal = "palkernels.model.pal"
    assert loaded == [
        f"AutoConfig {pal}.configuration_pal PalConfig",
        f"AutoModel {pal}.modeling_pal PalForConditionalGeneration",
        f"AutoModelForMultimodalLM {pal}.modeling_pal PalForConditionalGeneration",
        f"AutoProcessor {pal}.processing_pal PalProcessor",
        f"for_model {pal}.modeling_pal PalForConditionalGeneration",
    ]


def test_a_missing_transformers_is_named() -> None:
    message = run("""
import sys
sys.modules["transformers"] = None
try:
    import palkernels.model
except ModuleNotFoundError as error:
    print(error.name, error)
""")
    assert message == "transformers palkernels.model needs transformers: pip install 'palkernels[model]'\n"


def test_connectors_are_in_their_room_too() -> None:
    from palkernels.model import connectors

    for name in connectors.__all__:
        assert getattr(connectors, name) is getattr(palkernels.model, name)
        assert name in dir(connectors)
