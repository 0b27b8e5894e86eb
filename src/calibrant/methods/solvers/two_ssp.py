"""2SSP (arXiv 2501.17771): its declaration; engine/two_stage_pruning.py prunes."""

from typing import Literal

from calibrant.methods.method import MethodOptions, StructuredPruner
from calibrant.quantization.statistics import HessianDiagonal


class TwoSsp(MethodOptions):
    """2SSP: narrows MLPs, then removes whole attention modules; the smaller model stays dense."""

    name: Literal["2ssp"] = "2ssp"


TWO_SSP = StructuredPruner(TwoSsp, HessianDiagonal)
