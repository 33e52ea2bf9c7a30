"""Equations on arrays, one sample at a time, with only jax: TokenTM, the rules of relevance, maps.

Axes, for the whole project:

    B batch    L blocks    H heads    N tokens    D width    Q, K query and key tokens
    gh, gw patch grid (n = gh * gw patches, N = prefix + n)
"""

from tokentm_jax.maths import scores as scores
from tokentm_jax.maths import weights as weights
from tokentm_jax.maths.variants import contributions as contributions
