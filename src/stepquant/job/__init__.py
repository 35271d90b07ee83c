"""Jobs: what a user asks for in one call."""

from stepquant.job.inplace import plan_json, planned, quantize
from stepquant.job.pipelines import load
from stepquant.job.recipe import Recipe
from stepquant.job.store import Outcome, quantize_to

__all__ = ["Outcome", "Recipe", "load", "plan_json", "planned", "quantize", "quantize_to"]
