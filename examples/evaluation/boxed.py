"""How the answer in a chain of thought is judged: the harness's own way for AIME."""

from lm_eval.tasks.aime.utils import process_results

__all__ = ["process_results"]
