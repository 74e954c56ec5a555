"""What is worth a kernel: a plain PyTorch reference and, for GPUs, a Triton kernel that must equal it."""
