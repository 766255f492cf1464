"""prefix-export: trained prefixes and their frozen model, to a bundle that runs without torch.

The package itself imports nothing heavy: `from prefix_export.build import BuildRequest, build` brings torch.
"""

__version__ = "0.1.0"
