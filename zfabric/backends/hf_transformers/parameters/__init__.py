"""What a model computes with: its weights as they are stored, packed, quantized, adapted and replaced."""
