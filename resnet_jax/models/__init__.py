"""The networks, pure flax.linen. They know no file and no config."""
