"""Lets `python -m mergekit_metagpt` do what the command `mergekit-metagpt` does."""

from mergekit_metagpt.commands.cli import main

if __name__ == "__main__":
    main(prog_name="mergekit-metagpt")
