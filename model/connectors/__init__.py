"""From an encoder's states to the language model's width: MLP, Q-Former and LFST."""

from typing import TYPE_CHECKING

from palkernels import lazy

if TYPE_CHECKING:
    from palkernels.model.connectors.base import Connector
    from palkernels.model.connectors.lfst import LfstConnector
    from palkernels.model.connectors.mlp import MlpConnector
    from palkernels.model.connectors.qformer import QFormerConnector
    from palkernels.model.connectors.registry import CONNECTORS
else:
    __getattr__, __dir__ = lazy.exports(
        __name__,
        {
            "CONNECTORS": f"{__name__}.registry",
            "Connector": f"{__name__}.base",
            "LfstConnector": f"{__name__}.lfst",
            "MlpConnector": f"{__name__}.mlp",
            "QFormerConnector": f"{__name__}.qformer",
        },
    )

__all__ = ["CONNECTORS", "Connector", "LfstConnector", "MlpConnector", "QFormerConnector"]
