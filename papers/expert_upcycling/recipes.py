"""The transitions that are compared, as data.

- `UPCYCLING`: the paper's operator U_m with every expert copied equally often; `UTILITY`: with the useful copied more often
- `RANDOM`: the same with random new experts and router rows, which the paper says is worse than not growing
"""

from dataclasses import replace

from repro.moe.growth import Growth

DELTA = 1e-3  # half the width of the uniform noise on the replicas' router biases

UPCYCLING = Growth(bias_noise=DELTA)
UTILITY = replace(UPCYCLING, allocation="utility")
RANDOM = Growth(experts="random", router="random", bias_noise=DELTA)
