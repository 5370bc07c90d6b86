"""Move the accepted tree rows behind the committed prefix, in all caches, in place."""

from .cache_table import CacheTable
from .op import compact_kv_cache_

__all__ = ["CacheTable", "compact_kv_cache_"]
