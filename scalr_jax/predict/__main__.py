import sys

from scalr_jax.predict.run import main

main(sys.argv)
