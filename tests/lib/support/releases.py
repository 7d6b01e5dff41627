"""Which release of transformers is installed: what an old one does not do yet is not asked of it."""

import transformers
from packaging.version import Version

IS_NEWEST = Version(transformers.__version__) >= Version("5.24")  # of those that are tested
