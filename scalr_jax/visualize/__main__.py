import sys

from scalr_jax.visualize.run import main

main(sys.argv)
