"""State that lasts: caches, generations, methods and arrays saved whole, and restored anywhere."""

from kvjax.checkpoint.reshard import reshard
from kvjax.checkpoint.restore import peek, restore
from kvjax.checkpoint.saver import Saver, save
from kvjax.checkpoint.tree import mark

__all__ = ["Saver", "mark", "peek", "reshard", "restore", "save"]
