"""What templates/super_experts.html.j2 reads, for a report and for a profile alone."""

import statistics
from typing import Any

from se_compress.artifacts import CompressionPlan, ExpertProfile
from se_compress.reporting.page import without_protection

TABLE_ROWS = 15


def experts_context(profile: ExpertProfile, plan: CompressionPlan | None) -> dict[str, Any]:
    """Of a profile, and of what a plan made of it."""
    ranked = sorted(profile.experts, key=lambda stats: (-stats.peak, stats.id))
    return {
        "profile": profile,
        "plan": plan,
        "rescues": {one.id: without_protection(one) for one in plan.rescued} if plan else {},
        "largest": ranked[:TABLE_ROWS],
        "median_peak": statistics.median(stats.peak for stats in ranked) if ranked else None,
        "unrouted": [stats.id for stats in profile.experts if stats.tokens == 0],
    }
