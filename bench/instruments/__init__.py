"""What measures or predicts: memory, FLOPs and bytes, times."""
