"""Judges the answer in a chain of thought as lm-evaluation-harness does for AIME."""

from lm_eval.tasks.aime.utils import process_results

__all__ = ["process_results"]
