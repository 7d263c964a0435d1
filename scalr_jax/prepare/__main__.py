import sys

from scalr_jax.prepare.run import main

main(sys.argv)
