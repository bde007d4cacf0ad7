"""What a run will need on a GPU, before it has one: memory from a simulated pass, images per second from FLOPs."""
