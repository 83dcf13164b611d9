"""Sparse selection: which tokens of the cache a layer reads, by an indexer, by pages, or shared."""

from kvjax.select.attend import attend_chosen
from kvjax.select.choose import (
    PageBounds,
    choose_tokens,
    mask_of,
    page_bounds,
    page_logits,
    page_scores,
    tokens_of_pages,
)
from kvjax.select.choosers import Choice, by_attention, by_index, by_page_bounds
from kvjax.select.cost import AttentionSizes, Cost, cost, glm_5_2, sizes_of
from kvjax.select.decode import SelectedState, Selection, forward_selected, init_selected
from kvjax.select.index_cache import IndexCache, append_index, init_index, read_index
from kvjax.select.indexer import Indexer, index_keys, index_queries, index_scores, init_indexer
from kvjax.select.measure import (
    History,
    next_token_kl,
    read_exactly,
    recall_matrix,
    restricted_pass,
    summary,
)
from kvjax.select.observe import Observed, observe_windows
from kvjax.select.share import best_pattern, greedy_pattern, pattern_score, periodic_pattern
from kvjax.select.train_indexer import (
    IndexProgress,
    IndexTraining,
    shared_targets,
    train_indexer,
    train_indexer_saving,
)

__all__ = [
    "AttentionSizes",
    "Choice",
    "Cost",
    "History",
    "IndexCache",
    "IndexProgress",
    "IndexTraining",
    "Indexer",
    "Observed",
    "PageBounds",
    "SelectedState",
    "Selection",
    "append_index",
    "attend_chosen",
    "best_pattern",
    "by_attention",
    "by_index",
    "by_page_bounds",
    "choose_tokens",
    "cost",
    "forward_selected",
    "glm_5_2",
    "greedy_pattern",
    "index_keys",
    "index_queries",
    "index_scores",
    "init_index",
    "init_indexer",
    "init_selected",
    "mask_of",
    "next_token_kl",
    "observe_windows",
    "page_bounds",
    "page_logits",
    "page_scores",
    "pattern_score",
    "periodic_pattern",
    "read_exactly",
    "read_index",
    "recall_matrix",
    "restricted_pass",
    "shared_targets",
    "sizes_of",
    "summary",
    "tokens_of_pages",
    "train_indexer",
    "train_indexer_saving",
]
