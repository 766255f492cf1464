"""Rows of keys and values, whatever holds them: what is asked of a cache, and the pool that lends them."""
