"""prefix-export: export trained prefixes and their frozen model into a bundle that runs without torch.

Importing the package itself is fast; `from prefix_export.build import BuildRequest, build` imports torch.
"""

__version__ = "0.1.0"
