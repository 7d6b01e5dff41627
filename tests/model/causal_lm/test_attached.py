"""What every handle must have."""

import pytest
from support.oracles import build

from palkernels.model.causal_lm.attached import Attached


def test_a_handle_must_say_how_its_layers_take_audio():
    class Incomplete(Attached):
        def detach(self):
            pass

    with pytest.raises(TypeError, match=r"abstract methods '?begin'?, '?check_layers'?, '?request'?"):
        Incomplete(build("llama"), [], None, ())
