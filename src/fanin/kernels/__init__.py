"""The fixed fan-in arithmetic. One small face; the implementations lie beside it.

z[l, b] = bias[l] + sum_k weight[l, k] * x[index[l // G, k], b], for a chunk of labels at a time. Activations travel
transposed ([D, B], a feature a row), so that what a label reads is a run of whole rows.

`reference` is the semantics in plain torch; `bag` computes the same with torch's embedding-bag kernels, which never
write out the gathered features. They hold three functions each:

    forward(xt, weight, index, group) -> z [l, B]
    weight_gradient(xt, g, index, group) -> [l, K]
    add_input_gradient(dxt, g, weight, index, group) -> None, adds to dxt [D, B]
"""

from __future__ import annotations

from types import ModuleType

from fanin.kernels import bag, reference

BACKENDS: dict[str, ModuleType] = {"reference": reference, "bag": bag}


def backend(name: str = "auto") -> ModuleType:
    """The implementation called `name`; `auto` is the fastest that runs here. Raises ValueError for an unknown name."""
    if name == "auto":
        return bag
    try:
        return BACKENDS[name]
    except KeyError:
        raise ValueError(f"kernel backend {name!r} is not one of auto, {', '.join(BACKENDS)}") from None
