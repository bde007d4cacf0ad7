"""Images as rewards take them: preprocessing, encoding, decoding."""
