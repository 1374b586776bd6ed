"""What runs within a worker. It sees the standard library alone, and so imports nothing of Fathom but itself."""
