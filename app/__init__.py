"""The service: bytes in, one batched forward pass, bytes out. It knows weights folders, never how they were trained."""
