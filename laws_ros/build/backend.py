"""Where bounds are computed: NumPy, or PyTorch on a CPU or GPU, through the array API standard.

The one implementation is core.propagate; this module only says how arrays get to torch and back. Float64 is used, so
results differ from NumPy's by rounding alone, which the bounds contain.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.bounds import NUMPY, Backend
from laws_ros.core.errors import ConfigError


@cache
def backend(name: str = "numpy") -> Backend:
    """The backend of that name: "numpy", or a torch device such as "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: torch or array-api-compat is missing, or torch has no such device.
    """
    if name == "numpy":
        return NUMPY
    try:
        import array_api_compat.torch as xp
        import torch
    except ImportError as error:
        raise ConfigError(
            f"device {name!r}: needs torch and array-api-compat ({error}); install them or use numpy"
        ) from None
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r}: torch cannot use it ({reason}); choose numpy or cpu") from None

    def array(x: NDArray[Any]) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(x), device=name)

    def host(x: torch.Tensor) -> NDArray[Any]:
        return x.detach().cpu().numpy()

    return Backend(xp, array, host)
