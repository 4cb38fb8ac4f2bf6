"""What runs on a device: Triton kernels, their operators and their PyTorch references. Knows nothing of graphs."""

if __name__ == "kernels":
    raise ImportError("this folder is imported as fusion_backend.kernels, never as kernels: run from another folder")
