"""Network for series with missing values: an LSTM over values, mask and time since last seen."""

import math

import torch
from torch import Tensor, nn


class Lstm(nn.Module):
    """Stacked LSTM layers; the state after the last step at which anything was seen is classified.

    The cell is written out in linear layers because Opacus cannot take per-record gradients of ``torch.nn.LSTM``.

    Guarantees:
        * What stands in a cell that the mask calls missing, NaN included, changes nothing.
        * Steps after the last observation (a short stay, padded) change nothing.

    Args:
        variables: Number of measured variables; the input is three times as wide.
        hidden: Width of each layer's state.
        layers: Number of stacked layers.
        outputs: Number of logits.
        carry_forward: As ``observe`` takes it.
    """

    def __init__(self, variables: int, hidden: int, layers: int, outputs: int, *, carry_forward: bool = False) -> None:
        super().__init__()
        self.carry_forward = carry_forward
        self.layers = nn.ModuleList(_Layer(3 * variables if i == 0 else hidden, hidden) for i in range(layers))
        self.head = nn.Linear(hidden, outputs)

    def forward(self, series: Tensor) -> Tensor:
        """Logits, shape ``(n, outputs)``, of series, shape ``(n, steps, 3 * variables)``."""
        states, seen = observe(series, carry_forward=self.carry_forward)
        for layer in self.layers:
            states = layer(states)
        steps = torch.arange(1, seen.shape[1] + 1, device=seen.device)
        last = (seen * steps).argmax(dim=1)  # nothing ever seen: the first step
        logits: Tensor = self.head(states[torch.arange(states.shape[0], device=states.device), last])
        return logits


class _Layer(nn.Module):
    """One LSTM layer, unrolled in time: states of shape ``(n, steps, hidden)``.

    Source:
        Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, whose bias starts at 1 (Jozefowicz et
        al. 2015), so that a new network remembers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(width, 4 * hidden)
        self.from_state = nn.Linear(hidden, 4 * hidden, bias=False)
        with torch.no_grad():
            self.from_input.bias[hidden : 2 * hidden] = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        state = memory = inputs.new_zeros(inputs.shape[0], self.from_state.in_features)
        states = []
        for driven in self.from_input(inputs).unbind(dim=1):
            enter, forget, candidate, leave = (driven + self.from_state(state)).chunk(4, dim=1)
            memory = forget.sigmoid() * memory + enter.sigmoid() * candidate.tanh()
            state = leave.sigmoid() * memory.tanh()
            states.append(state)
        return torch.stack(states, dim=1)


def observe(series: Tensor, *, carry_forward: bool = False) -> tuple[Tensor, Tensor]:
    """Make series fit for a network: missing values become 0, times since last seen become ``log(1 + time)``.

    The logarithm keeps a variable that was never seen again (its time grows with every step) within the scale of the
    rest, without any statistic of the data.

    Carried forward, the last value seen stands in for a missing one, and 0 only where there was none yet; times are
    divided by ``log(1 + steps)``, which brings them into [0, 1]. What is measured every few hours is then there at
    every step, and its age says how far to trust it.

    Args:
        series: Shape ``(n, steps, 3 * variables)``: values, mask (1 = seen), time since last seen.
        carry_forward: Whether to fill missing values with the last one seen in the same record.

    Returns:
        Series of the same shape, and whether anything was seen at each step, shape ``(n, steps)``.

    Source:
        Che et al. 2018 (GRU-D), whose baseline "forward" this is, with mask and time interval beside it.
    """
    values, mask, elapsed = series.chunk(3, dim=2)
    seen = mask > 0
    values = torch.where(seen, values, 0.0)  # not a product: NaN * 0 is NaN
    times = elapsed.clamp(min=0).log1p()
    if carry_forward:
        steps = torch.arange(seen.shape[1], device=seen.device)[None, :, None]
        last = torch.where(seen, steps, 0).cummax(dim=1).values  # nothing yet: the first step, whose value is 0 then
        values = values.gather(1, last)
        times = times / math.log1p(seen.shape[1])
    return torch.cat([values, seen.to(values.dtype), times], dim=2), seen.any(dim=2)
