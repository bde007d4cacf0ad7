"""What a configuration will do, found before weights load: sizes, memory, refusals."""
