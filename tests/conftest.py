"""All tests run on eight virtual CPU devices; those of one device take a mesh of one."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
