"""For authors of attacks: the contract as a pytest class, tiny models of every family, and stand-ins for pipelines.

``pip install 'imma-cli[testing]'`` brings pytest.
"""

from contextlib import suppress

with suppress(ModuleNotFoundError):
    import pytest

    # pytest explains the assertions of test files and of nothing else unless told so before the import
    pytest.register_assert_rewrite("imma_cli.attacks.testing.contract")

from imma_cli.attacks.testing.contract import AttackContract, example_concept, left_as_it_was
from imma_cli.attacks.testing.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_pipeline

__all__ = [
    "AttackContract",
    "example_concept",
    "left_as_it_was",
    "tiny_checkpoint",
    "tiny_config",
    "tiny_model",
    "tiny_pipeline",
]
