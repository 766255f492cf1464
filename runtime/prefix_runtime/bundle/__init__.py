"""Bundles on disk: the manifest, the folder, and which tasks there are."""
