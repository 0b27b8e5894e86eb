"""Recorded module calls, repeated on fewer rows."""

import pytest
import torch
from torch import nn

from calibrant.modeling.module_call import ModuleCall


class _Mixed(nn.Module):
    """Scales and shifts each row; with ``mixing`` also subtracts the mean over the batch."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(self, hidden: torch.Tensor, *, beside: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
        output = hidden * beside[0] + beside[1]
        return (output - hidden.mean(0) if self.mixing else output), None


@pytest.mark.parametrize("mixing", [False, True])
def test_calls_are_shortened_only_where_rows_do_not_mix(mixing: bool) -> None:
    torch.manual_seed(0)
    mask = torch.rand(4, 6) < 0.8
    beside = (torch.randn(4, 6, 5), torch.randn(1, 6, 5))
    call = ModuleCall(_Mixed(mixing), (torch.randn(4, 6, 5),), {"beside": beside}, mask)
    part = call.shortened(2)
    assert len(part.mask) == (4 if mixing else 2)
    torch.testing.assert_close(part.output(), call.output()[: len(part.output())])
    rows = call.split()
    assert len(rows) == (1 if mixing else 4)
    torch.testing.assert_close(torch.cat([row.output() for row in rows]), call.output())
