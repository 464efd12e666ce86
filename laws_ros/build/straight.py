"""Where training for cacheability starts: a network that is the best affine policy of every context, without a bend.

From PyTorch's own start a ReLU network bends everywhere, and the penalty on the certified gap spends its steps on
taking the bends out. From this one it bends only where the imitation pays for it (docs/adr/0008-quadruped.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GATE = 4.0  # how far another context is below the bend of a unit, in units of what the observations move it
ACTIVE = (1.5, 3.5)  # biases of the first layer: how many standard deviations away its units bend
MARGIN = (0.5, 1.5)  # the same for the second layer, in its own units


def start_straight(
    net: nn.Sequential,
    x: Tensor,
    y: Tensor,
    discrete: list[int],
    random: torch.Generator,
    room: float = 1.0,
    ridge: float = 1e-3,
    fan_in: int = 0,
) -> None:
    """Set the weights of a network before it is trained.

    Every value v of a discrete input c gets the first-layer units relu(c - v) and relu(v - c), exactly 0 there; every
    second-layer unit works in one context and is switched off by those two in all others. All remaining units are
    active over the data. The last layer solves the least squares. Nothing is frozen.

    Args:
        net: Linear, ReLU, Linear, ReLU, Linear.
        x: [N, n] normalised observations. y: [N, m] what the network should answer there.
        discrete: the inputs that are discrete.
        room: on GATE, ACTIVE and MARGIN; bends further away from the data cost rounding.
        ridge: of the least squares, in which smaller weights mean less rounding.
        fan_in: how many units of the first layer one of the second begins with, about; 0 for all. Rounding bounds add
            up every term of a sum, so fewer are better (docs/adr/0020-workload-figures.md).
    """
    first, second, last = net[0], net[2], net[4]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and isinstance(last, nn.Linear)
    hidden = first.out_features
    contexts = torch.unique(x[:, discrete], dim=0) if discrete else x[:1, :0]  # [V, d]
    values = [torch.unique(contexts[:, k]) for k in range(len(discrete))]
    hinges = 2 * sum(map(len, values))
    if hinges > hidden // 4 or len(contexts) > hidden // 8:
        discrete, values, hinges = [], [], 0  # too many contexts to have parts of the network of their own
        contexts = contexts[:1, :0]
    owner = torch.arange(second.out_features) % len(contexts)
    with torch.no_grad():
        if fan_in:
            share = fan_in / hidden
            second.weight.mul_((torch.rand(second.weight.shape, generator=random) < share) / share**0.5)
        first.bias[:] = room * _uniform(ACTIVE, hidden, random)
        first.weight[:, discrete] = 0.0
        first.weight[:hinges] = 0.0
        second.weight[:, :hinges] = 0.0
        unit = 0
        for k, (column, here) in enumerate(zip(discrete, values, strict=True)):
            apart = float(here.diff().min()) if len(here) > 1 else 1.0
            for value in here:
                first.weight[unit, column], first.bias[unit] = 1.0, -value
                first.weight[unit + 1, column], first.bias[unit + 1] = -1.0, value
                second.weight[contexts[owner, k] == value, unit : unit + 2] = -GATE * room / apart
                unit += 2
        middle = first.bias.clamp(min=0.0)
        middle[:hinges] = 0.0
        second.bias[:] = room * _uniform(MARGIN, second.out_features, random) - second.weight @ middle
        features = torch.cat([net[:4](x), torch.ones(len(x), 1)], dim=1).double()
        gram = features.T @ features / len(x) + ridge * torch.eye(features.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, features.T @ y.double() / len(x))
        last.weight[:], last.bias[:] = solution[:-1].T.float(), solution[-1].float()


def _uniform(limits: tuple[float, float], count: int, random: torch.Generator) -> Tensor:
    low, high = limits
    return low + (high - low) * torch.rand(count, generator=random)
