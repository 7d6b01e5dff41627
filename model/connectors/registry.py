"""Every connector by the name that configurations have for it."""

from __future__ import annotations

from palkernels.model.connectors.base import Connector
from palkernels.model.connectors.lfst import LfstConnector
from palkernels.model.connectors.mlp import MlpConnector
from palkernels.model.connectors.qformer import QFormerConnector

__all__ = ["CONNECTORS"]

CONNECTORS: dict[str, type[Connector]] = {"mlp": MlpConnector, "qformer": QFormerConnector, "lfst": LfstConnector}
