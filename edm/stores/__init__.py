"""What EDM's own stores share: options, the lock on a directory, compression around any page store."""
