"""Vector search on packed codes: the second use of the codecs, without a model."""

from kvjax.search.index import Index

__all__ = ["Index"]
