"""2SSP's place among the methods (arXiv 2501.17771); it looks at whole blocks: two_stage_pruning.py."""

from typing import Literal

from calibrant.methods.method import Method, MethodOptions
from calibrant.quantization.statistics import HessianDiagonal


class TwoSsp(MethodOptions):
    """2SSP: narrower MLPs, then whole attention modules left out; the model becomes smaller and stays dense."""

    name: Literal["2ssp"] = "2ssp"


TWO_SSP = Method(TwoSsp, None, statistic=HessianDiagonal, quantizes=False, prunes=True)
