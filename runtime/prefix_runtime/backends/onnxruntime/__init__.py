"""onnxruntime: sessions, the caches that its graphs read and write, graphs that are kept packed."""
