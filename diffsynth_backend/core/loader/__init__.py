"""Model files: finding, downloading, checking and loading them."""
