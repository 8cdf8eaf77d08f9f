"""`python -m sae_transfer` is `sae-transfer`."""

from sae_transfer.cli import main

if __name__ == "__main__":
    main()
