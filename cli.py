"""Launcher for a checkout: `python cli.py generate …`. The commands are in mlx_gemma_mtp/cli.py."""

from mlx_gemma_mtp.cli import main

if __name__ == "__main__":
    main()
