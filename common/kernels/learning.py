"""Constants of learned rounding, for `solvers.adaround` and its kernel: Adam's (Kingma & Ba 2015,
arXiv 1412.6980), and those of the stretched sigmoid (Louizos et al. 2018, arXiv 1712.01312).
"""

MOMENT_DECAY, VARIANCE_DECAY, EPSILON = 0.9, 0.999, 1e-8
STRETCH, OFFSET = 1.2, -0.1
