"""ARC-Easy: the part of ARC on which small models, too, do better than chance (Clark et al. 2018,
arXiv 1803.05457).
"""

from __future__ import annotations

from common.tasks.arc import Arc, arc_metrics


class ArcEasy(Arc):
    """Asked as ARC-Challenge is."""

    name, title, place = "arc_easy", "ARC-Easy", 2
    address = "allenai/ai2_arc/ARC-Easy:test"
    stand_in = "allenai/ai2_arc/ARC-Easy:validation"
    # The whole split.
    limit = 2376
    flag = "--arc-easy-data"
    demo = "arc_easy"
    metrics = arc_metrics(name, title)


TASK = ArcEasy()
