"""Images that were judged already: where they come from, how they are checked, and how they become latents."""
