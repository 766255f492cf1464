"""Build serialized engines of TensorRT, or TensorRT for RTX, from a bundle's graph."""
