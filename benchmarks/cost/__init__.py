"""Time, memory and operations of optimizer steps and of polar factors, without any training."""
