"""What it costs to break each parameter set, attack by attack.

Needs SageMath (9.5 was used) and a checkout of https://github.com/malb/lattice-estimator:

    sage -python lattice_estimates.py PATH_OF_THE_CHECKOUT > lattice_estimates.txt
"""

import sys

if len(sys.argv) != 2:
    sys.exit(__doc__)
sys.path.insert(0, sys.argv[1])

from estimator import LWE, ND, RC  # noqa: E402  (found through the path above)

# Name, n = k * N, log2(q), eta: what protocol/src/he/params.rs says. A module lattice is estimated as a plain one of
# the same dimension, as no attack is known that gains from the ring.
PARAMETER_SETS = [
    ("P24", 1 * 1024, 24, 4),
    ("P32", 5 * 256, 32, 21),
    ("P48", 1 * 2048, 48, 21),
]

# Coefficients encrypted under one secret that an attacker may use: n tokens at most by thousands of features.
SAMPLES = 2**24

for name, dimension, modulus_bits, eta in PARAMETER_SETS:
    instance = LWE.Parameters(
        n=dimension,
        q=2**modulus_bits,
        Xs=ND.Uniform(-1, 1),
        Xe=ND.CenteredBinomial(eta),
        m=SAMPLES,
        tag=name,
    )
    print(instance, flush=True)
    LWE.estimate(instance, red_cost_model=RC.MATZOV)
