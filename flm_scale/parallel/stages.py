"""Cuts the layer list into pipeline stages: runs of layers, the dearest of which costs as little as can be. Arithmetic only."""

from collections.abc import Sequence
from itertools import accumulate

from flm_scale.errors import ConfigError


def cut(costs: Sequence[float], num_stages: int) -> list[int]:
    """Return boundaries [0, ..., number of layers]: stage s runs the layers from boundaries[s] up to boundaries[s + 1], at least one.

    No other cut has a smaller largest sum. Of several such cuts it is the one whose first stages are shortest, because those hold the
    activations of most micro-batches. Costs 1 5 1 1 in two stages: [0, 2, 4].
    Raises ConfigError when there are more stages than layers.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"parallel.pipe ({num_stages}) must be from 1 to the model's number of layers ({num_layers}); change parallel.pipe")
    before = [0, *accumulate(costs)]

    def dearest(first: int, last: int, rest: float) -> float:
        return max(before[last] - before[first], rest)

    # least[k][i]: the dearest of k + 1 stages that share the layers from i on, at best; infinite where a stage would stay empty.
    least = [[before[-1] - cost for cost in before[:-1]] + [float("inf")]]
    while len(least) < num_stages:
        shorter = least[-1]
        least.append([min((dearest(i, j, shorter[j]) for j in range(i + 1, num_layers)), default=float("inf")) for i in range(num_layers)]
                     + [float("inf")])
    bound, boundaries = least[-1][0], [0]
    for rest in reversed(least[:-1]):
        boundaries.append(next(j for j in range(boundaries[-1] + 1, num_layers) if dearest(boundaries[-1], j, rest[j]) <= bound))
    return [*boundaries, num_layers]
