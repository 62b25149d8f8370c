"""`python -m se_compress` is the `se-compress` command."""

from se_compress.cli import main

main()
