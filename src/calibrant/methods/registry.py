"""The registry: every method that a recipe can name."""

from calibrant.methods.method import LayerSolver, StructuredPruner
from calibrant.methods.solvers.adpq import ADPQ
from calibrant.methods.solvers.gptq import GPTQ
from calibrant.methods.solvers.hqq import HQQ
from calibrant.methods.solvers.magnitude import MAGNITUDE
from calibrant.methods.solvers.quantease import QUANTEASE
from calibrant.methods.solvers.rtn import RTN
from calibrant.methods.solvers.sparsegpt import SPARSEGPT
from calibrant.methods.solvers.spqr import SPQR
from calibrant.methods.solvers.two_ssp import TWO_SSP
from calibrant.methods.solvers.wanda import WANDA
from calibrant.methods.training import QAT, QUADAPTER_END_TO_END, ZSAQ, Trainer

Method = LayerSolver | StructuredPruner | Trainer

_SOLVERS = (RTN, GPTQ, QUANTEASE, SPQR, HQQ, ADPQ, SPARSEGPT, WANDA, MAGNITUDE)
_TRAINERS = (QAT, QUADAPTER_END_TO_END, ZSAQ)
_ALL: tuple[Method, ...] = (*_SOLVERS, TWO_SSP, *_TRAINERS)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
