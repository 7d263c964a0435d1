import sys

from scalr_jax.bench.run import main

main(sys.argv[1:])
