import sys

from scalr_jax.compile.run import main

main(sys.argv)
