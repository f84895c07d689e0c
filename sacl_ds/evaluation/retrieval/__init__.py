"""Image-text retrieval: features, a first stage by them, a second one by ITM, and figures of both, on all ranks."""
