"""The registry: every method that a recipe can name."""

from calibrant.compression.solvers.adpq import ADPQ
from calibrant.compression.solvers.gptq import GPTQ
from calibrant.compression.solvers.hqq import HQQ
from calibrant.compression.solvers.magnitude import MAGNITUDE
from calibrant.compression.solvers.method import Method
from calibrant.compression.solvers.quantease import QUANTEASE
from calibrant.compression.solvers.rtn import RTN
from calibrant.compression.solvers.sparsegpt import SPARSEGPT
from calibrant.compression.solvers.spqr import SPQR
from calibrant.compression.solvers.two_ssp import TWO_SSP
from calibrant.compression.solvers.wanda import WANDA

_ALL = (RTN, GPTQ, QUANTEASE, SPQR, HQQ, ADPQ, SPARSEGPT, WANDA, MAGNITUDE, TWO_SSP)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
