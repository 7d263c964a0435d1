import sys

from scalr_jax.export.run import main

main(sys.argv)
