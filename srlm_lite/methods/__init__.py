"""The methods: what turns answers and grades into weighted pairs, one file each."""

from __future__ import annotations

from srlm_lite.methods.cream import Cream
from srlm_lite.methods.dno import Dno
from srlm_lite.methods.dpo import OfflineDpo
from srlm_lite.methods.meta_rewarding import MetaRewarding
from srlm_lite.methods.rlaif import Rlaif
from srlm_lite.methods.rlhf import Rlhf
from srlm_lite.methods.scir import Scir
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.methods.spin import Spin
from srlm_lite.methods.temporal import Temporal
from srlm_lite.recipe import Recipe

METHODS: dict[str, type[SelfRewarding]] = {
    "self-rewarding": SelfRewarding,
    "dpo": OfflineDpo,
    "spin": Spin,
    "cream": Cream,
    "temporal": Temporal,
    "dno": Dno,
    "scir": Scir,
    "meta-rewarding": MetaRewarding,
    "rlaif": Rlaif,
    "rlhf": Rlhf,
}
"""Every method that a recipe may name. A method inherits from the one it changes."""


def method_of(recipe: Recipe) -> SelfRewarding:
    """The recipe's method."""
    return METHODS[recipe.method]()
