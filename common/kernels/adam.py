"""Adam's constants (Kingma & Ba 2015, arXiv 1412.6980), the paper's, for `adaround` and its kernel."""

MOMENT_DECAY, VARIANCE_DECAY, EPSILON = 0.9, 0.999, 1e-8
