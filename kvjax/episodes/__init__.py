"""Episodes of long conversations: segments, clusters, prompts, and where a question goes."""

from kvjax.episodes.budgets import key_similarity, layer_budgets
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.episodes.embed import Embedder
from kvjax.episodes.formats import read
from kvjax.episodes.grow import append, needs_reclustering, recluster
from kvjax.episodes.index import EpisodeIndex, create, route
from kvjax.episodes.prompt import patched_prompt
from kvjax.episodes.segment import Segment, cut
from kvjax.episodes.sensitivity import layer_similarity

__all__ = [
    "Conversation",
    "Embedder",
    "EpisodeIndex",
    "Question",
    "Segment",
    "Utterance",
    "append",
    "create",
    "cut",
    "key_similarity",
    "layer_budgets",
    "layer_similarity",
    "needs_reclustering",
    "patched_prompt",
    "read",
    "recluster",
    "route",
]
