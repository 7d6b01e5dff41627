"""What the tests of serving share: saved models, and what Hugging Face answers. They need vLLM: make test-serving."""

import pytest
from support import served
from support.limits import pytest_runtest_protocol, restore_default_signals

__all__ = ["pytest_runtest_protocol"]  # every test's limit of time

restore_default_signals()
served.quiet_environment()


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A function from a model's name to its directory, made once."""
    made = {}

    def get(name, family="llama"):
        if (name, family) not in made:
            made[name, family] = served.make(tmp_path_factory.mktemp(f"{name}-{family}"), name, family)
        return made[name, family]

    return get


@pytest.fixture(scope="session")
def reference(directory):
    """A function from a model's name to the model as Hugging Face runs it."""
    made = {}

    def get(name, family="llama"):
        if (name, family) not in made:
            made[name, family] = served.Reference(directory(name, family))
        return made[name, family]

    return get
